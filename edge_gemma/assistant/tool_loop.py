"""A turn, the calls in its answer, their results, the answer to those, and so on.

In: a chat that was given a toolbox's specs, and its turns. Out: chunks of what is said. Calls are
held back from what is said; what is marked dangerous is asked first, and the next utterance must
say yes. This module knows no microphone; the listener drives it as its responder.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

from edge_gemma.assistant.phrases import Phrases, says_yes
from edge_gemma.assistant.tools import Toolbox, ToolResult
from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.stream import Chunk
from edge_gemma.conversation.transcription import TRANSCRIBE_ANY
from edge_gemma.errors import ContextFull
from edge_gemma.messages import FunctionCall, Message
from edge_gemma.options import Sampling
from edge_gemma.prompts.calls import tool_schema
from edge_gemma.senses import Content

MAX_ROUNDS = 4
CONFIRM_WITHIN_S = 15.0  # from the end of the question to the beginning of the answer
_HEARING = Sampling(max_tokens=24, temperature=0.0)  # a yes or no, transcribed
_MAX_SHOWN_CHARS = 200

Generate = Callable[[Sampling | None], Generator[Chunk, None, None]]
Saying = Generator[Chunk, None, None]


def _nothing(_: str) -> None:
    pass


@dataclass
class _Work:
    """The calls of one message of the model's, ``message``, and the results so far."""

    message: Message
    left: list[FunctionCall]
    n_rounds: int
    sampling: Sampling | None
    results: list[str] = field(default_factory=list)
    since_s: float = field(default_factory=time.monotonic)  # of the question


