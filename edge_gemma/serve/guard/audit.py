"""The audit log: who asked for what, when, and how it ended, without a word of it.

In: requests and answers. Out: JSON lines in a file that is rotated by its size. Texts are there as
hashes with a salt that lies beside the file: the same text has the same hash, and nobody without
the salt finds out which. A disk that is full stops no answer; it is said in the log.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import threading
from datetime import UTC, datetime
from hashlib import sha256
from logging.handlers import RotatingFileHandler
from pathlib import Path

import msgspec

from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import UsageError
from edge_gemma.serve.answer import Answer, Observer
from edge_gemma.serve.guard.content import texts_of
from edge_gemma.serve.visit import Visit
from edge_gemma.units import MiB

log = logging.getLogger("edge_gemma.serve")


class AuditLog(Observer):
    """A line per request in ``path``; beyond ``max_bytes`` the file becomes ``path.1`` and so on,
    of which ``n_kept`` stay. Raises UsageError where nothing can be written.
    """

    def __init__(self, path: Path, max_bytes: int = 10 * MiB, n_kept: int = 5):
        self._salt = _salt(path)
        try:
            self._file = _Rotating(path, maxBytes=max_bytes, backupCount=n_kept, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"the audit log {path} cannot be written: {error}") from None
        self._lock = threading.Lock()
        self._answers: dict[Visit, _Digests] = {}

    def generated(self, answer: Answer, chunk: Chunk) -> None:
        if answer.visit is None or answer.visit.ended_s is not None:
            return
        with self._lock:
            digests = self._answers.get(answer.visit)
            if digests is None:
                digests = self._answers[answer.visit] = _Digests(self._salt)
            digests.add(answer, chunk.text)

    def visited(self, visit: Visit) -> None:
        with self._lock:
            digests = self._answers.pop(visit, None)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": visit.id,
            "caller": visit.caller,
            "client": visit.client,
            "method": visit.method,
            "path": visit.path[:200],
            "status": visit.status,
            "seconds": round(visit.seconds, 4),
            "prompt_tokens": visit.prompt_tokens,
            "completion_tokens": visit.completion_tokens,
            "finish_reasons": visit.finish_reasons[:20],
            "rules": visit.verdicts[:20],
            "prompt_hash": digests.prompt.hexdigest() if digests else None,
            "answer_hash": digests.answer.hexdigest() if digests else None,
        }
        self._file.write(msgspec.json.encode(line).decode())

    def close(self) -> None:
        self._file.close()
        if self._file.n_lost:
            log.warning("the audit log misses its last %d lines", self._file.n_lost)


class _Digests:
    """Of all that one request asked and was answered."""

    def __init__(self, salt: bytes):
        self.prompt, self.answer = (hmac.new(salt, digestmod=sha256) for _ in range(2))
        self._seen: Answer | None = None

    def add(self, answer: Answer, text: str) -> None:
        if self._seen is not answer:
            self._seen = answer
            for asked in texts_of(answer.request):
                self.prompt.update(asked.encode("utf-8", "surrogatepass") + b"\0")
        self.answer.update(text.encode("utf-8", "surrogatepass"))


class _Rotating(RotatingFileHandler):
    """The standard library's rotation, for lines that are no log records of ours."""

    def __init__(self, path: Path, **options) -> None:
        super().__init__(path, **options)
        self.n_lost = 0

    def write(self, line: str) -> None:
        self.handle(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    def handleError(self, record: logging.LogRecord) -> None:
        """The disk refused: said once, until lines are written again."""
        with contextlib.suppress(OSError):
            super().close()  # what is buffered would be refused at each line, and at the end
        self.stream = None
        self.n_lost += 1
        if self.n_lost == 1:
            log.exception("the audit log cannot be written; answers go on without it")

    def emit(self, record: logging.LogRecord) -> None:
        n_lost = self.n_lost
        super().emit(record)
        if n_lost and self.n_lost == n_lost:
            log.warning("the audit log is written again; %d lines are missing", n_lost)
            self.n_lost = 0


def _salt(path: Path) -> bytes:
    """The salt beside the log, made the first time. Raises UsageError."""
    file = path.with_name(f"{path.name}.salt")
    try:
        if not file.exists():
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(secrets.token_hex(32).encode())
        salt = bytes.fromhex(file.read_text("ascii").strip())
    except (OSError, ValueError) as error:
        raise UsageError(f"the audit log's salt {file} cannot be used: {error}") from None
    if len(salt) < 16:
        raise UsageError(f"the audit log's salt {file} has {len(salt)} bytes; expected 32")
    return salt
