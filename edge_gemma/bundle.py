"""The bundle: a folder with ``manifest.json`` and the artifacts it names. The one contract between converting and running.

In: a folder. Out: a :class:`Bundle` whose manifest was validated and whose files were checked (size and header at load,
full hashes on :meth:`Bundle.verify`). This room does not know llama.cpp, onnxruntime or where a bundle came from.

No model fact is guessed from a file or model name: what the runtime needs to know is a field below.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from .errors import BundleError, HashMismatch, RuntimeFailure, UsageError
from .units import MiB

FORMAT = "edge-gemma-bundle"
VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * MiB  # a 35-layer table is 0.3 MiB; anything near this is not a manifest
_CHUNK = 4 * MiB

Use = Literal["lookup", "matmul", "unused"]
Family = Literal["gemma3", "gemma3n"]


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of the tensor table. ``use`` says how the decoder reads it:

    - ``lookup``: a few rows per token (PLE, an untied token embedding): may stay on disk;
    - ``matmul``: whole, for every token (a tied token embedding too, because it is the output head);
    - ``unused``: never (K/V of KV-sharing layers, rope factors).
    """

    name: str
    type: str  # ggml's name: F32, Q4_0, Q6_K …
    shape: tuple[int, ...]  # ggml order: shape[0] is the row length
    offset: int  # absolute byte offset in the file
    nbytes: int
    use: Use


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    sha256: str


class Decoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    file: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    sliding_window: int
    kv_layers: tuple[Literal["global", "sliding"], ...]  # the layers that own a KV cache, in order
    ple_width: int = 0  # 256 for gemma3n, 0 for gemma3
    tied_head: bool = True  # the output head is the token embedding
    header_bytes: int  # of the GGUF before its first tensor, checked by hash at every load: llama.cpp aborts on some damage there
    header_sha256: str
    tensors: tuple[Tensor, ...] = ()


class AudioEncoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    file: str
    precision: str  # f32 | f16 | int8 | int8-block | int4-block
    n_embd: int  # width of a soft token
    weights_bytes: int
    activation_bytes: int  # measured or derived peak beyond the weights, one 12-frame step
    n_layer: int = 12
    hidden: int = 1536


