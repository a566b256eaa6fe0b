"""What each caller used, kept over restarts.

In: requests and their tokens. Out: totals by name, in memory and in a JSON file that is written now
and then and at the end. A disk that is full stops no answer; it is said in the log.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.files import written_whole
from edge_gemma.serve.answer import Observer
from edge_gemma.serve.visit import Visit

log = logging.getLogger("edge_gemma.serve")
_SAVE_EVERY_S = 30.0


class Used(msgspec.Struct):
    """Totals of one caller. ``refused``: requests answered with 4xx or 5xx."""

    requests: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0  # from request to the end of its answer
    first: str = ""  # when, ISO 8601
    last: str = ""


def read_usage(path: Path) -> dict[str, Used]:
    """Raises UsageError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Used])
    except FileNotFoundError:
        raise UsageError(f"no usage file {path}") from None
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"the usage file {path} cannot be read: {error}") from None


class UsageBook(Observer):
    """Totals by name; with a ``path`` they are read from it, and written to it. Raises UsageError
    where the file cannot be read.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._used = read_usage(path) if path is not None and path.exists() else {}
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._saved_s, self._changed, self._failed = time.monotonic(), False, False

    def visited(self, visit: Visit) -> None:
        if visit.status == 401:
            return  # nobody's
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            used = self._used.setdefault(visit.caller, Used(first=now))
            used.requests += 1
            used.refused += (visit.status or 0) >= 400
            used.prompt_tokens += visit.prompt_tokens
            used.completion_tokens += visit.completion_tokens
            used.seconds = round(used.seconds + visit.seconds, 3)
            used.last = now
            self._changed = True
        if time.monotonic() - self._saved_s > _SAVE_EVERY_S:
            self._saved_s = time.monotonic()
            # an SD card may take a second for it, and answers must not wait
            threading.Thread(target=self.save, name="edge-gemma-usage", daemon=True).start()

    def of(self, caller: str) -> Used:
        with self._lock:
            return msgspec.structs.replace(self._used.get(caller, Used()))

    def save(self) -> None:
        """Write the file, if there is one and anything is new. Never raises."""
        with self._writing:
            self._save()

    def _save(self) -> None:
        with self._lock:
            if self._path is None or not self._changed:
                return
            data, self._changed = msgspec.json.encode(self._used), False
        try:
            with written_whole(self._path) as file:
                file.write(msgspec.json.format(data))
            self._failed = False
        except RuntimeFailure as error:
            self._changed = True
            if not self._failed:
                log.error("usage is not kept for now: %s", error)
            self._failed = True
