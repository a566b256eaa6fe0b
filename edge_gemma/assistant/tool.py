"""One tool, and what comes of a call: the records that tool files and the toolbox share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

TIMEOUT_S = 10.0
MAX_CHARS = 4000  # of a result that the model is told; about a thousand tokens

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class ToolResult:
    """What came of a call. ``text`` is for the model; ``note`` is a short sentence for people where
    something went wrong or was cut, else "".
    """

    name: str
    text: str
    ok: bool = True
    note: str = ""


class ToolError(Exception):
    """Raised by a tool whose text is all that has to be told: "the lamp does not answer"."""


@dataclass(frozen=True)
class Tool:
    """One tool. ``run(parameters)`` returns text, None (done) or what JSON can hold; it raises
    ToolError, or anything. ``dangerous``: the user is asked first; a text is the question.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[[Mapping[str, Any]], Any]
    dangerous: bool | str = False
    timeout_s: float = TIMEOUT_S

    @property
    def spec(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }


def dangerous(function: _F) -> _F:
    """Marks a function of a tool file: the user is asked before each call. A file that should not
    import this sets ``function.dangerous = True``, or to the question to ask.

    >>> @dangerous
    ... def unlock() -> None:
    ...     "Unlock the front door."
    >>> unlock.dangerous
    True
    """
    function.dangerous = True  # type: ignore[attr-defined]
    return function