class VisionEncoder(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    file: str
    kind: Literal["siglip", "mobilenetv5"]
    precision: str  # f32 | f16 | int8
    n_embd: int
    n_soft_tokens: int  # per image
    image_sizes: tuple[int, ...]  # square inputs the graph takes; the first is the default
    mean: float  # pixels are (x/255 − mean) / std
    std: float
    weights_bytes: int
    activation_bytes: dict[str, int]  # peak beyond the weights, by image size ("768": …)


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    origin: str  # file name, folder name or hub id, never an absolute path
    sha256: str | None = None
    licence: str = "Gemma Terms of Use (ai.google.dev/gemma/terms)"
    tool: str = ""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: str = FORMAT
    version: int = VERSION
    name: str
    family: Family
    instruct: bool  # has a chat template, i.e. was tuned to follow turns
    decoder: Decoder
    source: Source
    files: dict[str, File]
    chat_template: str | None = None
    # bos, eos, eot (<end_of_turn>), start_of_image, end_of_image, image_soft, start_of_audio, end_of_audio, audio_soft, pad …
    special_tokens: dict[str, int] = {}
    # row order of special_rows.npy [n, n_embd] float32: end_of_image, end_of_audio, audio_padding (gemma3n; see gemma3n's hard embeddings)
    special_rows: tuple[str, ...] = ()
    audio: AudioEncoder | None = None
    vision: VisionEncoder | None = None
    recipe: dict[str, str] = {}  # name, and the type of each group of tensors
    quality: dict[str, float | int | str] | None = None  # the receipt of `convert --check`


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Validate the bytes of a manifest. Raises BundleError with the field that is wrong; never anything else."""
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError, or UnicodeDecodeError inside a string
        raise BundleError(f"{MANIFEST} is not a manifest of this format ({error}); expected a JSON object with format and version") from None
    if head.format != FORMAT:
        raise BundleError(f"{MANIFEST} says format {head.format!r}, expected {FORMAT!r}")
    if head.version > VERSION:
        raise BundleError(f"the bundle has manifest version {head.version}, this edge-gemma reads up to {VERSION}; upgrade edge-gemma")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (ValueError, RecursionError) as error:  # msgspec.DecodeError, or UnicodeDecodeError inside a string
        raise BundleError(f"{MANIFEST} is damaged: {error}") from None
    _check(manifest)
    return manifest


class _Head(msgspec.Struct):
    format: str
    version: int


def _check(manifest: Manifest) -> None:
    """What the types cannot say: every path stays inside, every artifact is listed, every range lies inside its file."""
    for path in manifest.files:
        pure = PurePosixPath(path)
        if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or path == MANIFEST:
            raise BundleError(f"{MANIFEST} names the file {path!r}; paths must stay inside the bundle's folder")
    artifacts = [manifest.decoder.file] + [part.file for part in (manifest.audio, manifest.vision) if part]
    if manifest.special_rows:
        artifacts.append("special_rows.npy")
    for path in artifacts:
        if path not in manifest.files:
            raise BundleError(f"{MANIFEST} uses {path!r} but does not list its size and hash under files")
    for path, file in manifest.files.items():
        if file.size < 0 or len(file.sha256) != 64:
            raise BundleError(f"{MANIFEST} gives no usable size and sha256 for {path!r}")
    dimensions = manifest.decoder
    for name in ("n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "head_dim", "n_vocab", "n_ctx_train"):
        if not 0 < getattr(dimensions, name) <= 1 << 24:
            raise BundleError(f"{MANIFEST}: decoder.{name} is {getattr(dimensions, name)}, expected 1 … {1 << 24}")
    if not 0 <= dimensions.sliding_window <= 1 << 24 or not 0 < len(dimensions.kv_layers) <= dimensions.n_layer:
        raise BundleError(f"{MANIFEST}: decoder.sliding_window or kv_layers does not fit {dimensions.n_layer} layers")
    size = manifest.files[dimensions.file].size
    if not 0 < dimensions.header_bytes <= size:
        raise BundleError(f"{MANIFEST}: decoder.header_bytes is {dimensions.header_bytes} of a file of {size} bytes")
    for tensor in dimensions.tensors:
        if tensor.offset < 0 or tensor.nbytes < 0 or tensor.offset + tensor.nbytes > size:
            raise BundleError(f"{MANIFEST}: tensor {tensor.name!r} ends at byte {tensor.offset + tensor.nbytes} of a file of {size} bytes")


class Bundle:
    """A validated bundle folder.

    >>> bundle = Bundle.open(getfixture("tiny_bundle"))
    >>> bundle.manifest.family
    'gemma3'
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Bundle":
        """Read and validate the manifest, and check that each file is there with its size. Raises BundleError."""
        folder = Path(folder)
        path = folder / MANIFEST
        if not folder.exists():
            raise BundleError(f"no bundle at {folder}; `edge-gemma ls` lists the installed ones, `edge-gemma import FILE.gguf OUT` makes one")
        if not path.is_file():
            hint = " This looks like a GGUF: `edge-gemma import FILE.gguf OUT` makes a bundle of it." if folder.suffix == ".gguf" else ""
            raise BundleError(f"{folder} has no {MANIFEST}, so it is not a bundle (or its making was interrupted).{hint}")
        if (n := path.stat().st_size) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} has {n} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
        bundle = cls(folder, decode_manifest(path.read_bytes()))
        bundle.check_sizes()
        return bundle

    def path(self, name: str) -> Path:
        """The file ``name`` of the manifest. Refuses a link that leads out of the folder for anything but a hard link."""
        path = self.folder / name
        if path.is_symlink() and not _is_cache_link(path):
            target = path.resolve()
            if not target.is_relative_to(self.folder.resolve()):
                raise BundleError(f"{path} is a link to {target}, outside the bundle; copy the file in")
        return path

    @property
    def decoder_path(self) -> Path:
        return self.path(self.manifest.decoder.file)

    def check_sizes(self) -> None:
        for name, file in self.manifest.files.items():
            path = self.path(name)
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise BundleError(f"{self.folder} lacks {name}, which its manifest lists ({file.size} bytes); import or pull it again") from None
            if size != file.size:
                raise BundleError(f"{path} has {size} bytes, its manifest says {file.size}: truncated or replaced; import or pull it again")

    def check_header(self) -> None:
        """Hash the GGUF's header (a few MB, mostly vocabulary). Raises HashMismatch before llama.cpp reads a byte of it."""
        decoder = self.manifest.decoder
        with open(self.decoder_path, "rb") as file:
            found = hashlib.sha256(file.read(decoder.header_bytes)).hexdigest()
        if found != decoder.header_sha256:
            raise HashMismatch(f"the header of {self.decoder_path} was changed or damaged; import or pull it again")

    def verify(self, progress: Callable[[int], None] = lambda n_bytes: None) -> None:
        """Hash every file in full. Raises HashMismatch naming the first that differs; ``progress`` gets bytes as they are read."""
        for name, file in self.manifest.files.items():
            found = sha256_file(self.path(name), progress)
            if found != file.sha256:
                raise HashMismatch(f"{self.path(name)} has sha256 {found}, its manifest says {file.sha256}: the file was changed or damaged")

    def total_bytes(self) -> int:
        return sum(file.size for file in self.manifest.files.values())


