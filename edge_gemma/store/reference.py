"""What to pull: the reference as it is written, and the file or folder of a repository it means.

In: text, and a :class:`Listing` of a repository. Out: a :class:`Reference`, and what to fetch. This
module knows no network.
"""

from __future__ import annotations

import re
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
    """(folder of a bundle, "") or ("", GGUF file)."""
    where = f"{wanted.repository}@{listing.commit[:7]}"
    if wanted.path in listing.files and wanted.path.endswith(".gguf"):
        return "", _whole(wanted.path)
    folder = wanted.path.removesuffix(MANIFEST).strip("/")
    if f"{folder}/{MANIFEST}".lstrip("/") in listing.files:
        return folder, ""
    ggufs = [
        path
        for path in sorted(listing.files)
        if path.endswith(".gguf") and not re.search(r"mmproj|imatrix", path, re.IGNORECASE)
    ]
    listed = ", ".join(f"{path} ({format_bytes(listing.files[path][0])})" for path in ggufs[:20])
    if wanted.path:
        if listing.problem:
            raise listing.problem
        fitting = [
            path
            for path in ggufs
            if path.startswith(f"{wanted.path}/")
            or wanted.path.lower() in PurePosixPath(path).name.lower()
        ]
        if len(fitting) != 1:
            raise HubError(
                f"{where} has {len(fitting) or 'no'} file{'s' * (len(fitting) != 1)} for "
                f"{wanted.path!r}; its GGUF files: {listed or 'none'}"
            )
        return "", _whole(fitting[0])
    if len(ggufs) == 1:
        return "", _whole(ggufs[0])
    if ggufs:
        raise HubError(
            f"{where} has {len(ggufs)} GGUF files; name one, like "
            f"{wanted.repository}:{ggufs[0]}. There are: {listed}"
        )
    if listing.problem:
        raise listing.problem
    if any(path.endswith(".safetensors") for path in listing.files):
        raise HubError(
            f"{where} is a checkpoint, neither a bundle nor a GGUF; make a bundle of it: "
            f"edge-gemma convert {wanted.repository} OUT"
        )
    raise HubError(
        f"{where} has neither a {MANIFEST} nor a GGUF; it holds "
        f"{', '.join(sorted(listing.files)[:8]) or 'nothing'}"
    )


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
