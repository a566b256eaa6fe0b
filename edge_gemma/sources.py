"""What a person names: paths as they are typed, files that must be there, data URIs.

In: text, a path or an open file. Out: a path that can be opened, or bytes whose number was checked.
It does not know what the bytes mean: pictures, sounds or bundles.
"""

from __future__ import annotations

import binascii
import os
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeGuard, runtime_checkable
from urllib.parse import unquote, unquote_to_bytes

from edge_gemma.errors import MediaError, UsageError
from edge_gemma.units import format_bytes

_SHOWN_CHARACTERS = 120  # of a name in a message
_LONGEST_PATH = 4096  # characters; Linux takes no more
_ADDRESS = re.compile(r"[a-z][a-z0-9+]+:/")  # Path folds // into /
_FILE_URI = re.compile(r"file:/+(?:localhost/)?", re.IGNORECASE)
_DATA = re.compile(r"\s*data:", re.IGNORECASE)
_MAX_HEADER_CHARACTERS = 1000  # of a data URI, in front of the comma
_ANY_CONTENT = ("", "application/octet-stream")  # types that say nothing
_QUOTES = "'\""


# --- paths as they are typed ---


def exists(text: str) -> bool:
    """Whether there is a file, folder or device of that name; False for what is no path at all.

    >>> exists("."), exists("x" * 10_000)
    (True, False)
    """
    try:
        return bool(text) and os.path.exists(text)
    except ValueError:  # a NUL character
        return False


def typed(text: str) -> str:
    """A path as somebody typed it → the path that is meant.

    What exists as written is taken as written. Else ``~`` is the home folder, a ``file:`` address
    is its path, and quotes and backslashes are read as a shell reads them where that gives one
    word. Names, data URIs and addresses stay as they are.

    >>> typed("gemma-3-270m"), typed("'my photo.png'")
    ('gemma-3-270m', 'my photo.png')
    """
    if exists(text) or is_data_uri(text):
        return text
    plain = text.strip()
    if _FILE_URI.match(plain):
        return "/" + unquote(_FILE_URI.sub("", plain, count=1))
    if not any(mark in plain for mark in "'\"\\"):
        return os.path.expanduser(plain) if plain.startswith("~") else text
    word = _one_word(plain)
    if word is None:
        return text
    word = os.path.expanduser(word)
    is_quoted = len(plain) > 1 and plain[0] in _QUOTES and plain[-1] == plain[0]
    if is_quoted or exists(word):
        return word
    return os.path.expanduser(plain) if plain.startswith("~") else text


def _one_word(text: str) -> str | None:
    """The text as one word of a shell, or None where it is none or several."""
    if len(text) > _LONGEST_PATH:
        return None
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that does not end
        return None
    return words[0] if len(words) == 1 else None


def typed_line(text: str) -> str:
    """The rest of a line that is one path: as :func:`typed`, and what does not exist yet may be
    escaped, too.

    >>> typed_line(r"my\\ chat.json"), typed_line("my chat.json")
    ('my chat.json', 'my chat.json')
    """
    text = text.strip()
    meant = typed(text)
    if exists(meant) or is_data_uri(text) or _FILE_URI.match(text):
        return meant
    word = _one_word(text)
    return meant if word is None else os.path.expanduser(word)


def first_path(line: str) -> tuple[str, str]:
    """``PATH words`` → (path, words). The longest beginning that is a file ends where the words
    begin, so that spaces need no quotes; else the first word as a shell reads it is the path.

    >>> first_path("'my photo.png' what's this?")
    ('my photo.png', "what's this?")
    """
    line = line.strip()
    if not is_data_uri(line):
        for end in _word_ends(line):
            path = os.path.expanduser(line[:end])
            if exists(path) and not os.path.isdir(path):
                return path, line[end:].strip()
    end = _shell_word_end(line)
    return typed_line(line[:end]), line[end:].strip()


def _word_ends(line: str) -> list[int]:
    """Where words end, the last one first."""
    ends = [match.start() for match in re.finditer(r"\s", line)]
    return [end for end in [len(line), *reversed(ends)] if end <= _LONGEST_PATH]


def _shell_word_end(line: str) -> int:
    """Where the first word ends when quotes and backslashes count; without regard to them where a
    quote does not end.
    """
    quote, escaped = "", False
    for position, character in enumerate(line):
        if escaped:
            escaped = False
        elif character == "\\" and quote != "'":
            escaped = True
        elif character in _QUOTES and quote in ("", character):
            quote = "" if quote else character
        elif character.isspace() and not quote:
            return position
    return len(line.split(maxsplit=1)[0]) if quote and line else len(line)


# --- files that must be there ---


def local_file(source: str | os.PathLike[str], what: str) -> Path:
    """``source`` as the path of a regular file that is there, readable and not empty; ``what``
    (image, video, sound) is for the message when it is not. Raises MediaError.
    """
    path = _local_path(source)
    name = shown(str(path))
    if _ADDRESS.match(str(path)):
        raise MediaError(
            f"{shown(str(source))} is a network address; download it first and name the file"
        )
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise MediaError(f"there is no {what} file at {name}") from None
    except OSError as error:
        raise MediaError(f"cannot read {name}: {error.strerror}") from None
    _check_kind(status.st_mode, name, what)
    if not status.st_size:
        raise MediaError(f"{name} is empty (0 bytes)")
    try:
        open(path, "rb").close()
    except OSError as error:
        raise MediaError(f"cannot read {name}: {error.strerror}") from None
    return path


