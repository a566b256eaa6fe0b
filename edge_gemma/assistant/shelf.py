"""An assistant that runs until it is stopped, whatever is lost meanwhile.

In: a folder with assistant.toml. Out: what happens, told as it happens; timers, transcript and the
conversation in the state folder. A model that fails is loaded again, a microphone or loudspeaker
that goes is waited for, and a power cut costs the turn that was going on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from edge_gemma.assistant.attention import LifeAttention
from edge_gemma.assistant.keeping import Keeping
from edge_gemma.assistant.life import Event, Life, State
from edge_gemma.assistant.overhearing import Overhearing
from edge_gemma.assistant.parts import Parts, make_parts
from edge_gemma.assistant.phrases import Phrases
from edge_gemma.assistant.ringing import Ringing
from edge_gemma.assistant.settings import Home
from edge_gemma.assistant.timers import Timers
from edge_gemma.assistant.tool_loop import CONFIRM_WITHIN_S, ToolLoop
from edge_gemma.assistant.transcript import Transcript, Who
from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.listener import Listener
from edge_gemma.conversation.notice import Notice, SpokenNotice
from edge_gemma.conversation.spoken_answer import Heard
from edge_gemma.errors import DeviceLost, EdgeGemmaError, RuntimeFailure, UsageError, first_line
from edge_gemma.hearing.devices import Microphone
from edge_gemma.messages import Message
from edge_gemma.model import Model

RETRY_S = 0.5  # between attempts to open a microphone
_LOOK_S = 0.1
_FIRST_RELOAD_S, _LAST_RELOAD_S = 2.0, 60.0  # between attempts to load a model again

_EVENTS: dict[str, Event] = {
    "speech": "speech",
    "silence": "end",
    "ignored": "ignored",
    "turn": "over",
    "notice": "ring",
    "lost": "lost",
    "back": "back",
}


@dataclass(frozen=True)
class Changed:
    """The state is another one now (:data:`edge_gemma.assistant.life.State`)."""

    state: State
    kind: Literal["state"] = "state"


@dataclass(frozen=True)
class Remark:
    """Something that a person should know."""

    text: str
    kind: Literal["note"] = "note"


Shown = Heard | Changed | Remark


class Assistant:
    """``show`` takes everything that happens, ``on_state`` each state; both are called in the
    thread of :meth:`run`, remarks from any. Opening it takes the state folder, whose lock keeps a
    second assistant out, and finds what the settings name; the model is loaded by :meth:`run`.

    ``alive()`` is called in the thread of :meth:`run` with every block of sound, and while
    something is waited for or loaded.

    Raises UsageError, MissingExtra, DeviceLost, BundleError.
    """

    def __init__(
        self,
        home: Home,
        *,
        show: Callable[[Shown], object] = lambda shown: None,
        on_state: Callable[[State], object] | None = None,
        alive: Callable[[], object] = lambda: None,
        make: Callable[[Home, Timers, Callable[[str], object]], Parts] = make_parts,
    ):
        self._home, self._show, self._alive = home, show, alive
        self._stopping = threading.Event()
        self._listener: Listener | None = None
        self._chat: Chat | None = None
        self._loop: ToolLoop | None = None
        self._messages: list[Message] = []  # of a conversation that goes on with another model
        self._n_losses = 0  # of the model, since the last turn
        self._utterance_s = 0.0  # when the present one began, by the listener
        self._notice_said = self._has_begun = False
        self._problems: set[str] = set()
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            with contextlib.suppress(OSError):  # Timers says what is wrong with it
                home.state.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what was said
            timers = opened.enter_context(Timers(home.state))
            self._keeping = Keeping(home.state)
            settings = home.settings
            self._transcript = None
            if settings.transcript:
                self._transcript = Transcript(home.state, settings.transcript_mib << 20)
            self._parts = parts = make(home, timers, self._tell)
            opened.enter_context(closing(parts.loudspeaker))
            self._opened = opened.pop_all()
        self._phrases = Phrases.of((parts.languages or ("en",))[0])
        self._ringing = None
        if parts.tools is not None and parts.tools.timers is not None:
            self._ringing = Ringing(
                timers,
                parts.loudspeaker.ring,
                parts.loudspeaker.silence,
                language=self._phrases.language,
            )
        self._hooks = [hook for hook in (on_state, self._connected()) if hook is not None]
        self._attention = LifeAttention(
            Life(parts.habits, parts.clock()),
            clock=parts.clock,
            on_state=self._changed,
            tone=parts.loudspeaker.tone if parts.tones else lambda samples: None,
            answering=lambda: self._listener is not None and self._listener.answering,
            asks_s=lambda: CONFIRM_WITHIN_S if self._loop and self._loop.asks else 0.0,
            alive=self._alive,
            wake=parts.wake,
            stop_word=parts.stop_word,
        )

    # from any thread

    @property
    def state(self) -> State:
        return self._attention.life.state

    @property
    def heard_s(self) -> float:
        """Seconds of sound so far."""
        return self._attention.heard_s

    def press(self) -> None:
        """The button: wakes it up, stops what it says, sends it to sleep."""
        self._attention.later("press")

    def stop(self) -> None:
        """End :meth:`run`; an answer is stopped."""
        self._stopping.set()
        listener = self._listener
        if listener is not None:
            listener.stop()

    # the life

    def run(self) -> None:
        """Until :meth:`stop`, or the end of a source that ends. Raises what loading a model raises,
        and DeviceLost where there was no microphone in the first place.
        """
        self._begin()
        try:
            model = self._first_model()
            while model is not None:
                try:
                    lost = self._converse(model)
                finally:
                    self._closed(model)
                if lost is None:
                    return
                self._attention.on("lost")
                self._say(self._phrases.say("model_lost"))
                model = self._loaded_again()
                if model is not None:
                    self._say(self._phrases.say("model_back"))
        finally:
            self._end()

    def _first_model(self) -> Model | None:
        try:
            return self._parts.load(self._going_on)
        except KeyboardInterrupt:  # so the loading ends that is told not to go on
            if self._stopping.is_set():
                return None
            raise

    def _going_on(self, fraction: float) -> bool:
        self._alive()
        return not self._stopping.is_set()

    def _begin(self) -> None:
        self._has_begun = True
        self._write("start")
        if self._keeping.problem:
            self._tell(self._keeping.problem)
        if self._keeping.was_cut:
            self._tell("the last run ended without an end: a power cut, or it was killed")
        self._keep(self._keeping.begin)
        self._attention.on("lost")  # until the model and the microphone are there

    def _end(self) -> None:
        self._write("end")
        self._keep(self._keeping.end)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Assistant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # with a model

    def _converse(self, model: Model) -> Heard | None:
        """Talk until stopped. Returns why, where the model failed."""
        parts = self._parts
        specs = parts.tools.toolbox.specs if parts.tools else ()
        system = parts.briefing.system or None
        with model.chat(system=system, tools=specs, pad_audio=parts.options.pad_audio) as chat:
            self._go_on_with(chat, model)
            self._loop = None
            if parts.tools is not None:
                self._loop = ToolLoop(chat, parts.tools.toolbox, languages=parts.languages)
            responder = Overhearing(
                chat,
                self._loop,
                stops=parts.stop_phrases,
                writes=parts.writes_down,
                languages=parts.languages,
                heard=lambda text: self._write("user", text),
                stop=lambda: self._attention.later("stop"),
            )
            self._chat = chat
            try:
                return self._listened(chat, responder, model.sequences.identity)
            finally:
                self._messages = [m for m in chat.messages if m.role != "system"]
                self._listener = self._chat = None

    def _go_on_with(self, chat: Chat, model: Model) -> None:
        if not self._messages and not self._n_losses and self._home.settings.resume:
            try:
                self._messages = self._keeping.chat(model.sequences.identity)
            except UsageError as error:
                self._tell(str(error))
            if self._messages:
                n = sum(message.role == "user" for message in self._messages)
                turns = "1 turn" if n == 1 else f"{n} turns"
                self._tell(f"going on with the conversation of before ({turns})")
        if self._messages:
            chat.remember([*chat.messages, *self._messages])

    def _listened(self, chat: Chat, responder: Overhearing, identity: str) -> Heard | None:
        """Until stopped, or the model fails. A microphone that is not there when the model is
        loaded again is waited for.
        """
        parts, was_ready, told = self._parts, self._n_losses > 0, False
        while not self._stopping.is_set():
            self._listener = listener = Listener(
                chat,
                parts.source(),
                parts.options,
                make_voice=parts.loudspeaker.make_voice,
                detector=parts.detector,
                echo=parts.echo,
                filters=parts.filters,
                responder=responder,
                notices=self._notice,
                attention=self._attention,
            )
            if self._stopping.is_set():
                break
            if not isinstance(listener.source, Microphone):  # which tells when it is open
                self._attention.on("back")
            if parts.echo is not None:
                parts.loudspeaker.ready()  # open: its samples are counted
            try:
                with closing(listener.records()) as records:
                    for record in records:
                        was_ready, told = True, False
                        self._live(record, identity)
                        if record.error == RuntimeFailure.__name__:
                            return record
                return None
            except DeviceLost as error:
                if not was_ready:
                    raise
                if not told:
                    self._live(Heard("lost", 0.0, str(error)), identity)
                told = True
                self._wait(RETRY_S)
            except RuntimeFailure as error:  # an encoder that does not open
                return Heard("failed", 0.0, str(error), error=RuntimeFailure.__name__)
        return None

    def _notice(self) -> Notice | None:
        """What is to be said unasked; asked with every block while nobody speaks, and while the
        microphone is away.
        """
        self._alive()
        text = self._loop.overdue() if self._loop is not None else None
        if text is not None:
            return Notice(text)
        return self._ringing() if self._ringing is not None else None

    def _live(self, record: Heard, identity: str) -> None:
        """One record of the listener's."""
        event = _EVENTS.get(record.kind)
        if record.kind == "ready" and self.state == "away":
            event = "back"
        if record.kind == "failed" and record.error and self.state in ("hearing", "answering"):
            event = "over"
        self._show(record)
        if event is not None:
            self._attention.on(event)
        self._write_down(record)
        if record.kind in ("turn", "interrupted") and not self._notice_said:
            self._n_losses = 0
            keeps = self._home.settings.resume and self._chat is not None
            messages = list(self._chat.messages) if keeps and self._chat else None
            self._keep(lambda: self._keeping.turn(messages, identity))

    def _write_down(self, record: Heard) -> None:
        """The record as a line of the transcript."""
        if record.kind == "notice":
            self._notice_said = True
            self._write("notice", record.text)
        elif record.kind == "speech":
            self._notice_said, self._utterance_s = False, record.at_s
        elif record.kind == "silence":
            self._notice_said = False
            if not self._parts.writes_down:
                self._write("user", seconds=max(0.0, record.at_s - self._utterance_s))
        elif record.kind == "called":
            self._write("tool", record.text)
        elif record.kind == "back":
            self._write("note", f"the microphone is back: {record.text}")
        elif record.kind in ("lost", "failed"):
            self._write("note", record.text)
        elif record.kind in ("turn", "interrupted") and not self._notice_said:
            if record.text.strip():
                is_cut = record.kind == "interrupted"
                self._write("assistant", record.text.strip(), interrupted=is_cut)

    # without one

    def _closed(self, model: Model) -> None:
        try:
            model.close()
        except EdgeGemmaError as error:
            self._tell(f"closing the model: {error}")

    def _loaded_again(self) -> Model | None:
        """The model, however long that takes; timers ring meanwhile. None when stopped."""
        self._keep(self._keeping.lost_model)
        self._n_losses += 1
        wait_s = min(_LAST_RELOAD_S, _FIRST_RELOAD_S * (2 ** (self._n_losses - 1) - 1))
        while not self._wait(wait_s):
            found: list[Model | EdgeGemmaError] = []
            thread = threading.Thread(
                target=lambda found=found: found.append(self._try_to_load()),
                name="edge-gemma-load",
                daemon=True,
            )
            thread.start()
            while thread.is_alive():
                self._wait(_LOOK_S)
                thread.join(_LOOK_S)
            if not isinstance(found[0], EdgeGemmaError):
                return found[0]
            wait_s = min(_LAST_RELOAD_S, max(_FIRST_RELOAD_S, 2 * wait_s))
            if not self._stopping.is_set():
                self._tell(f"{found[0]}. The model is tried again in {wait_s:g} s")
        return None

    def _try_to_load(self) -> Model | EdgeGemmaError:
        try:
            return self._parts.load(self._going_on)
        except EdgeGemmaError as error:
            return error
        except KeyboardInterrupt:  # stopped
            return RuntimeFailure("the loading was stopped")

    def _wait(self, seconds: float) -> bool:
        """Ring meanwhile. Returns whether it is to stop."""
        until = time.monotonic() + seconds
        while not self._stopping.is_set():
            self._alive()
            notice = self._notice()
            if notice is not None:
                self._speak(notice)
            left_s = until - time.monotonic()
            if left_s <= 0:
                return False
            self._stopping.wait(min(_LOOK_S, left_s))
        return True

    def _say(self, text: str) -> None:
        if not self._stopping.is_set():
            self._speak(Notice(text))

    def _speak(self, notice: Notice) -> None:
        """While nobody listens: until it is said, or stopped."""
        said = SpokenNotice(notice, self._parts.loudspeaker.make_voice())
        while not said.ended:
            self._alive()
            record = said.next_record(_LOOK_S)
            if record is not None:
                self._show(record)
                self._write_down(record)
            if self._stopping.is_set():
                said.stop()
        said.close()

    # told

    def _connected(self) -> Callable[[State], object] | None:
        """The on_state of the hooks file. Raises UsageError."""
        if self._parts.connect is None:
            return None
        try:
            on_state = self._parts.connect(self.press)
        except Exception as error:  # somebody else's code
            self.close()
            raise UsageError(
                f"connect(press) of {self._home.settings.hooks} failed: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from None
        return on_state if callable(on_state) else None

    def _changed(self, state: State) -> None:
        self._show(Changed(state))
        for hook in list(self._hooks):
            try:
                hook(state)
            except Exception as error:  # somebody else's code
                self._hooks.remove(hook)
                self._tell(
                    f"on_state failed and is not called any more: {type(error).__name__}: "
                    f"{first_line(error)}"
                )

    def _tell(self, text: str) -> None:
        self._show(Remark(text))
        if self._has_begun:
            self._write("note", text)

    def _write(
        self, who: Who, text: str = "", *, interrupted: bool = False, seconds: float = 0.0
    ) -> None:
        transcript = self._transcript
        if transcript is None:
            return
        transcript.write(who, text, interrupted=interrupted, seconds=seconds)
        if transcript.problem:
            self._once(transcript.problem)

    def _keep(self, write: Callable[[], None]) -> None:
        try:
            write()
        except RuntimeFailure as error:
            self._once(str(error))

    def _once(self, problem: str) -> None:
        """Told the first time only."""
        if problem not in self._problems:
            self._problems.add(problem)
            self._show(Remark(problem))
