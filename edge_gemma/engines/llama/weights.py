"""Open a bundle's decoder as planned, then let go of what is cold.

In: a bundle and an accepted plan. Out: :class:`Weights`, a decoder whose cold pages were given
back, and stay so.

llama.cpp maps the file with MAP_POPULATE, so every page is resident before the first progress
callback; and it copies the weights it repacks, leaving the originals mapped. The mapping is shared,
read-only and file-backed, so dropping pages of it is always safe: a later read faults them in
again. Three moments (figures in docs/measure.md):

- where this process may lock memory, the map is made without its pages (:func:`_lazy_mapping`);
  elsewhere, at the first progress callback, the cold ranges go, pages and page cache;
- while weights are copied, the originals go behind the copying, so that the copies never stand
  beside all of them;
- after each turn the rows that were looked up go (the page cache keeps them, so a return is cheap).

Where the plan hears first, every mapped weight goes while an encoder is open
(:meth:`Weights.rest`), and comes back in one sweep before the decoder is used again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_gemma.bundles.description import Description
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.gguf import TYPE_IDS
from edge_gemma.bundles.manifest import (
    Manifest,
    Tensor,
    end_tokens,
    is_loaded_to_multiply,
)
from edge_gemma.engines.llama.decoder import Decoder
from edge_gemma.engines.llama.library import repacks, version
from edge_gemma.engines.llama.rescoring import rescorer_of
from edge_gemma.errors import BundleError
from edge_gemma.machine.footprint import (
    MADV_DONTNEED,
    MADV_POPULATE_READ,
    MADV_RANDOM,
    MADV_WILLNEED,
    PAGE_BYTES,
    madvise,
    mapping_of,
    trim_heap,
)
from edge_gemma.plan.records import Plan

_MCL_FUTURE, _MCL_ONFAULT = 2, 4  # mlockall(2)
_STEP = 0.02  # of the load, between two releases of what was copied


def repacked_here(tensor: Tensor) -> bool:
    """Whether this machine's llama.cpp copies a weight of that type and shape when it may repack:
    what ``make_plan`` asks for device ``auto``, of the weights that are loaded to be multiplied.
    """
    return len(tensor.shape) == 2 and repacks(TYPE_IDS[tensor.type], *tensor.shape)


def media_tokens(manifest: Manifest) -> tuple[int, ...]:
    """Ids that stand for pictures and sound in a prompt and never belong into an answer.

    GGUFs list some of them as ordinary user-defined tokens, so llama.cpp would print them.
    """
    names = ("image", "audio")
    tokens = manifest.special_tokens.items()
    return tuple(sorted(id for name, id in tokens if any(medium in name for medium in names)))


def overrides(known: Manifest | Description) -> dict[str, int]:
    """What is known of a decoder and its file may leave out or say wrongly, by GGUF key."""
    family, tokens = known.family, known.special_tokens
    values = {
        f"{family}.attention.key_length": known.decoder.head_dim,
        f"{family}.attention.value_length": known.decoder.head_dim,
    }
    keys = {
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "end_of_turn": "eot_token_id",
        "unk": "unknown_token_id",
        "pad": "padding_token_id",
    }
    ids = {f"tokenizer.ggml.{keys[name]}": tokens[name] for name in keys if name in tokens}
    return values | ids


class Weights:
    """A loaded decoder and its cold ranges. A context manager.

    ``on_progress(fraction)`` may return False to stop (KeyboardInterrupt). Raises BundleError,
    HashMismatch.
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        *,
        lora: Sequence[tuple[str | Path, float]] = (),
        on_progress: Callable[[float], bool | None] | None = None,
    ):
        bundle.check_header()
        self.path = bundle.decoder_path
        manifest = bundle.manifest
        self.identity = manifest.files[manifest.decoder.file].sha256
        tensors = manifest.decoder.tensors
        copies = plan.settings.repack and plan.settings.n_gpu_layers == 0
        # Weights that are never read are copied as well; the loader does not know that they are not
        loaded = [t for t in tensors if copies and is_loaded_to_multiply(manifest, t)]
        repacked = {t.name for t in loaded if repacked_here(t)}
        tied = {
            "token_embd.weight"
        } & repacked  # its copy is the head; the mapped original is only looked up from now on
        self._lookups = [t for t in tensors if t.use == "lookup" or t.name in tied]
        self._cold = _merge((t.offset, t.nbytes) for t in tensors if t.use != "matmul")
        self._copied = _merge((t.offset, t.nbytes) for t in tensors if t.name in repacked)
        self._releasable = sys.platform.startswith("linux")
        self._addresses: list[tuple[int, int]] = []
        self._page_starts: dict[str, int] = {}

        released_at = -1.0

        def progress(fraction: float) -> bool:
            nonlocal released_at
            if self._releasable and fraction - released_at >= _STEP:
                if released_at < 0:
                    mapped.close()  # the file is mapped by now, and nothing was copied yet
                    self._release(self._cold, cache_too=True)
                self._release(self._copied)
                released_at = fraction
            return on_progress is None or on_progress(fraction) is not False

        with ExitStack() as mapped:
            if self._releasable:
                mapped.enter_context(_lazy_mapping(self.path.stat().st_size))
            self.decoder = Decoder(
                self.path,
                plan.settings,
                lora=lora,
                suppressed=media_tokens(manifest),
                ends=end_tokens(manifest),
                controls=[*manifest.special_tokens.values()],
                overrides=overrides(manifest),
                on_progress=progress,
            )
        if plan.settings.rescore:
            self.decoder.rescorer = rescorer_of(self.path, manifest.family, manifest.decoder)
        self._hot = _merge(
            (t.offset, t.nbytes) for t in tensors if t.use == "matmul" and t.name not in repacked
        )
        self._on_wake: Callable[[], None] | None = None  # None: nothing rests
        if self._releasable:
            self._settle()
            if plan.settings.encoders == "hear first":
                self.rest(lambda: None)  # a turn most likely begins with an encoder
            else:
                self._populate()

    def _settle(self) -> None:
        """After the load: the last release, and the advice that lookups are scattered."""
        self._release(self._cold, cache_too=True)
        self._release(self._copied, cache_too=True)
        lookups = [(t.offset, t.nbytes) for t in self._lookups]
        for start, length in self._mapped(lookups):
            madvise(start, length, MADV_RANDOM)
        self._addresses = list(self._mapped(_merge(lookups)))
        trim_heap()

    def _populate(self) -> None:
        """Every hot page in place."""
        for start, length in self._mapped(self._hot):
            madvise(start, length, MADV_POPULATE_READ)

    def trim(self) -> None:
        """Give back the rows that were looked up since the last call; the page cache keeps them."""
        for start, length in self._addresses:
            madvise(start, length, MADV_DONTNEED)
        if self.decoder.rescorer:
            self.decoder.rescorer.trim()

    def rest(self, on_wake: Callable[[], None]) -> None:
        """Let go of every mapped weight until :meth:`wake`, which calls ``on_wake`` first. The page
        cache keeps what there is room for, so only the rest is read again.
        """
        self._on_wake = on_wake
        if self._releasable:
            self.trim()
            self._release(self._hot)

    def wake(self) -> None:
        """Bring back what rests, before anything is decoded."""
        if self._on_wake is None:
            return
        on_wake, self._on_wake = self._on_wake, None
        on_wake()
        if self._releasable:
            self._populate()

    @property
    def version(self) -> str:
        return version()

    def prefetch(self, ids: Iterable[int]) -> None:
        """Ask the kernel for the rows of these tokens at once: on an SD card that saves a fault,
        and a wait, per token.
        """
        if not self._addresses:
            return
        for tensor in self._lookups:
            row = tensor.nbytes // tensor.shape[1]
            if not (base := self._base(tensor)):
                continue
            for token in set(ids):
                first = (base + token * row) // PAGE_BYTES * PAGE_BYTES
                madvise(first, base + (token + 1) * row - first, MADV_WILLNEED)

    def _base(self, tensor: Tensor) -> int:
        """The address of a lookup tensor's first byte; 0 when it is not mapped in one piece."""
        if tensor.name not in self._page_starts:
            last = tensor.offset + tensor.nbytes
            # MADV_RANDOM split the mapping at page borders, so the pieces are put together again by
            # their offsets
            pieces = mapping_of(self.path)
            start = next(
                (
                    m.start + tensor.offset - m.offset
                    for m in pieces
                    if m.offset <= tensor.offset < m.offset + m.end - m.start
                ),
                0,
            )
            end = next(
                (
                    m.start + last - m.offset
                    for m in pieces
                    if m.offset < last <= m.offset + m.end - m.start
                ),
                0,
            )
            self._page_starts[tensor.name] = start if end - start == tensor.nbytes else 0
        return self._page_starts[tensor.name]

    def _mapped(self, ranges: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
        """Byte ranges of the file → page-aligned (address, length), rounded inwards.

        Read from the kernel each time: llama.cpp unmaps the ends of the file when it is done, and
        another mapping may live there then.
        """
        pieces = mapping_of(self.path)
        for offset, nbytes in ranges:
            for piece in pieces:
                first = max(piece.start, piece.start + offset - piece.offset)
                last = min(piece.end, piece.start + offset + nbytes - piece.offset)
                first, last = -(-first // PAGE_BYTES) * PAGE_BYTES, last // PAGE_BYTES * PAGE_BYTES
                if first < last:
                    yield first, last - first

    def _release(self, ranges: list[tuple[int, int]], cache_too: bool = False) -> None:
        for start, length in self._mapped(ranges):
            madvise(start, length, MADV_DONTNEED)
        if cache_too and ranges:
            try:
                with open(self.path, "rb") as file:
                    for offset, nbytes in ranges:
                        os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise BundleError(
                    f"{self.path} went away while it was loaded: {error.strerror}"
                ) from error

    def close(self) -> None:
        self._addresses = []  # the addresses mean nothing once the mapping is gone
        self.decoder.close()
        if self.decoder.rescorer:
            self.decoder.rescorer.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _merge(ranges: Iterable[tuple[int, int]], gap: int = 64) -> list[tuple[int, int]]:
    """Neighbouring (offset, nbytes) as one; alignment padding between tensors belongs to nobody and
    goes with them.
    """
    merged: list[list[int]] = []
    for offset, nbytes in sorted(ranges):
        if merged and offset - (merged[-1][0] + merged[-1][1]) < gap:
            merged[-1][1] = offset + nbytes - merged[-1][0]
        else:
            merged.append([offset, nbytes])
    return [(offset, nbytes) for offset, nbytes in merged]


@contextmanager
def _lazy_mapping(nbytes: int) -> Iterator[None]:
    """Make MAP_POPULATE populate nothing: a mapping that is locked on fault is left empty
    (mm/gup.c, populate_vma_page_range).

    Needs CAP_IPC_LOCK or a memlock limit above the file's size (`LimitMEMLOCK=infinity` in a
    systemd unit). Where that is missing nothing changes. The lock is taken back at once; it never
    holds a page in memory.
    """
    assert _libc is not None
    if _libc.mlockall(_MCL_FUTURE | _MCL_ONFAULT) != 0:
        yield
        return
    try:
        try:  # would the loader's mmap be refused now?
            mmap.mmap(-1, nbytes, prot=mmap.PROT_READ).close()
        except OSError:
            _libc.munlockall()
        yield
    finally:
        _libc.munlockall()


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
