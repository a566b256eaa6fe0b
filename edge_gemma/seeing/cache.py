"""Soft tokens on disk, by the content they were made from: a picture that was seen once costs
nothing the next time.

In: a key (made of the content's hash and the encoder's). Out: rows ``[n, n_embd]`` float32, bitwise
those that were stored. The folder never holds more than its cap: the entries used longest ago go
first. What this room does not know: pictures, encoders, models.

The cache is a convenience: an entry that is damaged, or a disk that is full, is passed over and the
encoder runs again.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import numpy as np

from edge_gemma.units import MiB

DEFAULT_CAP_BYTES = 256 * MiB  # 128 pictures at Gemma 3n's 256 × 2048 float32
_SUFFIX = ".soft.npy"


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/edge-gemma/soft-tokens``, or the same under ``~/.cache``."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "edge-gemma"
        / "soft-tokens"
    )


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
        try:
            if path.stat().st_size > shape[0] * shape[1] * 4 + 4096:
                return None
            rows = np.load(path, allow_pickle=False)
            os.utime(path)  # used now: the last to go
        except (OSError, ValueError, EOFError):
            return None
        if (
            not isinstance(rows, np.ndarray)
            or rows.shape != shape
            or rows.dtype != np.float32
            or not np.isfinite(rows).all()
        ):
            return None
        return rows

    def put(self, key: str, rows: np.ndarray) -> None:
        if rows.nbytes > self.cap_bytes:
            return
        path = self._path(key)
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            self.folder.mkdir(
                parents=True, exist_ok=True, mode=0o700
            )  # what a picture shows is its owner's affair
            with open(partial, "wb") as file:
                np.save(file, np.ascontiguousarray(rows, np.float32), allow_pickle=False)
            partial.replace(path)
            self._shrink()
        except OSError:
            _remove(partial)

    def clear(self) -> int:
        """Forget everything. Returns the bytes that were freed."""
        return sum(_remove(path) for path in self._entries())

    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._entries())

    def _shrink(self) -> None:
        entries = sorted(
            ((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._entries()),
            key=lambda entry: entry[0],
        )
        excess = sum(size for _, size, _ in entries) - self.cap_bytes
        for _, size, path in entries:
            if excess <= 0:
                break
            excess -= size
            _remove(path)

    def _entries(self) -> list[Path]:
        return list(self.folder.glob(f"*{_SUFFIX}")) if self.folder.is_dir() else []

    def _path(self, key: str) -> Path:
        return self.folder / (hashlib.blake2b(key.encode(), digest_size=20).hexdigest() + _SUFFIX)


def _remove(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
        return size
    except OSError:  # another process was faster
        return 0