def _is_cache_link(path: Path) -> bool:
    """The hub cache keeps blobs beside snapshots and links them; such a link stays inside one `models--…` folder."""
    for parent in path.absolute().parents:
        if parent.name.startswith("models--"):
            return path.resolve().is_relative_to(parent.resolve())
    return False


def sha256_file(path: Path, progress: Callable[[int], None] = lambda n_bytes: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def file_entry(path: Path, progress: Callable[[int], None] = lambda n_bytes: None) -> File:
    return File(size=path.stat().st_size, sha256=sha256_file(path, progress))


class BundleWriter:
    """Makes a bundle whole or not at all: a temporary sibling folder, manifest last, then one rename.

    >>> out = getfixture("tmp_path") / "new"
    >>> with BundleWriter(out) as writer:
    ...     _ = (writer.folder / "decoder.gguf").write_bytes(b"...")
    ...     # writer.commit(manifest) would publish it; without that call the folder vanishes again
    >>> out.exists()
    False
    """

    def __init__(self, out: str | os.PathLike, *, overwrite: bool = False):
        self.out = Path(out).absolute()
        if self.out.exists() and not overwrite:
            raise UsageError(f"{self.out} exists; choose another folder or pass --force to replace it")
        self.folder = self.out.parent / f".{self.out.name}.partial-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> "BundleWriter":
        for stale in self._stale():
            shutil.rmtree(stale, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            (self.folder / ".pid").write_text(str(os.getpid()))
        except OSError as error:
            raise RuntimeFailure(f"cannot write in {self.out.parent}: {error.strerror}") from error
        return self

    def _stale(self) -> Iterator[Path]:
        """Leftovers of a killed run for the same output whose process is gone."""
        for folder in self.out.parent.glob(f".{self.out.name}.partial-*"):
            try:
                os.kill(int((folder / ".pid").read_text()), 0)
            except PermissionError:
                continue  # somebody else's, alive
            except (OSError, ValueError):
                yield folder

    def commit(self, manifest: Manifest) -> Bundle:
        _check(manifest)
        (self.folder / ".pid").unlink(missing_ok=True)
        with open(self.folder / MANIFEST, "wb") as file:
            file.write(encode_manifest(manifest))
            file.flush()
            os.fsync(file.fileno())
        if self.out.exists():  # overwrite was asked for: the old one leaves in one step, too
            old = self.folder.with_name(self.folder.name.replace("partial", "old"))
            self.out.rename(old)
            self.folder.rename(self.out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.folder.rename(self.out)
        return Bundle.open(self.out)

    def __exit__(self, kind, error, traceback) -> bool:
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already after commit
        if isinstance(error, OSError):
            free = shutil.disk_usage(self.out.parent).free
            raise RuntimeFailure(f"cannot write {self.out}: {error.strerror or error} ({free / MiB:.0f} MiB free there); nothing was left behind") from error
        return False
