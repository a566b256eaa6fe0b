"""What to pull: the reference as it is written, and the file or folder of a repository it means.

In: text, and a :class:`Listing` of a repository. Out: a :class:`Reference`, and what to fetch. This
module knows no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from edge_gemma.bundles.manifest import MANIFEST
from edge_gemma.errors import EdgeGemmaError, HubError, UsageError
from edge_gemma.units import format_bytes

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[^:\s]+))?(?::(?P<path>[^\s]+))?"
)
_URL = re.compile(
    rf"https?://(?:huggingface\.co|hf\.co)/({_PART}/{_PART})"
    r"(?:/(?:blob|resolve|tree)/([^/\s]+)(?:/([^\s?]*))?)?"  # revision and path
    r"(?:\?\S*)?/?"
)


@dataclass(frozen=True)
class Reference:
    """What to pull.

    >>> parse_reference("org/name@v1:model-Q4_0.gguf")
    Reference(repository='org/name', revision='v1', path='model-Q4_0.gguf')
    """

    repository: str
    revision: str = "main"
    path: str = ""  # a GGUF, a folder with a bundle, or part of a GGUF's name; "" to find out


def parse_reference(text: str) -> Reference:
    """``org/name``, ``org/name@revision``, ``org/name:file.gguf``, or the address of a page on
    huggingface.co. Raises UsageError.

    >>> parse_reference("https://huggingface.co/org/name/blob/main/a/b.gguf")
    Reference(repository='org/name', revision='main', path='a/b.gguf')
    """
    text = text.strip()
    if match := _URL.fullmatch(text):
        found = Reference(match[1], unquote(match[2] or "main"), unquote(match[3] or "").strip("/"))
    elif match := _REFERENCE.fullmatch(text.removeprefix("hf.co/").removeprefix("huggingface.co/")):
        found = Reference(
            match["repository"], match["revision"] or "main", (match["path"] or "").strip("/")
        )
    else:
        raise UsageError(
            f"cannot read {text!r} as a model on the hub; write it like org/name, "
            "org/name:file.gguf or org/name@revision"
        )
    if (
        ".." in PurePosixPath(found.path).parts
        or ".." in found.repository
        or "\\" in found.path
        or "\0" in found.path
    ):
        raise UsageError(f"the path {found.path!r} leads out of the repository")
    return found


@dataclass
class Listing:
    """What a repository holds at one commit; ``cached`` is the folder of the hub's own cache that
    has it already, if any.
    """

    commit: str
    files: dict[str, tuple[int, str | None]]  # path → (bytes, sha256 of large files)
    cached: Path | None = None
    problem: EdgeGemmaError | None = field(default=None)  # why the hub was not asked


def choose(wanted: Reference, listing: Listing) -> tuple[str, str]:
    """(folder of a bundle, "") or ("", GGUF file). Raises HubError: nothing fits, or more than one
    file does.
    """
    where = f"{wanted.repository}@{listing.commit[:7]}"
    if wanted.path in listing.files and wanted.path.endswith(".gguf"):
        return "", _whole(wanted.path)
    folder = wanted.path.removesuffix(MANIFEST).strip("/")
    if f"{folder}/{MANIFEST}".lstrip("/") in listing.files:
        return folder, ""
    ggufs = [path for path in sorted(listing.files) if _is_model(path)]
    listed = ", ".join(f"{path} ({format_bytes(listing.files[path][0])})" for path in ggufs[:20])
    if wanted.path:
        if listing.problem:
            raise listing.problem
        found = fitting(wanted.path, ggufs)
        if len(found) == 1 or (found and len({_unsplit(path) for path in found}) == 1):
            return "", _whole(found[0])
        raise HubError(
            f"{where} has {len(found) or 'no'} file{'s' * (len(found) != 1)} for "
            f"{wanted.path!r}; its GGUF files: {listed or 'none'}"
        )
    if len(ggufs) == 1:
        return "", _whole(ggufs[0])
    if ggufs:
        raise HubError(
            f"{where} has {len(ggufs)} GGUF files; name one, like "
            f"{wanted.repository}:{ggufs[0]}. There are: {listed}"
        )
    if listing.problem:
        raise listing.problem
    raise HubError(_no_model(wanted, listing, where))


def _is_model(path: str) -> bool:
    return path.endswith(".gguf") and not re.search(r"mmproj|imatrix", path, re.IGNORECASE)


def _no_model(wanted: Reference, listing: Listing, where: str) -> str:
    if any(path.endswith(".safetensors") for path in listing.files):
        return (
            f"{where} is a checkpoint, neither a bundle nor a GGUF; make a bundle of it: "
            f"edge-gemma convert {wanted.repository} OUT"
        )
    return (
        f"{where} has neither a {MANIFEST} nor a GGUF; it holds "
        f"{', '.join(sorted(listing.files)[:8]) or 'nothing'}"
    )


# what a quantization's name begins with: Q6_K, IQ4_XS, TQ1_0, F16, BF16, MXFP4, UD-Q2_K_XL
_QUANTIZATION = re.compile(r"(UD-)?(I?Q\d|TQ\d|B?F(16|32)|(MX|NV)FP4)\w*", re.IGNORECASE)
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")


def fitting(part: str, paths: Iterable[str]) -> list[str]:
    """The GGUF files that ``part`` of a reference means: those in a folder of that name; else those
    of that name; else those whose name ends with it as a whole word; else those in which it is one.
    What is no quantization's name may also be a piece of a word; a name with ``.gguf`` is a whole
    one.

    >>> fitting("Q6_K", ["x-Q6_K.gguf", "x-Q6_K_L.gguf"])
    ['x-Q6_K.gguf']
    >>> fitting("F16", ["x-BF16.gguf"])
    []
    """
    steps = _closest_first(part)
    paths = list(paths)
    for fits in steps:
        if found := [path for path in paths if fits(path)]:
            return found
    return []


def is_meant(part: str, path: str) -> bool:
    """Whether ``part`` means this file without a look at the repository's other files."""
    steps = _closest_first(part)
    if _QUANTIZATION.fullmatch(part):
        steps = steps[:-1]  # a word in the middle: another file may fit better
    return any(fits(path) for fits in steps)


def _closest_first(part: str) -> list[Callable[[str], bool]]:
    """Tests of a path, the closest match first."""
    wanted = part.lower().removesuffix(".gguf")
    word = rf"(?<!\w){re.escape(wanted)}(?!\w)"

    def named(pattern: str) -> Callable[[str], bool]:
        return lambda path: bool(re.search(pattern, _stem(path)))

    steps = [lambda path: path.startswith(f"{part}/"), named(f"^{re.escape(wanted)}$")]
    if part.lower().endswith(".gguf"):
        return steps
    steps += [named(f"{word}$"), named(word)]
    if not _QUANTIZATION.fullmatch(part):
        steps.append(named(re.escape(wanted)))
    return steps


def _stem(path: str) -> str:
    """The file's name in lower case, without its suffix and its number among the parts of a split
    file.
    """
    return _SPLIT.sub("", PurePosixPath(path).name.lower().removesuffix(".gguf"))


def _unsplit(path: str) -> str:
    return f"{PurePosixPath(path).parent}/{_stem(path)}"


def _whole(path: str) -> str:
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path):
        raise HubError(
            f"{path} is one part of a split GGUF, which this version does not join; pull an "
            "unsplit one"
        )
    return path


def default_name(wanted: Reference, folder: str, gguf: str) -> str:
    text = (
        PurePosixPath(gguf).stem
        if gguf
        else PurePosixPath(folder).name
        if folder
        else wanted.repository.split("/")[1]
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:128]
