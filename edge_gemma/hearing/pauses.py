"""How long silence must last until an utterance counts as over.

In: what is known at a pause. Out: seconds. Without any text the pause follows the speaker
(who paused within the utterance may do so again) and the detector (silence that might be soft
speech); where somebody says how likely the turn is over by what was said (``over``), mostly that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields

import numpy as np

from edge_gemma.errors import UsageError

# probabilities that the turn is over at which the pause is the longest, the usual, the shortest
_OVER = (0.05, 0.2, 0.6)
_AGAIN = 1.3  # a pause that was followed by speech, times this, is still no end
_REMEMBERED, _FEW = 20, 4  # utterances
WENT_ON_S = 1.5  # speech so soon after an utterance's last word continues it
_SURE, _UNSURE = 0.04, 0.2  # mean probability of speech in a silence: clearly none; perhaps some


@dataclass(frozen=True)
class Clues:
    """What is known at a pause. ``unsure``: the mean probability of speech in the silence so far;
    ``inner_s``: the longest pause of this utterance that was followed by speech; ``habit_s``: how
    long this speaker's pauses are (:class:`Habit`); ``over``: how likely the turn is over by what
    was said. None where nobody knows.
    """

    unsure: float = 0.0
    inner_s: float = 0.0
    habit_s: float | None = None
    over: float | None = None


class Habit:
    """How long the speaker's pauses are: the longest ones of the last utterances. An utterance that
    follows at once upon an end was its continuation, and that end a mistake: a pause, too.

    >>> habit = Habit()
    >>> for pause_s in (0.2, 0.25, 0.2, 0.3):
    ...     habit.add(pause_s)
    >>> habit.pause_s
    0.3
    """

    def __init__(self) -> None:
        self._longest: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, longest_s: float) -> None:
        """The longest pause of an utterance that has ended, 0 where there was none."""
        self._longest.append(longest_s)

    def went_on(self, pause_s: float) -> None:
        """The last utterance was cut off: what followed after ``pause_s`` belonged to it."""
        if self._longest:
            self._longest[-1] = max(self._longest[-1], pause_s)

    @property
    def pause_s(self) -> float | None:
        """All but one in ten are not longer; None before a few utterances were heard."""
        if len(self._longest) < _FEW:
            return None
        ordered = sorted(self._longest)
        return ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


@dataclass(frozen=True)
class PauseRule:
    """Seconds of silence that end an utterance: ``usual_s`` where nothing speaks for more or less.
    Raises UsageError.

    >>> rule = PauseRule()
    >>> [rule.pause_s(Clues(over=over)) for over in (0.01, None, 0.9)]
    [1.2, 0.6, 0.32]
    """

    shortest_s: float = 0.32
    usual_s: float = 0.6
    longest_s: float = 1.2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or not 0 < value <= 5:
                raise UsageError(
                    f"{field.name} is {value!r}; expected more than 0, up to 5 seconds"
                )
        if not self.shortest_s <= self.usual_s <= self.longest_s:
            raise UsageError(
                f"the pauses {self.shortest_s:g}, {self.usual_s:g} and {self.longest_s:g} s are "
                "not in order: shortest, usual, longest"
            )

    @classmethod
    def around(cls, usual_s: float) -> PauseRule:
        """The rule for somebody whose usual pause is ``usual_s``."""
        return cls(min(usual_s, max(0.2, usual_s / 2)), usual_s, min(5.0, 2 * usual_s))

    def pause_s(self, clues: Clues) -> float:
        pause_s = self.usual_s
        if clues.over is not None:
            pauses_s = (self.longest_s, self.usual_s, self.shortest_s)
            pause_s = float(np.interp(clues.over, _OVER, pauses_s))
        else:
            if clues.habit_s is not None:
                pause_s = max(self.shortest_s, _AGAIN * clues.habit_s)
            pause_s = max(pause_s, _AGAIN * clues.inner_s)
        doubt = float(np.interp(clues.unsure, (_SURE, _UNSURE), (0.0, 1.0)))
        return min(self.longest_s, pause_s + doubt * (self.longest_s - self.usual_s) / 2)
