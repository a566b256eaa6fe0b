"""States of the KV cache on disk, so that a restarted assistant starts warm.

In: what stands at each position, and the engine's bytes. Out: the same bytes, or nothing. A file is
the magic line, the length of a header, the header (what the state belongs to, and the checksum of
what follows) under its own checksum, and the state. Nothing of it reaches an engine before all of
that agrees. A file appears whole or not at all, and its name says what it holds, so several
processes may share the folder.

The cache is a convenience: a file that is damaged is removed with a warning, and a disk that is
full is passed over.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edge_gemma.conversation.saved import CHECKSUM_BYTES, checksum
from edge_gemma.engines.engine import Buffer
from edge_gemma.errors import RuntimeFailure
from edge_gemma.files import cache_folder, pages, written_whole
from edge_gemma.plan.records import Settings
from edge_gemma.units import MiB

log = logging.getLogger("edge_gemma.prompt_cache")

MAGIC = b"edge-gemma prompt 1\n"
DEFAULT_CAP_BYTES = 512 * MiB
_NAME = re.compile(r"([0-9a-f]{16})-([0-9]{1,8})-([0-9a-f]{40})\.state")
_LENGTH_BYTES = 4
_MAX_WAITING = 2  # states that wait to be written: each is held in memory
_STALE_S = 3600.0  # a temporary file as old as that was left behind by a process that was killed


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    scope: str
    codes: bytes  # int64, little endian
    state_bytes: int
    state_checksum: bytes


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/edge-gemma/prompts``, or the same under ``~/.cache``."""
    return cache_folder("prompts")


