"""What a sound file's container says about its length, and what to do where that is wrong.

In: an open binary file. Out: :class:`Container`, with the bytes of the header to read differently,
the pieces of a chained Ogg, and what is missing. Recorders that are switched off leave such files.
Nothing here decodes; it does not know libsndfile or FFmpeg.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MAX_CHUNKS = 10_000
_UNWRITTEN_SIZE = 0x7FFF_0000  # programs that stream write a size near 2 or 4 GiB
_NEVER_WRITTEN = (
    "its header does not say how long it is (the recorder was stopped?); read to its end"
)
_MIN_LEFT_S = 0.1  # fewer bytes behind the sound are not worth a note
_OGG_HEADER_BYTES = 27
_OGG_FIRST_PAGE, _OGG_LAST_PAGE = 2, 4  # flags: of a logical stream
_FLAC_HEADER_BYTES = 26  # up to the end of STREAMINFO's number of samples
_RESYNC_BYTES = 1 << 20
# the beginning of a stream: its name and a first block of metadata that has STREAMINFO's length
_FLAC_STREAM = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_FLAC_STREAM_BYTES = 8
_MP3_FIRST_FRAME_BYTES = 256  # as far as the Xing header is from the frame's start, and its fields
_XING = re.compile(rb"Xing|Info")


@dataclass(frozen=True)
class Container:
    """``patches`` are (offset, bytes) that stand in the header in place of the file's own;
    ``pieces`` the byte ranges to decode one after the other, none for the whole file.
    """

    patches: tuple[tuple[int, bytes], ...] = ()
    pieces: tuple[tuple[int, int], ...] = ()
    claimed_s: float | None = None  # length by the header, where the file ends before it
    is_cut: bool = False  # the file ends in the middle of something
    is_flac: bool = False
    length_is_unknown: bool = False
    notes: tuple[str, ...] = ()


def inspect(file: BinaryIO) -> Container:
    """What the container says. A file of another kind, or too broken to tell, has nothing to say.

    >>> inspect(io.BytesIO(b"no container")).patches
    ()
    """
    n_bytes = file.seek(0, io.SEEK_END)
    head = _at(file, 0, 12)
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:] == b"WAVE":
        return _wav(file, n_bytes)
    if head[:4] == b"OggS":
        return _ogg(file, n_bytes)
    if head[:4] == b".snd":
        return _au(file, n_bytes)
    start = id3_bytes(head)
    head = _at(file, start, 4)
    if head == b"fLaC":
        return _flac(file, start, n_bytes)
    if start and head in (b"RIFF", b"FORM", b"OggS"):
        # libsndfile passes over the tag, and over as many bytes of the end
        return Container(pieces=((start, n_bytes),))
    return _mp3(file, start, n_bytes)


def id3_bytes(head: bytes) -> int:
    """How many bytes an ID3v2 tag at the beginning of a file takes, from its first ten."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    size = 0
    for byte in head[6:10]:  # seven bits each
        size = size << 7 | byte & 0x7F
    return 10 + size


