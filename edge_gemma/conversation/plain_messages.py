"""Messages as plain data that a file can hold, and back.

In: messages whose media are encoded. Out: text, or kind, shape and float32 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from edge_gemma.messages import Audio, FunctionCall, Image, Message, Part, TextItem
from edge_gemma.spans import Rows

# text, or kind, shape and float32 bytes; or kind, (0, 0) and JSON
PlainPart = str | tuple[str, tuple[int, int], bytes]
PlainMessage = tuple[str, list[PlainPart]]
_KINDS: dict[str, Callable[[np.ndarray], Part]] = {
    "image": lambda rows: Image(rows=rows),
    "audio": lambda rows: Audio(rows=rows),
    "rows": lambda rows: Rows(rows),
    "block": lambda rows: Rows(rows, causal=False),
}


def plain_messages(messages: Sequence[Message]) -> list[PlainMessage]:
    return [(message.role, _content_out(message)) for message in messages]


def messages_of(plain: Sequence[PlainMessage]) -> list[Message]:
    """Raises ValueError, KeyError for what :func:`plain_messages` did not make."""
    return [Message(role, _content_in(parts)) for role, parts in plain]


def _content_out(message: Message) -> list[PlainPart]:
    if isinstance(message.content, str):
        return [message.content]
    return [_part_out(part) for part in message.content]


def _part_out(part: Part) -> PlainPart:
    if isinstance(part, FunctionCall):
        return "call", (0, 0), part.to_json().encode()
    if isinstance(part, TextItem):
        return "item", (0, 0), msgspec.json.encode((str(part), dict(part.fields)))
    if isinstance(part, str):
        return part
    if isinstance(part, Rows):
        kind, rows = "rows" if part.causal else "block", part.rows
    else:
        assert part.rows is not None  # media are encoded when they are sent
        kind, rows = part.kind, np.ascontiguousarray(part.rows, np.float32)
    return kind, (rows.shape[0], rows.shape[1]), rows.tobytes()


def _content_in(parts: list[PlainPart]) -> str | list[Part]:
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return [_part_in(part) for part in parts]


def _part_in(part: PlainPart) -> Part:
    if isinstance(part, str):
        return part
    kind, shape, data = part
    if kind == "call":
        call = msgspec.json.decode(data)
        return FunctionCall(call["name"], call["parameters"])
    if kind == "item":
        text, fields = msgspec.json.decode(data)
        return TextItem(text, fields)
    return _KINDS[kind](np.frombuffer(data, np.float32).reshape(shape))