def prompt_scope(
    identity: str, settings: Settings, engine: str, lora: Sequence[tuple[str | Path, float]] = ()
) -> str:
    """What a state depends on beside its prompt, as one hash: the decoder's file by its hash, its
    adapters, the engine's version, and the settings that decide what the engine computes and
    writes.
    """
    parts: list[object] = [identity, engine, settings.kv_type, settings.n_ubatch]
    parts += [settings.n_seq_max, settings.flash_attention, settings.repack, settings.n_gpu_layers]
    for path, scale in lora:
        with open(path, "rb") as file:
            parts += [hashlib.file_digest(file, "sha256").hexdigest(), float(scale)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class StateFile:
    """A state that lies on disk; nothing of it was read yet but its name."""

    path: Path
    scope: str
    codes: np.ndarray
    n_bytes: int  # of the file

    @property
    def n_positions(self) -> int:
        return len(self.codes)

    def read(self) -> memoryview | None:
        """The engine's bytes; None when the file is gone or damaged. A damaged one is removed."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                header = _read_header(file)
                self._check(header)
                state, done = pages(header.state_bytes), 0
                while done < len(state):
                    n = file.readinto(state[done:])
                    if not n:
                        raise _Damaged("it ends too early")
                    done += n
                if file.read(1):
                    raise _Damaged("it goes on behind its end")
            if checksum(state) != header.state_checksum:
                raise _Damaged("its checksum does not match")
            os.utime(self.path)  # used now: the last to go
        except _Damaged as damage:
            log.warning("the kept prompt %s is damaged (%s); it was removed", self.path, damage)
            _remove(self.path)
            return None
        except OSError:
            return None
        return state

    def _check(self, header: _Header) -> None:
        if header.scope != self.scope or header.codes != _packed(self.codes):
            raise _Damaged("it holds another prompt than its name says")
        if not 0 < header.state_bytes <= self.n_bytes:
            raise _Damaged(f"its state of {header.state_bytes} bytes is larger than the file")


class _Damaged(Exception):
    """A file of the cache that is not what was written."""


class PromptFiles:
    """The files of one ``scope`` (bundle, adapters and settings that states depend on) in a folder
    that never holds more than ``cap_bytes``: those used longest ago go first.
    """

    def __init__(self, scope: str, folder: Path | None = None, cap_bytes: int = DEFAULT_CAP_BYTES):
        self.scope, self.cap_bytes = scope, cap_bytes
        self.folder = Path(folder or default_folder())
        self._prefix = hashlib.blake2b(scope.encode(), digest_size=8).hexdigest()
        self._waiting: queue.Queue[tuple[np.ndarray, Buffer] | None] = queue.Queue(_MAX_WAITING)
        self._writer: threading.Thread | None = None

    def longest(self, codes: np.ndarray, *, longer_than: int = 0) -> StateFile | None:
        """The file that holds the longest beginning of ``codes``."""
        found = [
            (int(match[2]), match[3], entry)
            for entry in self._entries()
            if (match := _NAME.fullmatch(entry.name)) and match[1] == self._prefix
        ]
        for n, digest, path in sorted(found, key=lambda item: -item[0]):
            if longer_than < n <= len(codes) and _digest(codes[:n]) == digest:
                try:
                    return StateFile(path, self.scope, codes[:n], path.stat().st_size)
                except OSError:  # another process removed it
                    continue
        return None

    def put(self, codes: np.ndarray, state: Buffer) -> None:
        """Have a state written, in a thread of its own. What is there already is not written again;
        neither is what comes while two others still wait.
        """
        path = self._path(codes)
        if path.exists():
            try:
                os.utime(path)
            except OSError:
                pass
            return
        if len(state) > self.cap_bytes:
            return
        if self._writer is None:
            self._writer = threading.Thread(
                target=self._write_all, name="prompt-files", daemon=True
            )
            self._writer.start()
        try:
            self._waiting.put_nowait((codes, state))
        except queue.Full:
            log.info("a prompt of %d positions was not kept on disk: it is too slow", len(codes))

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            self.write(*item)
            del item

    def write(self, codes: np.ndarray, state: Buffer) -> None:
        """:meth:`put`, in this thread. A disk that refuses is no error."""
        header = _Header(self.scope, _packed(codes), len(state), checksum(state))
        packed = msgspec.msgpack.encode(header)
        try:
            # what was said concerns its owner alone
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with written_whole(self._path(codes)) as file:
                file.write(MAGIC + len(packed).to_bytes(_LENGTH_BYTES, "little"))
                file.write(checksum(packed) + packed)
                file.write(state)
            self._shrink()
        except (OSError, RuntimeFailure) as error:
            log.info("a prompt was not kept on disk: %s", error)

    def close(self) -> None:
        """Wait until everything is written."""
        if self._writer is not None:
            self._waiting.put(None)
            self._writer.join()
            self._writer = None

    def _path(self, codes: np.ndarray) -> Path:
        return self.folder / f"{self._prefix}-{len(codes)}-{_digest(codes)}.state"

    def _entries(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except OSError:
            return []

    def _shrink(self) -> None:
        """Remove the files used longest ago until the rest is within the cap, and what was left
        behind.
        """
        found = []
        for path in self._entries():
            try:
                status = path.stat()
            except OSError:
                continue
            if _NAME.fullmatch(path.name):
                found.append((status.st_mtime_ns, status.st_size, path))
            elif ".state.partial-" in path.name and time.time() - status.st_mtime > _STALE_S:
                _remove(path)
        excess = sum(size for _, size, _ in found) - self.cap_bytes
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            excess -= size
            _remove(path)


def _read_header(file) -> _Header:
    start = len(MAGIC)
    fixed = file.read(start + _LENGTH_BYTES + CHECKSUM_BYTES)
    if not fixed.startswith(MAGIC) or len(fixed) < start + _LENGTH_BYTES + CHECKSUM_BYTES:
        raise _Damaged("it does not begin as such a file does")
    n = int.from_bytes(fixed[start : start + _LENGTH_BYTES], "little")
    packed = file.read(n) if n <= 16 * MiB else b""
    if len(packed) != n or checksum(packed) != fixed[start + _LENGTH_BYTES :]:
        raise _Damaged("its header's checksum does not match")
    try:
        return msgspec.msgpack.decode(packed, type=_Header)
    except ValueError as error:
        raise _Damaged(str(error)) from None


def _packed(codes: np.ndarray) -> bytes:
    return codes.astype("<i8").tobytes()


def _digest(codes: np.ndarray) -> str:
    return hashlib.blake2b(_packed(codes), digest_size=20).hexdigest()


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:  # another process was faster
        pass