def _at(file: BinaryIO, offset: int, n_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(n_bytes)


# --- WAV ---


@dataclass
class _Wav:
    """Where the sizes of a WAV stand, and what they say."""

    riff_bytes: int
    block_bytes: int = 0  # of one sample of all channels
    bytes_per_s: int = 0
    ds64_at: int = 0  # RF64's 64-bit sizes: RIFF, data, samples
    data_at: int = 0  # the first byte of sound
    declared_bytes: int = 0
    size_fields: list[tuple[int, str]] = field(default_factory=list)

    def seconds(self, n_bytes: int) -> float:
        return n_bytes / self.bytes_per_s if self.bytes_per_s else 0.0


def _wav(file: BinaryIO, n_bytes: int) -> Container:
    wav = _read_wav(file, n_bytes)
    if wav is None:
        return Container()
    available = n_bytes - wav.data_at
    declared = wav.declared_bytes
    left = available - declared
    if left < 0:
        if declared >= _UNWRITTEN_SIZE:
            return _unwritten(wav, available, n_bytes)
        return Container(claimed_s=wav.seconds(declared), is_cut=True)
    if not left or _are_chunks(file, wav.data_at + declared, n_bytes):
        return Container()
    sizes_are_unwritten = not declared or wav.riff_bytes in (0, 0xFFFF_FFFF)
    if sizes_are_unwritten and not wav.ds64_at or not declared:
        return _unwritten(wav, available, n_bytes)
    if wav.seconds(left) < _MIN_LEFT_S or _at(file, n_bytes - 128, 3) == b"TAG":
        return Container()
    return Container(
        notes=(
            f"its header says {wav.seconds(declared):.1f} s; the {left} bytes behind "
            f"({wav.seconds(left):.1f} s, if they are sound) are not read",
        )
    )


def _read_wav(file: BinaryIO, n_bytes: int) -> _Wav | None:
    """The sizes up to the data chunk; None where there is none."""
    wav = _Wav(riff_bytes=struct.unpack("<I", _at(file, 4, 4))[0])
    position = 12
    for _ in range(_MAX_CHUNKS):
        head = _at(file, position, 8)
        if len(head) < 8:
            return None
        name, size = struct.unpack("<4sI", head)
        body_at = position + 8
        if name == b"ds64":
            wav.ds64_at = body_at
        elif name == b"fmt ":
            body = _at(file, body_at, 16)
            if len(body) == 16:
                _, _, _, wav.bytes_per_s, wav.block_bytes, _ = struct.unpack("<HHIIHH", body)
        elif name == b"data":
            wav.data_at, wav.declared_bytes = body_at, size
            if wav.ds64_at and size == 0xFFFF_FFFF:
                wav.declared_bytes = struct.unpack("<Q", _at(file, wav.ds64_at + 8, 8))[0]
            return wav
        position = body_at + size + (size & 1)
    return None


def _unwritten(wav: _Wav, available: int, n_bytes: int) -> Container:
    """The container of sizes that were never written: as if they were."""
    patches = [(wav.data_at - 4, struct.pack("<I", min(available, 0xFFFF_FFFF)))]
    if wav.ds64_at:
        n_samples = available // wav.block_bytes if wav.block_bytes else 0
        sizes = struct.pack("<QQQ", n_bytes - 8, available, n_samples)
        patches = [(wav.data_at - 4, b"\xff" * 4), (wav.ds64_at, sizes)]
    return Container(patches=tuple(patches), notes=(_NEVER_WRITTEN,))


def _are_chunks(file: BinaryIO, position: int, n_bytes: int) -> bool:
    """Whether named chunks follow each other from here to the end of the file."""
    for start in (position + (position & 1), position):  # with a padding byte, or without
        at = start
        for _ in range(_MAX_CHUNKS):
            if at >= n_bytes - 1:
                return True
            head = _at(file, at, 8)
            if len(head) < 8 or head[:4] == b"RIFF":  # another file behind this one
                break
            if not head[:4].isascii() or not head[:4].decode().isprintable():
                break
            size = struct.unpack("<I", head[4:])[0]
            at += 8 + size + (size & 1)
            if at > n_bytes + 1:
                break
    return False


# --- AU, FLAC ---


def _au(file: BinaryIO, n_bytes: int) -> Container:
    head = _at(file, 4, 8)
    if len(head) < 8:
        return Container()
    data_at, declared = struct.unpack(">II", head)
    if declared or n_bytes <= data_at:
        return Container()
    return Container(patches=((8, b"\xff" * 4),), notes=(_NEVER_WRITTEN,))


def _flac(file: BinaryIO, start: int, n_bytes: int) -> Container:
    """FLAC's STREAMINFO says 0 samples when the encoder could not go back to write the number.
    Files that were joined byte by byte are read one after the other.
    """
    head = _at(file, start, _FLAC_HEADER_BYTES)
    if len(head) < _FLAC_HEADER_BYTES:
        return Container()
    n_samples = int.from_bytes(head[21:26]) & 0xF_FFFF_FFFF  # 36 bits
    starts = [start, *_found(file, _FLAC_STREAM, start + _FLAC_HEADER_BYTES)]
    pieces = tuple(zip(starts, [*starts[1:], n_bytes], strict=True)) if len(starts) > 1 else ()
    return Container(pieces=pieces, is_flac=True, length_is_unknown=not n_samples)


def _found(file: BinaryIO, pattern: re.Pattern[bytes], position: int) -> Iterator[int]:
    """Where the pattern stands from ``position`` on."""
    file.seek(position)
    before = b""
    while block := file.read(_RESYNC_BYTES):
        data = before + block
        offset = position - len(before)
        yield from (offset + match.start() for match in pattern.finditer(data))
        before = data[-_FLAC_STREAM_BYTES + 1 :]
        position += len(block)


# --- MP3 ---


def _mp3(file: BinaryIO, start: int, n_bytes: int) -> Container:
    """Encoders write the stream's length into its first frame, and decoders stop there: an MP3
    that was joined to another is a piece of its own.
    """
    pieces: list[tuple[int, int]] = []
    while len(pieces) < _MAX_CHUNKS:
        length = _mp3_stream_bytes(_at(file, start, _MP3_FIRST_FRAME_BYTES))
        end = start + length if length else n_bytes
        behind = end + id3_bytes(_at(file, end, 10)) if end < n_bytes else n_bytes
        is_last = not _is_mp3_frame(_at(file, behind, 4))
        pieces.append((0 if not pieces else start, n_bytes if is_last else end))
        if is_last:
            break
        start = behind
    return Container(pieces=tuple(pieces) if len(pieces) > 1 else ())


def _is_mp3_frame(head: bytes) -> bool:
    return len(head) == 4 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2 and head[2] >> 4 < 15


def _mp3_stream_bytes(frame: bytes) -> int:
    """The stream's length as the Xing or Info header in its first frame says; 0 for none."""
    found = _XING.search(frame)
    if not _is_mp3_frame(frame[:4]) or found is None:
        return 0
    flags = int.from_bytes(frame[found.end() : found.end() + 4])
    at = found.end() + 4 + (4 if flags & 1 else 0)  # the number of frames comes first
    return int.from_bytes(frame[at : at + 4]) if flags & 2 else 0


# --- Ogg ---


def _ogg(file: BinaryIO, n_bytes: int) -> Container:
    """The chained streams of an Ogg file, and whether it ends inside a page."""
    starts: list[int] = []
    begins, is_ended, end = False, False, 0
    for page in _ogg_pages(file, n_bytes):
        if page.end > n_bytes:
            break
        is_first = bool(page.flags & _OGG_FIRST_PAGE)
        if is_first and not begins:
            starts.append(page.start)
        begins, is_ended, end = is_first, bool(page.flags & _OGG_LAST_PAGE), page.end
    is_cut = not is_ended or 0 < n_bytes - end < _RESYNC_BYTES
    if not starts or len(starts) < 2 and end == n_bytes:
        return Container(is_cut=is_cut)
    pieces = tuple(zip(starts, [*starts[1:], end], strict=True))
    return Container(pieces=pieces, is_cut=is_cut)


@dataclass(frozen=True)
class _OggPage:
    start: int
    end: int  # beyond the file's where the page is cut
    flags: int


def _ogg_pages(file: BinaryIO, n_bytes: int) -> Iterator[_OggPage]:
    """Each page; what lies between pages is skipped."""
    position = 0
    while position < n_bytes:
        head = _at(file, position, _OGG_HEADER_BYTES)
        if head[:4] != b"OggS":
            found = _at(file, position, _RESYNC_BYTES).find(b"OggS")
            if found < 0:
                return
            position += found
            continue
        lacing = file.read(head[26]) if len(head) == _OGG_HEADER_BYTES else b""
        is_whole = len(head) == _OGG_HEADER_BYTES and len(lacing) == head[26]
        n_page = _OGG_HEADER_BYTES + len(lacing) + sum(lacing) if is_whole else n_bytes
        flags = head[5] if len(head) > 5 else 0
        yield _OggPage(position, position + n_page, flags)
        position += n_page


# --- a file as the container says it is ---


class Window(io.RawIOBase):
    """The bytes ``start … end`` of a file, read-only, with patches in place of its own bytes.

    It has no name, so that no decoder judges the file by its ending.
    """

    def __init__(
        self,
        file: BinaryIO,
        start: int = 0,
        end: int | None = None,
        patches: tuple[tuple[int, bytes], ...] = (),
    ):
        super().__init__()
        self._file, self._start, self._patches = file, start, patches
        self._n_bytes = (file.seek(0, io.SEEK_END) if end is None else end) - start
        self._position = 0

    @property
    def at_end(self) -> bool:
        """Whether everything was read."""
        return self._position >= self._n_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._n_bytes}
        self._position = max(0, origin[whence] + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        left = max(0, self._n_bytes - self._position)
        at = self._start + self._position
        self._file.seek(at)
        data = self._file.read(min(len(view), left))
        for offset, patch in self._patches:
            data = _patched(data, at, offset, patch)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _patched(data: bytes, at: int, offset: int, patch: bytes) -> bytes:
    """``data``, read at ``at``, with the part of ``patch`` at ``offset`` that it covers."""
    first, last = max(at, offset), min(at + len(data), offset + len(patch))
    if first >= last:
        return data
    return data[: first - at] + patch[first - offset : last - offset] + data[last - at :]
