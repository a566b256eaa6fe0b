"""A conversation in turns: messages, the template around them, and what to forget when the context
is full.

In: messages of text, pictures, clips and rows. Out: chunks of the answer, and :class:`Reply`. What
is in the KV cache is session.py's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edge_gemma.conversation.session import Session
from edge_gemma.conversation.stream import Chunk
from edge_gemma.engines.llama.decoder import Cancelled
from edge_gemma.errors import BundleError, ContextFull
from edge_gemma.messages import Audio, Image, Message
from edge_gemma.options import Sampling
from edge_gemma.prompts.calls import FunctionCall, parse_calls
from edge_gemma.spans import Rows, Span

if TYPE_CHECKING:
    from edge_gemma.model import Model


@dataclass(frozen=True)
class Reply:
    """A finished answer of :class:`Chat`: its text, the function calls in it, and the last chunk."""

    text: str
    calls: tuple[FunctionCall, ...]
    end: Chunk


class Chat:
    """A conversation in turns.

    Each turn is prefilled once; earlier ones stay in the cache as they were generated.

    When the context is full the oldest whole turns are forgotten (system text stays) until a
    quarter of it is free, so that this happens rarely; the rest is prefilled again and
    ``usage.dropped_turns`` says how many went.

    >>> chat = getfixture("tiny_model").chat(system="Be brief.")
    >>> answer = "".join(chunk.text for chunk in chat.send("Hello", Sampling(max_tokens=4, seed=1)))
    >>> [message.role for message in chat.messages]
    ['system', 'user', 'assistant']
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        tools: Sequence[Mapping] = (),
        pad_audio: bool = True,
    ):
        self.model, self.session = model, Session(model.cache)
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.tools, self.pad_audio = tuple(tools), pad_audio
        self.reply: Reply | None = None
        self._append_only = (
            False  # whether the cache holds exactly the messages, the last answer open
        )

    def send(
        self, content, options: Sampling = Sampling(), *, role: str = "user"
    ) -> Iterator[Chunk]:
        """Say ``content`` (text, or a list of text, Image, Audio and Rows) and stream the answer.

        Afterwards ``reply`` holds it.

        A turn that is stopped before its answer begins is taken back whole. Raises ContextFull when
        the turn cannot fit even alone, UsageError, MediaError.
        """
        self.messages.append(self._encoded(Message(role, content)))
        parts: list[str] = []
        answering = False
        try:
            dropped = self._place(options)
            for chunk in self.session.generate(options):
                answering = True
                parts.append(chunk.text)
                if chunk.finish_reason:
                    chunk = self._finished(chunk, parts, dropped)
                yield chunk
        except Cancelled:
            answering = False
            yield Chunk("", finish_reason="cancelled")
        finally:
            if not answering:
                self.messages.pop()
                self._append_only = False
            elif (
                self.messages[-1].role != "assistant"
            ):  # the iterator was closed in the middle of the answer
                self._finished(Chunk("", finish_reason="cancelled"), parts, 0)

    def _finished(self, chunk: Chunk, parts: list[str], dropped: int) -> Chunk:
        text = "".join(parts)
        self.messages.append(Message("assistant", text))
        self._append_only = bool(text.strip())
        if dropped and chunk.usage:
            chunk = replace(chunk, usage=replace(chunk.usage, dropped_turns=dropped))
        self.reply = Reply(text, tuple(parse_calls(text)) if self.tools else (), chunk)
        return chunk

    def _encoded(self, message: Message) -> Message:
        """Media as soft tokens, once: a later prefill must not run an encoder again."""
        if isinstance(message.content, str):
            return message
        parts = self.model.media(message.content)
        parts = [
            type(p)(rows=self.model.encode(p))
            if isinstance(p, Image | Audio) and p.rows is None
            else p
            for p in parts
        ]
        return Message(message.role, parts)

    def _place(self, options: Sampling) -> int:
        """Prefill the new turn, forgetting the oldest ones if it does not fit. Returns how many
        turns went.
        """
        session, reserve = self.session, min(options.max_tokens, self.session.n_ctx // 4)
        if self._append_only:
            spans = self._render(continued=True)
            if session.length + _length(spans) + reserve <= session.n_ctx:
                session.append(spans)
                return 0
        spans, dropped = self._render(), 0
        limit = session.n_ctx - reserve
        if _length(spans) > limit:
            limit = min(limit, session.n_ctx * 3 // 4)
            while _length(spans) > limit and self._drop_oldest():
                dropped += 1
                spans = self._render()
            if _length(spans) > session.n_ctx - min(reserve, 64):
                raise ContextFull(
                    f"the last turn alone takes {_length(spans)} of {session.n_ctx} "
                    "positions; shorten it or load with a larger n_ctx"
                )
        session.replace(spans)
        session.append([])
        return dropped

    def _render(self, continued: bool = False) -> list[Span]:
        return self.model.prompt.spans(
            self.messages, tools=self.tools, continued=continued, pad_audio=self.pad_audio
        )

    def _drop_oldest(self) -> bool:
        """Forget the oldest user turn and everything up to the next; False when only the last turn
        is left.
        """
        first = 1 if self.messages and self.messages[0].role == "system" else 0
        users = [i for i, m in enumerate(self.messages) if i >= first and m.role == "user"]
        if len(users) < 2:
            return False
        del self.messages[first : users[1]]
        return True

    def cancel(self) -> None:
        """Stop the answer, from any thread."""
        self.session.cancel()

    def reset(self) -> None:
        """Forget every turn but the system text."""
        self.messages = (
            self.messages[:1] if self.messages and self.messages[0].role == "system" else []
        )
        self._append_only = False

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation, its media and its KV cache to one file."""
        plain = [
            (
                m.role,
                [_part_out(p) for p in ([m.content] if isinstance(m.content, str) else m.content)],
            )
            for m in self.messages
        ]
        self.session.save(path, msgspec.msgpack.encode((plain, self._append_only)))

    def restore(self, path: str | os.PathLike) -> None:
        """Go on where a saved conversation stopped. Raises BundleError, ContextFull; on an error
        nothing has changed.
        """
        extra = self.session.restore(path)
        try:
            plain, self._append_only = msgspec.msgpack.decode(
                extra,
                type=tuple[list[tuple[str, list[str | tuple[str, tuple[int, int], bytes]]]], bool],
            )
        except ValueError as error:
            raise BundleError(f"{path} holds a session without turns ({error})") from None
        self.messages = [
            Message(
                role,
                [_part_in(p) for p in parts]
                if len(parts) != 1 or not isinstance(parts[0], str)
                else parts[0],
            )
            for role, parts in plain
        ]

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _length(spans: Sequence[Span]) -> int:
    return sum(len(span) for span in spans)


def _part_out(part):
    if isinstance(part, str):
        return part
    rows = part.rows
    kind = part.kind if isinstance(part, Image | Audio) else ("rows" if part.causal else "block")
    return kind, list(rows.shape), np.ascontiguousarray(rows, np.float32).tobytes()


def _part_in(part):
    if isinstance(part, str):
        return part
    kind, shape, data = part
    rows = np.frombuffer(data, np.float32).reshape(shape)
    return {
        "image": lambda: Image(rows=rows),
        "audio": lambda: Audio(rows=rows),
        "rows": lambda: Rows(rows),
        "block": lambda: Rows(rows, causal=False),
    }[kind]()
