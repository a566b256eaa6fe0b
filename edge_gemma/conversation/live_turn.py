"""Samples → one turn of a conversation, encoded and prefilled while it is still being spoken.

In: a chat, and 16 kHz samples as they come. Out: the answer. After the last sample only the
encoder's tail and the end of the prompt are left to compute, however long the utterance was.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np

from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.stream import Chunk
from edge_gemma.options import Sampling


class LiveTurn:
    """One user turn that is still being spoken: push samples, then finish and generate. The
    :class:`Chat` holds the turn when it is answered.

    What stands before the audio is prefilled at once, each step's soft tokens as they come. Where
    the plan hears first, all of it waits for the answer: nothing else may be decoded until then.
    ``pad_audio`` fills each clip to 188 rows as transformers does. Raises UnsupportedModel (a
    bundle that cannot hear), ContextFull (the turn cannot fit).
    """

    def __init__(
        self, chat: Chat, instruction: str = "", *, pad_audio: bool = False, max_tokens: int = 512
    ):
        self._chat = chat
        self._encoder = chat.senses.audio()
        self._prefills = not chat.senses.hears_first
        head = [instruction] if instruction.strip() else []
        chat.begin_turn(head, pad_audio=pad_audio, max_tokens=max_tokens, prefill=self._prefills)
        self._stream = self._encoder.stream()
        self.n_rows = 0  # soft tokens of this turn so far
        self.first_token_s: float | None = None  # by time.perf_counter

    def push(self, samples: np.ndarray) -> int:
        """``samples [n]`` at 16 kHz → how many soft tokens they completed; those are encoded and
        prefilled. Raises MediaError, ContextFull, Cancelled.
        """
        if len(samples):
            self._chat.go_on()
        return self._add(self._stream.push(samples), prefill=self._prefills)

    def expect_end(self, *, ask: bool = False) -> float | None:
        """The user is silent: compute what :meth:`finish` and the first token need, so that nothing
        is left to do if this was the end. Samples that follow take it back exactly.

        With ``ask``, what :meth:`Chat.expect_end` says of the end. Where the plan hears first it
        does nothing: the encoder would be closed. Raises ContextFull, Cancelled.
        """
        if self._chat.expects_end or not self._prefills:
            return None
        return self._chat.expect_end(self._stream.fork().finish(), ask=ask)

    def _add(self, rows: np.ndarray, *, prefill: bool) -> int:
        self._chat.add_rows(rows, prefill=prefill)
        self.n_rows += len(rows)
        return len(rows)

    def cut(self) -> None:
        """The present piece (30 s at most) ends, the turn goes on with another clip."""
        self._add(self._stream.finish(), prefill=False)
        self._chat.next_clip(prefill=self._prefills)
        self._stream = self._encoder.stream()

    def finish(self) -> None:
        """The turn was spoken to its end: encode the tail. The decoder takes it with the end of the
        prompt when the answer starts.
        """
        if self._chat.expects_end:
            self._stream.close()
        else:
            self._add(self._stream.finish(), prefill=False)
        self._chat.end_turn()

    def generate(self, sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        """Answer, after :meth:`finish`."""
        for chunk in self._chat.answer(sampling):
            self.first_token_s = self.first_token_s or time.perf_counter()
            yield chunk

    def abandon(self) -> None:
        """Forget the turn; the conversation is what it was before it."""
        self._stream.close()
        self._chat.abandon_turn()
