"""Many requests out of a file, answered together: OpenAI's batch lines without a server.

In: lines ``{"custom_id", "method", "url", "body"}``. Out: lines ``{"id", "custom_id", "response",
"error"}`` in the order of their ids. Each request goes through the server's own routes, so a body
means the same here and there, and what is refused is refused in the same words. A line is on disk
before the next is counted: whoever is killed loses what was being generated.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from edge_gemma.errors import UsageError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
MAX_LINE_BYTES = 32 << 20
_SHOWN = 5  # faults that are told before the rest is counted


class BatchLine(msgspec.Struct):
    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


@dataclass(frozen=True)
class Outcome:
    """One answered line: its id, its HTTP status."""

    custom_id: str
    status: int


def read_lines(path: Path) -> list[BatchLine]:
    """Every request of a file. Raises UsageError, which names the lines that are none."""
    lines: list[BatchLine] = []
    faults: list[str] = []
    seen: set[str] = set()
    try:
        with open(path, "rb") as file:
            for number, data in enumerate(file, 1):
                if not data.strip():
                    continue
                try:
                    line = _line(data)
                    if line.custom_id in seen:
                        raise ValueError(f"custom_id {line.custom_id[:60]!r} comes twice")
                    seen.add(line.custom_id)
                    lines.append(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as e:
                    faults.append(f"line {number}: {e}")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if faults:
        rest = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise UsageError(f"{path} is not a batch: {'; '.join(faults[:_SHOWN])}{rest}")
    if not lines:
        raise UsageError(f"{path} holds no request; expected lines with custom_id, url and body")
    return lines


def _line(data: bytes) -> BatchLine:
    if len(data) > MAX_LINE_BYTES:
        raise ValueError(f"{len(data)} bytes; at most {MAX_LINE_BYTES} are taken")
    line = msgspec.json.decode(data, type=BatchLine)
    if line.method != "POST" or line.url not in URLS:
        raise ValueError(f"{line.method} {line.url[:60]}; expected POST to {', '.join(URLS)}")
    if line.body.get("stream"):
        raise ValueError("stream is set; a batch has whole answers")
    return line


def answered(path: Path) -> dict[str, dict[str, Any]]:
    """custom_id → line of an output that is there already; a line that was cut off is none.
    Raises UsageError (another kind of file).
    """
    found: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return found
    for number, data in enumerate(path.read_bytes().split(b"\n"), 1):
        if not data.strip():
            continue
        try:
            line = json.loads(data)
            line["response"]["status_code"]
            found[line["custom_id"]] = line
        except (ValueError, KeyError, TypeError):
            if found or number == 1 and data.startswith(b'{"'):
                continue
            raise UsageError(
                f"{path} is there and is no output of a batch; name another file"
            ) from None
    return found


async def run(
    app: ASGIApp,
    lines: Sequence[BatchLine],
    out: Path,
    n_parallel: int,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> None:
    """Answer ``lines``, ``n_parallel`` at a time; each is appended to ``out`` as it ends."""
    waiting = iter(lines)
    with open(out, "ab") as file:
        if file.tell() and not _ends_with_newline(out):
            file.write(b"\n")  # behind a line that was cut off

        async def work() -> None:
            for line in waiting:
                status, body = await call(app, line.url, msgspec.json.encode(line.body))
                file.write(_answer(line, status, body) + b"\n")
                file.flush()
                os.fsync(file.fileno())
                on_done(Outcome(line.custom_id, status))

        async with asyncio.TaskGroup() as group:
            for _ in range(n_parallel):
                group.create_task(work())


def in_order(path: Path) -> Iterator[bytes]:
    """The lines of an output by custom_id; numbers in an id count as numbers."""
    found = answered(path)
    for custom_id in sorted(found, key=_natural):
        yield json.dumps(found[custom_id], ensure_ascii=False).encode() + b"\n"


def _natural(custom_id: str) -> list[tuple[bool, int, str]]:
    """
    >>> sorted(["b-10", "b-9", "a"], key=_natural)
    ['a', 'b-9', 'b-10']
    """
    pieces = re.split(r"(\d+)", custom_id)
    return [(p.isdigit(), int(p), "") if p.isdigit() else (False, 0, p) for p in pieces]


def _answer(line: BatchLine, status: int, body: bytes) -> bytes:
    value = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": line.custom_id,
        "response": {
            "status_code": status,
            "request_id": secrets.token_hex(8),
            "body": msgspec.Raw(body),
        },
        "error": None,
    }
    return msgspec.json.encode(value)


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


async def call(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes]:
    """POST to a route of ``app`` in this process → (status, body)."""
    status, pieces = 500, []
    sent = False
    never = asyncio.Event()

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await never.wait()  # the client stays
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.append(message.get("body", b""))

    headers = [
        (b"host", b"127.0.0.1"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return status, b"".join(pieces)
