"""How a bundle writes functions, calls and results in its prompts: three ways, one interface.

- :class:`TextCalls`: Gemma 3's: descriptions and calls are JSON in the text, results come in the
  user's turn.
- :class:`TokenCalls`: FunctionGemma's, with control tokens; results stand in the model's own turn.
- :class:`TemplateCalls`: the bundle's chat template is given tools, calls and results and writes
  them itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from edge_gemma.messages import FunctionCall, Part
from edge_gemma.prompts import function_gemma
from edge_gemma.prompts.calls import check_tools, tools_text


@dataclass(frozen=True)
class Result:
    """What a function returned: its text, for the call of that name."""

    name: str
    text: str


Content = tuple[Part | Result, ...]


class CallStyle(Protocol):
    """``results_in`` says whose turn a result stands in."""

    results_in: Literal["user", "assistant", "tool"]

    def tools(self, tools: Sequence[Mapping[str, Any]], after_text: bool) -> Content:
        """The end of the system text; ``after_text``: something stands before it."""

    def calls(self, calls: Sequence[FunctionCall], after_text: bool) -> Content:
        """Calls in an assistant's turn."""

    def result(self, result: Result) -> Content:
        """One result."""


class TextCalls:
    results_in: Literal["user", "assistant", "tool"] = "user"

    def tools(self, tools: Sequence[Mapping[str, Any]], after_text: bool) -> Content:
        return ("\n\n" if after_text else "", tools_text(tools))

    def calls(self, calls: Sequence[FunctionCall], after_text: bool) -> Content:
        lines = "\n".join(call.to_json() for call in calls)
        return ("\n" + lines if after_text else lines,)

    def result(self, result: Result) -> Content:
        return (f"```tool_output\n{result.text}\n```",)


class TokenCalls:
    results_in: Literal["user", "assistant", "tool"] = "assistant"

    def tools(self, tools: Sequence[Mapping[str, Any]], after_text: bool) -> Content:
        lead = ("\n" if after_text else "") + function_gemma.INTRODUCTION
        return (lead, *function_gemma.declarations(check_tools(tools)))

    def calls(self, calls: Sequence[FunctionCall], after_text: bool) -> Content:
        return tuple(function_gemma.calls(calls))

    def result(self, result: Result) -> Content:
        return tuple(function_gemma.result(result.name, result.text))


class TemplateCalls:
    results_in: Literal["user", "assistant", "tool"] = "tool"

    def tools(self, tools: Sequence[Mapping[str, Any]], after_text: bool) -> Content:
        return ()  # the template is given them

    def calls(self, calls: Sequence[FunctionCall], after_text: bool) -> Content:
        return tuple(calls)

    def result(self, result: Result) -> Content:
        return (result,)
