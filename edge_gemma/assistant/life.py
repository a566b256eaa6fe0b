"""When an assistant listens: asleep until its word is said, awake for a while after each answer.

In: events, and the time by any clock that runs. Out: the state, and what is to be done. Nothing
here knows sound, threads or models.

    asleep ──wake──▸ listening ──speech──▸ hearing ──end──▸ answering ──over──▸ following
      ▴                  │                                                        │ │
      └──────nothing is said for a while, a stop word, the button─────────────────┘ └▸ speech
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_gemma.errors import UsageError

State = Literal["asleep", "listening", "hearing", "answering", "following", "ringing", "away"]
# wake: the wake word; press: the button; speech, end: an utterance began, ended; ignored: it was
# none (a cough); over: the answer or the ring is; stop: a stop word; ring: something is said
# unasked; lost, back: the microphone or the model
Event = Literal[
    "wake", "press", "speech", "end", "ignored", "over", "stop", "ring", "lost", "back", "late"
]
# cut: what is being said, answered and rung ends here; the others are tones
Action = Literal["cut", "wake tone", "sleep tone"]
Step = tuple[State, tuple[Action, ...]]

LISTEN_S = 8.0  # after the wake word, for the first word
FOLLOW_S = 8.0
LONGEST_S = 60.0  # of an utterance: more of it is a radio

_CUTTING: tuple[Event, ...] = ("wake", "press", "stop")  # whatever goes on
# listening in place of asleep where there is nothing to wake up from
_REST: State = "asleep"
_STEPS: dict[tuple[State, Event], Step] = {
    ("asleep", "wake"): ("listening", ("wake tone",)),
    ("asleep", "press"): ("listening", ("wake tone",)),
    ("asleep", "ring"): ("ringing", ()),
    ("asleep", "lost"): ("away", ()),
    ("listening", "wake"): ("listening", ("wake tone",)),
    ("listening", "press"): (_REST, ("sleep tone",)),
    ("listening", "speech"): ("hearing", ()),
    ("listening", "stop"): (_REST, ("sleep tone",)),
    ("listening", "late"): (_REST, ("sleep tone",)),
    ("listening", "ring"): ("ringing", ()),
    ("listening", "lost"): ("away", ()),
    ("hearing", "wake"): ("listening", ("wake tone",)),
    ("hearing", "press"): (_REST, ("sleep tone",)),
    ("hearing", "end"): ("answering", ()),
    ("hearing", "ignored"): ("listening", ()),
    ("hearing", "over"): ("following", ()),  # it failed before its end
    ("hearing", "stop"): (_REST, ("sleep tone",)),
    ("hearing", "late"): (_REST, ("cut", "sleep tone")),
    ("hearing", "lost"): ("away", ()),
    ("answering", "wake"): ("listening", ("wake tone",)),
    ("answering", "press"): (_REST, ("sleep tone",)),
    ("answering", "speech"): ("hearing", ()),
    ("answering", "over"): ("following", ()),
    ("answering", "stop"): (_REST, ("sleep tone",)),
    ("following", "wake"): ("listening", ("wake tone",)),
    ("following", "press"): (_REST, ("sleep tone",)),
    ("following", "speech"): ("hearing", ()),
    ("following", "stop"): (_REST, ("sleep tone",)),
    ("following", "late"): (_REST, ("sleep tone",)),
    ("following", "ring"): ("ringing", ()),
    ("following", "lost"): ("away", ()),
    ("ringing", "wake"): ("listening", ("wake tone",)),
    ("ringing", "press"): (_REST, ()),
    ("ringing", "speech"): ("hearing", ()),
    ("ringing", "over"): ("following", ()),
    ("ringing", "stop"): (_REST, ()),
    ("away", "back"): (_REST, ()),
    ("away", "end"): ("answering", ()),  # what was said until the microphone was lost
    ("away", "ring"): ("ringing", ()),
}


@dataclass(frozen=True)
class Habits:
    """``sleeps``: there is a wake word, or a button, without which nothing is heard; else it is
    always awake. ``barge_in``: speech alone stops an answer. Raises UsageError.
    """

    sleeps: bool = True
    follow_s: float = FOLLOW_S
    listen_s: float = LISTEN_S
    longest_s: float = LONGEST_S
    barge_in: bool = True

    def __post_init__(self) -> None:
        if self.follow_s < 0 or self.listen_s <= 0 or self.longest_s <= 0:
            raise UsageError(
                f"a follow-up window of {self.follow_s:g} s, {self.listen_s:g} s for the first "
                f"word, utterances up to {self.longest_s:g} s; expected positive seconds"
            )


class Life:
    """The state. :meth:`on` and :meth:`tick` return what is to be done.

    >>> life = Life(Habits(follow_s=5))
    >>> life.on("wake", 0.0), life.state
    (('cut', 'wake tone'), 'listening')
    >>> [life.on(event, 2.0) for event in ("speech", "end", "over")], life.state
    ([(), (), ()], 'following')
    >>> life.tick(6.9), life.tick(7.0), life.state
    ((), ('sleep tone',), 'asleep')
    """

    def __init__(self, habits: Habits = Habits(), now_s: float = 0.0):
        self.habits = habits
        self._away = False
        self._until_s: float | None = None
        self.state: State = "asleep"
        self._enter(_REST, now_s, 0.0)

    @property
    def hears(self) -> bool:
        """Whether what is said now may be an utterance."""
        if self.state == "answering":
            return self.habits.barge_in
        return self.state not in ("asleep", "away")

    def on(self, event: Event, now_s: float, *, at_least_s: float = 0.0) -> tuple[Action, ...]:
        """What has happened. What makes no sense in this state changes nothing.

        ``at_least_s``: so long an answer is waited for, whatever the follow-up window is (a
        question was asked).
        """
        if event in ("lost", "back"):
            self._away = event == "lost"
        step = _STEPS.get((self.state, event))
        if step is None:
            return ()
        state, tones = step
        actions: tuple[Action, ...] = ("cut", *tones) if event in _CUTTING else tones
        self._enter(state, now_s, at_least_s)
        if not self.habits.sleeps:
            actions = tuple(action for action in actions if action == "cut")
        return actions

    def tick(self, now_s: float) -> tuple[Action, ...]:
        """Time goes on."""
        if self._until_s is None or now_s < self._until_s:
            return ()
        return self.on("late", now_s)

    def _enter(self, state: State, now_s: float, at_least_s: float) -> None:
        rests = state in ("asleep", "listening", "following")
        if rests and self._away:
            state = "away"
        elif rests and not self.habits.sleeps:
            state = "listening"
        self.state = state
        left_s = self._left_s(at_least_s)
        self._until_s = None if left_s is None else now_s + left_s

    def _left_s(self, at_least_s: float) -> float | None:
        """Until this state ends by itself."""
        habits = self.habits
        if self.state == "hearing":
            return habits.longest_s
        if not habits.sleeps:
            return None
        if self.state == "listening":
            return habits.listen_s
        return max(habits.follow_s, at_least_s) if self.state == "following" else None
