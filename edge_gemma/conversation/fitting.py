"""How much of a conversation fits a context: a pure function from messages to what is kept.

In: messages, and a way to render them. Out: the messages that stay, their rendering, and how many
of the oldest turns were forgotten. Nothing is changed here; the caller commits the result once the
turn is in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from edge_gemma.errors import ContextFull
from edge_gemma.messages import Message

T = TypeVar("T")


@dataclass(frozen=True)
class Fitted(Generic[T]):
    """Messages that fit, rendered. ``dropped`` of the oldest turns are not among them."""

    messages: tuple[Message, ...]
    rendered: T
    dropped: int


def fit(
    messages: Sequence[Message],
    render: Callable[[Sequence[Message]], T],
    length: Callable[[T], int],
    *,
    n_ctx: int,
    n_reserve: int,
) -> Fitted[T]:
    """Forget the oldest whole turns (system text stays) until what is rendered leaves ``n_reserve``
    positions free.

    Once something must go, a quarter of the context is made free, so that this happens rarely. The
    last turn always stays; it may use the reserve down to 64 positions. Raises ContextFull when it
    cannot fit even alone.
    """
    kept, dropped = tuple(messages), 0
    rendered = render(kept)
    if length(rendered) > n_ctx - n_reserve:
        limit = min(n_ctx - n_reserve, n_ctx * 3 // 4)
        while length(rendered) > limit and (fewer := without_oldest_turn(kept)) is not None:
            kept, dropped = fewer, dropped + 1
            rendered = render(kept)
    if length(rendered) > n_ctx - min(n_reserve, 64):
        raise ContextFull(
            f"the last turn alone takes {length(rendered)} of {n_ctx} positions; shorten it "
            "or load "
            "with a larger n_ctx"
        )
    return Fitted(kept, rendered, dropped)


def without_oldest_turn(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """The messages without the oldest user turn and everything up to the next; None when only the
    last turn is left.

    >>> talk = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    >>> [message.content for message in without_oldest_turn(talk)]
    ['c']
    """
    first = 1 if messages and messages[0].role == "system" else 0
    users = [i for i, message in enumerate(messages) if i >= first and message.role == "user"]
    if len(users) < 2:
        return None
    return (*messages[:first], *messages[users[1] :])