class ToolLoop:
    """Answers turns of ``chat`` with the tools of ``toolbox``. At most ``max_rounds`` times in one
    turn are results given back.

    ``languages`` are those in which a yes counts (none: every known one); the first is spoken.

    >>> def now() -> str:
    ...     "The time of day."
    ...     return "12:30"
    >>> toolbox = Toolbox([now])
    >>> loop = ToolLoop(model.chat(tools=toolbox.specs), toolbox)
    >>> said = "".join(chunk.text for chunk in loop.send("Hello", Sampling(max_tokens=4, seed=1)))
    """

    def __init__(
        self,
        chat: Chat,
        toolbox: Toolbox,
        *,
        max_rounds: int = MAX_ROUNDS,
        confirm_within_s: float = CONFIRM_WITHIN_S,
        languages: Sequence[str] = (),
    ):
        self._chat, self._toolbox = chat, toolbox
        self._max_rounds, self._confirm_within_s = max_rounds, confirm_within_s
        self._languages = tuple(languages)
        self._phrases = Phrases.of(languages[0] if languages else "en")
        self._call_schema = tool_schema(toolbox.specs) if toolbox.specs else None
        self._waiting: _Work | None = None  # for a yes
        self._hears_answer = False  # the turn that is being spoken may be that yes

    @property
    def asks(self) -> bool:
        """Whether a question waits for yes or no."""
        return self._waiting is not None

    def send(
        self,
        content: Content,
        sampling: Sampling | None = None,
        *,
        stopped: threading.Event | None = None,
        tell: Callable[[str], None] = _nothing,
    ) -> Saying:
        """A written turn, as :meth:`Chat.send`. Where a question waits, it is the answer to it."""
        if self.instruction("") == "":
            chunks = self.answer(
                lambda sampling: self._chat.send(content, sampling), sampling, stopped, tell
            )
        else:
            said = content if isinstance(content, str) else ""
            chunks = self._confirmed(self._taken(), said, stopped, tell)
        yield from chunks

    # what the listener drives

    def instruction(self, usual: str) -> str:
        """What stands before the turn that begins now: the usual, or where the user was asked, what
        has it transcribed. Too late an answer is none, and the turn is one like any other.
        """
        waiting, self._hears_answer = self._waiting, False
        if waiting is None:
            return usual
        if time.monotonic() - waiting.since_s > self._confirm_within_s:
            self.give_up()
            return usual
        self._hears_answer = True
        return TRANSCRIBE_ANY

    def answer(
        self,
        generate: Generate,
        sampling: Sampling | None = None,
        stopped: threading.Event | None = None,
        tell: Callable[[str], None] = _nothing,
    ) -> Saying:
        """What is said to a turn that ``generate`` has the model answer. Ends soon after
        ``stopped``. ``tell`` takes a line about each call. Raises what the chat raises, but for
        results that do not fit.
        """
        if self._hears_answer and self._waiting is not None:
            said = "".join(chunk.text for chunk in generate(_HEARING))
            if stopped is not None and stopped.is_set():
                said = ""  # something was said behind it that may take it back
            yield from self._confirmed(self._taken(), said, stopped, tell)
        else:
            yield from self._rounds(generate, sampling, 0, stopped, tell)

    def spoken(self) -> None:
        """The question was heard to its end: from now on the user has time."""
        if self._waiting is not None:
            self._waiting.since_s = time.monotonic()

    def give_up(self) -> str | None:
        """Where a question waits: it was not answered, so nothing is done. Returns what to say."""
        if self._waiting is None:
            return None
        self._waiting, self._hears_answer = None, False
        text = self._phrases.say("undone")
        messages = self._chat.messages
        if messages and messages[-1].role == "assistant":
            self._chat.remember([*messages[:-1], Message("assistant", text)])
        return text

    def overdue(self) -> str | None:
        """:meth:`give_up`, once the time for an answer is over."""
        waiting = self._waiting
        if waiting is None:
            return None
        late = time.monotonic() - waiting.since_s > self._confirm_within_s
        return self.give_up() if late else None

    # rounds

    def _rounds(
        self,
        generate: Generate,
        sampling: Sampling | None,
        n_rounds: int,
        stopped: threading.Event | None,
        tell: Callable[[str], None],
    ) -> Saying:
        held = self._held(sampling)
        while True:
            end = yield from self._said(generate, held)
            calls = self._calls(end)
            if not calls:
                return
            work = _Work(self._chat.messages[-1], calls, n_rounds + 1, sampling)
            go_on = yield from self._worked_off(work, stopped, tell)
            if go_on is None:
                return
            generate, n_rounds = go_on, work.n_rounds

    def _held(self, sampling: Sampling | None) -> Sampling | None:
        """A call that begins is held to what the tools take."""
        sampling = sampling or self._chat.sampling
        if self._call_schema is None or sampling.schema or sampling.grammar:
            return sampling
        return replace(sampling, call_schema=self._call_schema)

    def _said(
        self, generate: Generate, sampling: Sampling | None
    ) -> Generator[Chunk, None, Chunk | None]:
        """Yields an answer without the calls in it. Returns its last chunk."""
        stream, end = self._chat.call_stream(), None
        for chunk in generate(sampling):
            text = stream.push(chunk)
            if chunk.finish_reason:
                end = chunk
                rest, known = stream.finish()
                text += rest if known or not self._calls(chunk) else ""
            yield replace(chunk, text=text)
        return end

    def _calls(self, end: Chunk | None) -> list[FunctionCall]:
        reply = self._chat.reply
        if end is None or end.finish_reason == "cancelled" or reply is None or reply.end is not end:
            return []
        return list(reply.calls)

    def _worked_off(
        self,
        work: _Work,
        stopped: threading.Event | None,
        tell: Callable[[str], None],
        *,
        approved: bool = False,
    ) -> Generator[Chunk, None, Generate | None]:
        """Make the calls that are left. Returns what has the model answer the results; None where
        nothing more is to be said. ``approved``: the first was asked about.
        """
        if work.n_rounds > self._max_rounds:
            work.results += ["Error: too many calls for one question"] * len(work.left)
            yield from self._closed(work, self._phrases.say("rounds"))
            return None
        while work.left:
            question = self._toolbox.question(work.left[0])
            if question and not approved:
                yield from self._ask(work, question)
                return None
            approved = False
            call = work.left.pop(0)
            result = self._toolbox.call(call, stopped)
            work.results.append(self._fitting(result.text))
            tell(_shown(call, result))
        if stopped is not None and stopped.is_set():
            self._remember_results(work)
            return None
        return lambda sampling: self._answered(work, sampling)

    def _answered(self, work: _Work, sampling: Sampling | None) -> Saying:
        """The model's answer to results; they are remembered, whatever becomes of it."""
        n_before = len(self._chat.messages)
        try:
            yield from self._chat.send_results(work.results, sampling)
        except ContextFull:
            work.results = ["Error: the result is too long for this conversation"] * len(
                work.results
            )
            yield from self._chat.send_results(work.results, sampling)
        finally:
            unchanged = len(self._chat.messages) == n_before
            if unchanged and self._chat.messages[-1] is work.message:
                self._remember_results(work)

    def _fitting(self, text: str) -> str:
        """As long as a quarter of the context takes, at some four characters a token."""
        n = self._chat.session.n_ctx
        return text if len(text) <= n else f"{text[:n]}… (cut: the context has no more room)"

    def _remember_results(self, work: _Work, *behind: Message) -> None:
        results = [Message("tool", text) for text in work.results]
        self._chat.remember([*self._chat.messages, *results, *behind])

    def _closed(self, work: _Work, text: str) -> Saying:
        """The turn ends with a sentence of ours."""
        self._remember_results(work, Message("assistant", text))
        yield Chunk(text, finish_reason="stop")

    # confirmation

    def _ask(self, work: _Work, question: bool | str) -> Saying:
        """Until there is an answer the conversation holds results that say so, then the question:
        every model's template knows such an order.
        """
        call = work.left[0]
        if not isinstance(question, str):
            question = self._phrases.say("ask", what=_spoken(call))
        done = len(work.results)
        work.results += ["not done: the user is asked first"] * len(work.left)
        yield from self._closed(work, question)
        del work.results[done:]
        work.since_s = time.monotonic()
        self._waiting = work

    def _taken(self) -> _Work:
        work, self._waiting, self._hears_answer = self._waiting, None, False
        assert work is not None
        return work

    def _confirmed(
        self,
        work: _Work,
        said: str,
        stopped: threading.Event | None,
        tell: Callable[[str], None],
    ) -> Saying:
        """Go on where the user was asked. The question and its answer are left out of the
        conversation: the call is followed by its result, as if nobody had asked.
        """
        messages = self._chat.messages
        at = next((i for i, message in enumerate(messages) if message is work.message), None)
        if at is None:  # the context was full, and that turn was forgotten
            yield from self._forgotten()
            return
        self._chat.remember(messages[: at + 1])
        approved = says_yes(said, self._languages)
        if not approved:
            call = work.left.pop(0)
            said = " ".join(said.split())[:_MAX_SHOWN_CHARS]
            work.results.append(f'not done: the user was asked and said "{said}", which is no yes')
            tell(f"{call.name}: not done, the answer was {said!r}")
        go_on = yield from self._worked_off(work, stopped, tell, approved=approved)
        if go_on is not None:
            yield from self._rounds(go_on, work.sampling, work.n_rounds, stopped, tell)

    def _forgotten(self) -> Saying:
        text = self._phrases.say("undone")
        messages = self._chat.messages
        if messages and messages[-1].role == "assistant":
            self._chat.remember([*messages[:-1], Message("assistant", text)])
        yield Chunk(text, finish_reason="stop")


def _spoken(call: FunctionCall) -> str:
    """A call as it can be read aloud: ``unlock door (name: front)``."""
    values = ", ".join(f"{key}: {_plain(value)}" for key, value in call.parameters.items())
    name = call.name.replace("_", " ")
    return (f"{name} ({values})" if values else name)[:_MAX_SHOWN_CHARS]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(call: FunctionCall, result: ToolResult) -> str:
    """One line about a call, for a screen."""
    text = result.note or result.text
    line = f"{_spoken(call)} → {' '.join(text.split())}"
    return line if len(line) <= 2 * _MAX_SHOWN_CHARS else line[: 2 * _MAX_SHOWN_CHARS] + "…"