def _local_path(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    return Path(typed(str(source))) if _FILE_URI.match(str(path)) else path


def _check_kind(mode: int, name: str, what: str) -> None:
    """Raise MediaError for what is no regular file: reading it might never end."""
    if stat.S_ISDIR(mode):
        example = f", for instance {name}/*.jpg" if what == "image" else ""
        raise MediaError(f"{name} is a directory; name the {what} files in it{example}")
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    kind = kinds.get(stat.S_IFMT(mode), "device")
    raise MediaError(
        f"{name} is a {kind}, not a file; write what it gives into a {what} file first"
    )


def shown(name: str) -> str:
    """A name as messages show it: of a long one the beginning."""
    name = name.replace("\n", " ")
    return name if len(name) <= _SHOWN_CHARACTERS else name[:_SHOWN_CHARACTERS] + "…"


@runtime_checkable
class BinarySource(Protocol):
    """An open file: BytesIO, or what open(path, "rb") gives."""

    def read(self, n_bytes: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...


# what a file may be given as: its path, a data URI, its bytes, or opened
FileSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinarySource


def is_file_source(source: object) -> TypeGuard[FileSource]:
    """Whether this names or holds a file, rather than samples or pixels.

    >>> is_file_source("clip.wav"), is_file_source([0.0, 0.5])
    (True, False)
    """
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, BinarySource)
    return isinstance(source, kinds)


def read_all(file: BinarySource, max_bytes: int, what: str) -> bytes:
    """The bytes of an open file from its beginning, at most one more than ``max_bytes``. Raises
    UsageError for a file opened as text.
    """
    file.seek(0)
    data = file.read(max_bytes + 1)
    if not isinstance(data, bytes):
        raise UsageError(f"a file with {what} data must be opened for bytes: open(path, 'rb')")
    return data


# --- data URIs ---


def is_data_uri(source: object) -> bool:
    """Whether this is ``data:…`` (RFC 2397) rather than a path.

    >>> is_data_uri("data:image/png;base64,iVBORw0KGgo="), is_data_uri("data.png")
    (True, False)
    """
    return isinstance(source, str) and _DATA.match(source) is not None


@dataclass(frozen=True)
class Wanted:
    """What a data URI must hold: ``what`` for messages, the types it may name, and how much."""

    what: str
    types: tuple[str, ...]  # beginnings of media types, as image/
    max_bytes: int


def data_uri_bytes(uri: str, wanted: Wanted) -> bytes:
    """The bytes of ``data:TYPE;base64,…``, or percent-encoded without ``;base64``.

    Its size is checked before anything is decoded. Raises MediaError.

    >>> data_uri_bytes("data:image/gif;base64,R0lGODlh", Wanted("image", ("image/",), 100))
    b'GIF89a'
    """
    comma = uri.find(",", 0, _MAX_HEADER_CHARACTERS)
    if comma < 0:
        raise MediaError(
            f"{shown(uri)} is a data URI without a comma; expected data:{wanted.types[0]}…;base64,…"
        )
    media_type, *parameters = _DATA.sub("", uri[:comma], count=1).lower().split(";")
    media_type = media_type.strip()
    fits = media_type in _ANY_CONTENT or media_type.startswith(wanted.types)
    if not fits:
        raise MediaError(
            f"the data URI holds {shown(media_type)}; expected {' or '.join(wanted.types)}…, "
            f"{'an' if wanted.what[0] in 'aeiou' else 'a'} {wanted.what}"
        )
    is_base64 = any(parameter.strip() == "base64" for parameter in parameters)
    n_characters = len(uri) - comma - 1
    n_least_bytes = n_characters // 3 if not is_base64 else n_characters * 3 // 4
    # percent-encoded text may be three times as long as what it holds, base64 also that
    if n_least_bytes > 3 * wanted.max_bytes:
        raise _too_large(n_least_bytes, wanted)
    body = uri[comma + 1 :]
    data = _from_base64(body, wanted) if is_base64 else unquote_to_bytes(body)
    if not data:
        raise MediaError(f"the data URI holds no {wanted.what}: it has 0 bytes")
    if len(data) > wanted.max_bytes:
        raise _too_large(len(data), wanted)
    return data


def _from_base64(text: str, wanted: Wanted) -> bytes:
    """Base64 of the usual or the URL alphabet, with or without padding and line breaks."""
    if "%" in text:
        text = unquote(text)
    text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    n_bytes = len(text) * 3 // 4
    if n_bytes > wanted.max_bytes:
        raise _too_large(n_bytes, wanted)
    wrong = re.search(r"[^A-Za-z0-9+/]", text)
    if wrong is not None:
        raise MediaError(
            f"the data URI is not base64: {wrong[0]!r} at character {wrong.start()} behind the "
            "comma; it was damaged or cut when it was copied"
        )
    try:
        return binascii.a2b_base64(text + "=" * (-len(text) % 4))
    except binascii.Error:
        raise MediaError(
            f"the data URI is not base64: it has {len(text)} characters, and no number of bytes "
            "gives so many; it was cut when it was copied"
        ) from None


def _too_large(n_bytes: int, wanted: Wanted) -> MediaError:
    return MediaError(
        f"the data URI holds {format_bytes(n_bytes)}; {wanted.what} data up to "
        f"{format_bytes(wanted.max_bytes)} are read"
    )
