"""What an assistant knows of itself after a restart: how it ended, and the conversation.

In: a folder that timers.py holds the lock of. Out: life.json and chat.bin, each written whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_gemma.assistant.state import made_folder, read_state, write_state
from edge_gemma.conversation.plain_messages import PlainMessage, messages_of, plain_messages
from edge_gemma.conversation.saved import CHECKSUM_BYTES, checksum
from edge_gemma.errors import UsageError
from edge_gemma.files import written_whole
from edge_gemma.messages import Message

_MAGIC = b"edge-gemma assistant's chat 1\n"
MAX_CHAT_BYTES = 16 << 20  # older turns are left out


class Record(msgspec.Struct, frozen=True):
    """life.json. Times are Unix time. ``ended_s`` is 0 while it runs, and after a power cut."""

    started_s: float = 0.0
    ended_s: float = 0.0
    last_turn_s: float = 0.0
    n_turns: int = 0
    n_model_losses: int = 0


class Keeping:
    """``before`` is what the last run left, None where there was none; ``problem`` what was wrong
    with it. Raises UsageError.
    """

    def __init__(self, folder: Path):
        self._folder = made_folder(folder)
        self._life, self._chat = folder / "life.json", folder / "chat.bin"
        there = self._life.exists()
        before, self.problem = read_state(self._life, Record, Record())
        self.before = before if there and not self.problem else None
        self._now = Record(started_s=time.time())

    @property
    def was_cut(self) -> bool:
        """Whether the last run ended without an end: a power cut, or it was killed."""
        return self.before is not None and self.before.started_s > 0 and not self.before.ended_s

    def begin(self) -> None:
        """Raises RuntimeFailure (the disk)."""
        write_state(self._life, self._now)

    def turn(self, messages: Sequence[Message] | None, bundle: str) -> None:
        """A turn is complete. ``messages``: the conversation, where it is to outlive a restart;
        ``bundle`` is what its soft tokens were made by. Raises RuntimeFailure.
        """
        now = self._now
        self._now = msgspec.structs.replace(now, last_turn_s=time.time(), n_turns=now.n_turns + 1)
        if messages is not None:
            self._write_chat(messages, bundle)
        write_state(self._life, self._now)

    def lost_model(self) -> None:
        """Raises RuntimeFailure."""
        n = self._now.n_model_losses + 1
        self._now = msgspec.structs.replace(self._now, n_model_losses=n)
        write_state(self._life, self._now)

    def end(self) -> None:
        """Raises RuntimeFailure."""
        write_state(self._life, msgspec.structs.replace(self._now, ended_s=time.time()))

    def _write_chat(self, messages: Sequence[Message], bundle: str) -> None:
        turns = [message for message in messages if message.role != "system"]
        body = msgspec.msgpack.encode((bundle, plain_messages(turns)))
        while len(body) > MAX_CHAT_BYTES and (later := _without_first_turn(turns)):
            turns = later
            body = msgspec.msgpack.encode((bundle, plain_messages(turns)))
        with written_whole(self._chat) as file:
            file.write(_MAGIC + checksum(body) + body)

    def chat(self, bundle: str) -> list[Message]:
        """The turns that were kept, without a system text; none where there are none. Raises
        UsageError for a file that is damaged, or of another bundle; it is moved aside.
        """
        try:
            with open(self._chat, "rb") as file:
                data = file.read(2 * MAX_CHAT_BYTES)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(f"cannot read {self._chat}: {error.strerror}") from None
        try:
            made_by, turns = _decoded(data)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self._set_aside(f"is damaged ({error})") from None
        if made_by != bundle:
            raise self._set_aside("is of another bundle")
        return turns

    def _set_aside(self, why: str) -> UsageError:
        kept = self._chat.with_name("chat.bin.broken")
        try:
            self._chat.replace(kept)
        except OSError:
            kept = self._chat
        return UsageError(f"the conversation of before {why}, and is not gone on with: {kept}")


def _decoded(data: bytes) -> tuple[str, list[Message]]:
    start = len(_MAGIC)
    body = data[start + CHECKSUM_BYTES :]
    if not data.startswith(_MAGIC) or checksum(body) != data[start : start + CHECKSUM_BYTES]:
        raise ValueError("its checksum does not match")
    bundle, plain = msgspec.msgpack.decode(body, type=tuple[str, list[PlainMessage]])
    return bundle, messages_of(plain)


def _without_first_turn(messages: Sequence[Message]) -> list[Message]:
    """From the second user's message on."""
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    return list(messages[users[1] :]) if len(users) > 1 else []
