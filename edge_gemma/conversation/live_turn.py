"""One user turn that is encoded and prefilled while it is still being spoken."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import ContextFull
from edge_gemma.messages import Audio, Message
from edge_gemma.options import Sampling
from edge_gemma.spans import Rows


class LiveTurn:
    """One user turn that is still being spoken: push samples, then finish and generate.

    Works on a :class:`Chat`, which afterwards holds the turn.

    What stands before the audio is prefilled at once, each step's soft tokens as they come. Raises
    UsageError (a bundle that cannot hear), ContextFull (the turn cannot fit).
    """

    def __init__(
        self, chat: Chat, instruction: str = "", *, pad_audio: bool = False, max_tokens: int = 512
    ):
        self._chat, self._pad_audio = chat, pad_audio
        self._head = [instruction] if instruction.strip() else []
        self._encoder = chat.model.encoder("audio")
        self._clips: list[np.ndarray] = []  # soft tokens of finished pieces
        self._rows: list[np.ndarray] = []  # of the present one
        self._reserve = min(max_tokens, chat.session.n_ctx // 4)
        self._prompt = chat.model.prompt
        before, self._after = self._spans()
        while (base := chat.session.length if chat._append_only else 0) + _length(
            before
        ) + 2 + _length(self._after(0)) + self._reserve > chat.session.n_ctx:
            if not chat._drop_oldest():
                raise ContextFull(
                    f"a spoken turn does not fit in a context of {chat.session.n_ctx} "
                    "tokens; load with a larger n_ctx"
                )
            chat._append_only = False
            before, self._after = self._spans()
        self._base = base
        if chat._append_only:
            chat.session.append(before)
        else:
            chat.session.replace(before)
            chat.session.append([])
        chat._append_only = (
            False  # until the turn is answered, the cache holds more than the messages
        )
        self._stream = self._encoder.stream()
        self.first_token_s: float | None = None

    def _spans(self):
        messages = [*self._chat.messages, Message("user", [*self._head, Audio()])]
        return self._prompt.listening(
            messages,
            tools=self._chat.tools,
            continued=self._chat._append_only,
            pad_audio=self._pad_audio,
        )

    @property
    def n_rows(self) -> int:
        """Soft tokens of this turn that are in the decoder (or held for its end)."""
        return sum(len(rows) for rows in (*self._clips, *self._rows))

    def push(self, samples: np.ndarray) -> int:
        """``samples [n]`` at 16 kHz → how many soft tokens they completed; those are encoded and
        prefilled.
        """
        rows = self._stream.push(samples)
        self._append(rows)
        return len(rows)

    def cut(self) -> None:
        """The present piece (30 s at most) ends, the turn goes on with another clip."""
        self._close_clip()
        self._chat.session.append(
            self._prompt.between_clips(len(self._clips[-1]), pad_audio=self._pad_audio)
        )
        self._stream = self._encoder.stream()

    def finish(self) -> None:
        """The turn was spoken to its end: encode the tail. The decoder takes it with the end of the
        prompt when the answer starts.
        """
        self._close_clip()
        self._chat.session.append(self._after(len(self._clips[-1])), prefill=False)

    def generate(self, options: Sampling = Sampling()) -> Iterator[Chunk]:
        """Answer, after :meth:`finish`."""
        chat = self._chat
        chat.messages.append(
            Message("user", [*self._head, *(Audio(rows=rows) for rows in self._clips)])
        )
        parts: list[str] = []
        try:
            for chunk in chat.session.generate(options):
                self.first_token_s = self.first_token_s or time.perf_counter()
                parts.append(chunk.text)
                yield chat._finished(chunk, parts, 0) if chunk.finish_reason else chunk
        finally:
            if chat.messages[-1].role == "user":  # stopped on the way
                chat._finished(Chunk("", finish_reason="cancelled"), parts, 0)

    def abandon(self) -> None:
        """Forget the turn; the chat is as it was."""
        self._stream.close()

    def _append(self, rows: np.ndarray, prefill: bool = True) -> None:
        if len(rows):
            self._rows.append(rows)
            self._chat.session.append([Rows(rows)], prefill=prefill)

    def _close_clip(self) -> None:
        self._append(
            self._stream.finish(), prefill=False
        )  # what closes the clip follows at once, in the same pass
        width = self._chat.model.bundle.manifest.decoder.n_embd
        self._clips.append(
            np.concatenate(self._rows) if self._rows else np.zeros((0, width), np.float32)
        )
        self._rows = []


def _length(spans) -> int:
    return sum(len(span) for span in spans)
