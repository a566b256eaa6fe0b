"""A conversation in turns: messages, the template around them, and what to forget when the context
is full.

In: messages of text, pictures, clips, videos and rows; or a turn that comes piece by piece while it
is spoken. Out: chunks of the answer, and :class:`Reply`. What is in the KV cache is session.py's
business, how tokens come about generation.py's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from edge_gemma.conversation.call_stream import CallStream
from edge_gemma.conversation.fitting import fit
from edge_gemma.conversation.plain_messages import PlainMessage, messages_of, plain_messages
from edge_gemma.conversation.sequences import Sequences
from edge_gemma.conversation.session import Mark, Session
from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import BundleError, Cancelled, EdgeGemmaError, RuntimeFailure
from edge_gemma.messages import Audio, FunctionCall, Message, Part
from edge_gemma.options import Sampling
from edge_gemma.prompts.calls import check_tools, parse_calls
from edge_gemma.prompts.prompt import Listening, Prompt
from edge_gemma.senses import Content, Senses
from edge_gemma.spans import Rows, Span

_CLIP_ROWS = 188  # soft tokens of a clip of 30 s


@dataclass(frozen=True)
class Reply:
    """A finished answer of :class:`Chat`: its text, the function calls in it, the last chunk."""

    text: str
    calls: tuple[FunctionCall, ...]
    end: Chunk


@dataclass
class _OpenTurn:
    """A spoken turn on its way: ``before`` are the messages it follows, ``after(n_rows)`` makes the
    spans that close its clip.
    """

    before: list[Message]
    dropped: int
    head: tuple[Part, ...]
    after: Callable[[int], list[Span]]
    pad_audio: bool
    clips: list[np.ndarray] = field(default_factory=list)  # soft tokens of finished clips
    rows: list[np.ndarray] = field(default_factory=list)  # of the present one
    # what stood before the turn's end was expected, and the rows of the expected tail
    expected: tuple[Mark, np.ndarray] | None = None


class Chat:
    """A conversation in turns.

    Each turn is prefilled once; earlier ones stay in the cache as they were generated.

    When the context is full the oldest whole turns are forgotten (system text stays) until a
    quarter of it is free, so that this happens rarely; the rest is prefilled again and
    ``usage.dropped_turns`` says how many went.

    >>> chat = model.chat(system="Be brief.")
    >>> answer = "".join(chunk.text for chunk in chat.send("Hello", Sampling(max_tokens=4, seed=1)))
    >>> [message.role for message in chat.messages]
    ['system', 'user', 'assistant']

    A turn that is being spoken comes in pieces instead: :meth:`begin_turn`, then :meth:`add_rows`
    and :meth:`next_clip`, then :meth:`end_turn` and :meth:`answer` (live_turn.py does that from
    samples).
    """

    def __init__(
        self,
        sequences: Sequences,
        prompt: Prompt,
        senses: Senses,
        *,
        system: str | None = None,
        tools: Sequence[Mapping] = (),
        pad_audio: bool = True,
        pan_and_scan: bool = False,
    ):
        self.session, self.senses = Session(sequences), senses
        self.sampling = sequences.sampling  # where none is given
        self.messages: list[Message] = [Message("system", system)] if system else []
        self.tools, self.pad_audio, self.pan_and_scan = tuple(tools), pad_audio, pan_and_scan
        self.reply: Reply | None = None
        self._prompt = prompt
        # whether the cache holds exactly the messages, the last answer still open
        self._continues = False
        self._turn: _OpenTurn | None = None

    # a turn that is there as a whole

    def send(
        self, content: Content, sampling: Sampling | None = None, *, role: str = "user"
    ) -> Generator[Chunk, None, None]:
        """Say ``content`` (text, or a list of text, Image, Audio, Video and Rows) and stream the
        answer. Afterwards ``reply`` holds it.

        A turn that is stopped or fails before its answer begins is taken back whole, forgotten
        turns included. Raises ContextFull when the turn cannot fit even alone, UsageError,
        MediaError, UnsupportedModel.
        """
        sampling = sampling or self.sampling
        self.session.check(sampling)
        if not isinstance(content, str):
            reserve = self._reserve(sampling.max_tokens)
            content = self.senses.encoded(
                content, pan_and_scan=self.pan_and_scan, used_tokens=reserve
            )
        yield from self._send([Message(role, content)], sampling)

    def send_results(
        self, texts: Sequence[str], sampling: Sampling | None = None
    ) -> Generator[Chunk, None, None]:
        """The results of the last answer's calls, in their order, and the answer to them. As
        :meth:`send`.
        """
        sampling = sampling or self.sampling
        self.session.check(sampling)
        yield from self._send([Message("tool", text) for text in texts], sampling)

    def _send(
        self, messages: Sequence[Message], sampling: Sampling
    ) -> Generator[Chunk, None, None]:
        before, reserve = list(self.messages), self._reserve(sampling.max_tokens)
        try:
            dropped = self._place([*before, *messages], reserve)
        except Cancelled:
            yield Chunk("", finish_reason="cancelled")
            return
        yield from self._answer(sampling, before, dropped)

    def _reserve(self, max_tokens: int) -> int:
        """Positions that an answer should find free."""
        return min(max_tokens, self.session.n_ctx // 4)

    def _place(self, messages: list[Message], reserve: int) -> int:
        """Prefill the last of the messages, forgetting the oldest turns if it does not fit. Returns
        how many went. The chat's messages change only when all of it is in the cache.
        """
        session = self.session
        self._turn = None  # a spoken turn that was not answered is forgotten
        if self._continues:
            spans = self._render(messages, continued=True)
            if session.length + _length(spans) + reserve <= session.n_ctx:
                self._continues = False  # until the turn is answered
                session.append(spans)
                self.messages = messages
                return 0
        fitted = fit(messages, self._render, _length, n_ctx=session.n_ctx, n_reserve=reserve)
        self._continues = False
        session.replace(fitted.rendered, n_stable=self._stable_length())
        session.append([])
        self.messages = list(fitted.messages)
        return fitted.dropped

    def _stable_length(self) -> int:
        return self._prompt.stable_length(self.messages, tools=self.tools)

    def _render(self, messages: Sequence[Message], continued: bool = False) -> list[Span]:
        return self._prompt.spans(
            messages, tools=self.tools, continued=continued, pad_audio=self.pad_audio
        )

    # a turn that is being spoken

    def begin_turn(
        self,
        head: Sequence[Part] = (),
        *,
        pad_audio: bool = False,
        max_tokens: int = 512,
        prefill: bool = True,
    ) -> None:
        """A turn begins whose sound is still to come: ``head`` (an instruction) and what stands
        before the first clip are prefilled now, or wait (not ``prefill``).

        ``pad_audio`` fills each clip to 188 rows as transformers does. The messages change only
        when the turn is answered. Raises ContextFull, UsageError (a bundle that cannot hear),
        Cancelled.
        """
        head = tuple(head)
        before = (*self.messages, Message("user", [*head, Audio()]))

        def render(messages: Sequence[Message], continued: bool = False) -> Listening:
            return self._prompt.listening(
                messages, tools=self.tools, continued=continued, pad_audio=pad_audio
            )

        session, dropped = self.session, 0
        # room for what is still to be said, too: nothing can be forgotten in the middle of a turn
        reserve = self._reserve(max_tokens) + min(_CLIP_ROWS, session.n_ctx // 4)
        rendered = render(before, continued=True) if self._continues else None
        if rendered is not None and session.length + _around(rendered) + reserve <= session.n_ctx:
            self._continues = False  # until the turn is answered
            session.append(rendered.before, prefill=prefill)
        else:
            fitted = fit(before, render, _around, n_ctx=session.n_ctx, n_reserve=reserve)
            before, rendered, dropped = fitted.messages, fitted.rendered, fitted.dropped
            self._continues = False
            session.replace(rendered.before, n_stable=self._stable_length())
            session.append([], prefill=prefill)
        self._turn = _OpenTurn(list(before[:-1]), dropped, head, rendered.after, pad_audio)

    def add_rows(self, rows: np.ndarray, *, prefill: bool = True) -> None:
        """Soft tokens ``[n, n_embd]`` float32 of the present clip, in order.

        Without ``prefill`` they wait for what closes the clip, so that both take one pass. Raises
        ContextFull, Cancelled.
        """
        turn = self._open_turn()
        if len(rows):
            self.go_on()
            self.session.append([Rows(rows)], prefill=prefill)
            turn.rows.append(rows)

    def next_clip(self, *, prefill: bool = True) -> None:
        """The present clip (30 s at most) ends, and another one of the same turn begins."""
        turn = self._open_turn()
        self.go_on()
        n_rows = self._close_clip(turn)
        between = self._prompt.between_clips(n_rows, pad_audio=turn.pad_audio)
        self.session.append(between, prefill=prefill)

    def expect_end(self, rows: np.ndarray, *, ask: bool = False) -> float | None:
        """Somebody is silent: perhaps the turn ends with these ``rows [n, n_embd]``. They and what
        closes the turn are prefilled now, up to the logits of the answer's first token. Then
        :meth:`end_turn`, with no rows in between, is free; more rows take it back.

        With ``ask``, a pass more, returns the probability that the model gives to the end of the
        turn where its template has it; None without, or where the template has no such token.
        Raises ContextFull, Cancelled; the turn is as it was then.
        """
        turn = self._open_turn()
        self.go_on()
        session, mark = self.session, self.session.mark()
        n_rows = sum(map(len, turn.rows)) + len(rows)
        spans = [*([Rows(rows)] if len(rows) else []), *turn.after(n_rows)]
        turn.expected, over = (mark, rows), None
        try:
            if ask and (split := self._prompt.before_end(spans)) is not None:
                before, spans, token = split
                session.append(before, prefill=False)
                over = _probability(session.logits(), token)
            session.append(spans, prefill=False)
            session.prefill_whole()
        except EdgeGemmaError:
            self.go_on()
            raise
        return over

    def go_on(self) -> None:
        """The turn is not over: take back what :meth:`expect_end` did."""
        turn = self._turn
        if turn is not None and turn.expected is not None:
            self.session.return_to(turn.expected[0])
            turn.expected = None

    @property
    def expects_end(self) -> bool:
        """Whether the end of the turn is prefilled."""
        return self._turn is not None and self._turn.expected is not None

    def end_turn(self) -> None:
        """Everything was said. The decoder takes what is left when the answer starts."""
        turn = self._open_turn()
        if turn.expected is not None:
            turn.rows.append(turn.expected[1])
            self._close_clip(turn)
            return
        n_rows = self._close_clip(turn)
        self.session.append(turn.after(n_rows), prefill=False)

    @property
    def spoken_rows(self) -> int:
        """Soft tokens of the turn that was spoken and is not answered yet, 0 where there is none;
        one is 0.16 s.
        """
        return 0 if self._turn is None else sum(map(len, self._turn.clips))

    def aside(self, question: str, sampling: Sampling) -> Generator[Chunk, None, None]:
        """Between :meth:`end_turn` and :meth:`answer`: what the model says to ``question`` about
        the turn that was spoken. Afterwards the conversation is as if nobody had asked, however far
        the answer was taken. Raises ContextFull, Cancelled, RuntimeFailure.
        """
        turn, session = self._open_turn(), self.session
        clips = [Audio(rows=rows) for rows in turn.clips]
        # the model's turn was opened and stays empty; what is cut off here is all before its end
        spoken = [Message("user", [*turn.head, *clips]), Message("assistant", "…")]
        messages = [*turn.before, *spoken, Message("user", question)]
        spans, mark = self._render(messages, continued=True), session.mark()
        try:
            session.append(spans, prefill=False)
            yield from session.generate(sampling)
        finally:
            session.return_to(mark)

    def answer(self, sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        """Answer the turn that was spoken, after :meth:`end_turn`. From here on it is part of the
        conversation. Raises UsageError, RuntimeFailure; the turn is taken back then.
        """
        turn = self._open_turn()
        self._turn, unchanged = None, list(self.messages)
        clips = (Audio(rows=rows) for rows in turn.clips)
        self.messages = [*turn.before, Message("user", [*turn.head, *clips])]
        yield from self._answer(sampling, unchanged, turn.dropped)

    def abandon_turn(self) -> None:
        """Forget the turn that is being spoken; the conversation is what it was before it."""
        self._turn = None

    def _open_turn(self) -> _OpenTurn:
        if self._turn is None:
            raise RuntimeFailure("no turn is being spoken; begin one with begin_turn")
        return self._turn

    def _close_clip(self, turn: _OpenTurn) -> int:
        none = np.zeros((0, self.senses.n_embd), np.float32)
        clip = np.concatenate([none, *turn.rows])
        turn.clips.append(clip)
        turn.rows = []
        return len(clip)

    # both

    def _answer(
        self, sampling: Sampling | None, unchanged: list[Message], dropped: int
    ) -> Generator[Chunk, None, None]:
        """Generate; the answer becomes a message. ``unchanged`` are the messages to go back to when
        nothing of an answer comes.
        """
        parts: list[str] = []
        ids: list[int] = []
        begun = finished = False
        try:
            for chunk in self.session.generate(sampling):
                begun = True
                parts.append(chunk.text)
                ids += chunk.token_ids
                if chunk.finish_reason:
                    chunk, finished = self._finished(chunk, parts, ids, dropped), True
                yield chunk
        finally:
            if not begun:
                self.messages = unchanged
            elif not finished:  # the iterator was closed in the middle of the answer
                self._finished(Chunk("", finish_reason="cancelled"), parts, ids, dropped)

    def _finished(self, chunk: Chunk, parts: list[str], ids: list[int], dropped: int) -> Chunk:
        text = "".join(parts)
        content, calls = self._prompt.answer(ids, text, self.session.piece)
        self.messages.append(Message("assistant", content))
        # behind calls written with control tokens comes their result, in the same turn
        self._continues = bool(text.strip()) and not calls
        if dropped and chunk.usage:
            chunk = replace(chunk, usage=replace(chunk.usage, dropped_turns=dropped))
        if self.tools and not calls:
            calls = self._calls_in(text)
        self.reply = Reply(text, tuple(calls), chunk)
        return chunk

    def _calls_in(self, text: str) -> list[FunctionCall]:
        """Calls written as JSON. A mere name counts only where it is a tool's."""
        known = {tool["name"] for tool in check_tools(self.tools)}
        return [call for call in parse_calls(text) if call.parameters or call.name in known]

    def call_stream(self) -> CallStream:
        """What holds back the calls of one answer."""
        return CallStream(self.tools, self._prompt, self.session.piece)

    def remember(self, messages: Sequence[Message]) -> None:
        """The conversation is these messages from now on, whatever was said. The next turn puts the
        cache right.
        """
        self.messages, self._continues, self._turn = list(messages), False, None

    def heard_only(self, text: str) -> None:
        """The last answer was cut off while it was spoken: remember ``text``, what was heard of it.
        The next turn puts the cache right.
        """
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == "assistant" and isinstance(last.content, str):
            self.messages[-1] = Message("assistant", text.strip() or "…")
            self._continues = False

    def cancel(self) -> None:
        """Stop the answer, from any thread."""
        self.session.cancel()

    def reset(self) -> None:
        """Forget every turn but the system text."""
        system = self.messages[:1]
        self.messages = system if system and system[0].role == "system" else []
        self._continues, self._turn = False, None

    # on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation, its media and its KV cache to one file. Raises RuntimeFailure."""
        plain = plain_messages(self.messages)
        self.session.save(path, msgspec.msgpack.encode((plain, self._continues)))

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on where a saved conversation stopped. Raises BundleError, ContextFull; on an error
        nothing has changed.
        """
        continued, self._continues = self._continues, False
        try:
            extra = self.session.restore(path)
        except EdgeGemmaError:
            self._continues = continued  # the session is as it was
            raise
        try:
            plain, self._continues = msgspec.msgpack.decode(
                extra, type=tuple[list[PlainMessage], bool]
            )
        except ValueError as error:
            raise BundleError(f"{Path(path)} holds a session without turns ({error})") from None
        self.messages = messages_of(plain)
        self._turn = None

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _probability(logits: np.ndarray, token: int) -> float:
    """Of one id, in a row of logits ``[n_vocab]``."""
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    return float(weights[token] / weights.sum())


def _length(spans: Sequence[Span]) -> int:
    return sum(len(span) for span in spans)


def _around(listening: Listening) -> int:
    """Positions that a spoken turn takes beside its soft tokens."""
    return _length(listening.before) + 2 + _length(listening.after(0))
