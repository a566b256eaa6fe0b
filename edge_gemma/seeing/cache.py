"""Soft tokens on disk, by the content they were made from: a picture that was seen
once costs nothing the next time.

In: a key (made of the content's hash and the encoder's). Out: rows ``[n, n_embd]``
float32, bitwise those that were stored. The folder never holds more than its cap:
the entries used longest ago go first. It does not know pictures, encoders or
models.

The cache is a convenience: an entry that is damaged, or a disk that is full, is
passed over and the encoder runs again.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from edge_gemma.errors import RuntimeFailure
from edge_gemma.files import cache_folder, written_whole
from edge_gemma.units import MiB

DEFAULT_CAP_BYTES = 256 * MiB  # 128 pictures at Gemma 3n's 256 × 2048 float32
_SUFFIX = ".soft.npy"
_MAX_HEADER_BYTES = 4096  # of a .npy file, generously


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/edge-gemma/soft-tokens``, or the same under ``~/.cache``."""
    return cache_folder("soft-tokens")


class SoftTokenCache:
    """Rows by key, at most ``cap_bytes`` of them (0: nothing is kept).

    >>> cache = SoftTokenCache(Path("soft-tokens"))
    >>> cache.put("a picture", np.ones((2, 3), np.float32))
    >>> cache.get("a picture", (2, 3)).sum(), cache.get("another", (2, 3)) is None
    (np.float32(6.0), True)
    """

    def __init__(self, folder: Path | None = None, cap_bytes: int = DEFAULT_CAP_BYTES):
        self.folder, self.cap_bytes = Path(folder or default_folder()), cap_bytes

    def get(self, key: str, shape: tuple[int, int]) -> np.ndarray | None:
        """The rows stored under ``key`` if they are whole and of that shape."""
        path = self._path(key)
        n_rows, width = shape
        try:
            if path.stat().st_size > 4 * n_rows * width + _MAX_HEADER_BYTES:
                return None
            rows = np.load(path, allow_pickle=False)
            os.utime(path)  # used now: the last to go
        except (OSError, ValueError, EOFError):
            return None
        if not isinstance(rows, np.ndarray):  # an archive of arrays
            return None
        if rows.shape != shape or rows.dtype != np.float32 or not np.isfinite(rows).all():
            return None
        return rows

    def put(self, key: str, rows: np.ndarray) -> None:
        """Keep ``rows [n, n_embd]``. A disk that refuses is no error."""
        if rows.nbytes > self.cap_bytes:
            return
        try:
            # what a picture shows concerns its owner alone
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with written_whole(self._path(key)) as file:
                np.save(file, np.ascontiguousarray(rows, np.float32), allow_pickle=False)
            self._shrink()
        except (OSError, RuntimeFailure):
            return

    def clear(self) -> int:
        """Forget everything. Returns the bytes that were freed."""
        return sum(_remove(path) for path in self._entries())

    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._entries())

    def _shrink(self) -> None:
        """Remove the entries used longest ago until the rest is within the cap."""
        found = [(path.stat(), path) for path in self._entries()]
        found.sort(key=lambda entry: entry[0].st_mtime_ns)
        excess = sum(stat.st_size for stat, _ in found) - self.cap_bytes
        for stat, path in found:
            if excess <= 0:
                break
            excess -= stat.st_size
            _remove(path)

    def _entries(self) -> list[Path]:
        return list(self.folder.glob(f"*{_SUFFIX}")) if self.folder.is_dir() else []

    def _path(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), digest_size=20).hexdigest()
        return self.folder / (name + _SUFFIX)


def _remove(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except OSError:  # another process was faster
        return 0
    return size
