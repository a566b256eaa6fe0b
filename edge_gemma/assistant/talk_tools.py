"""The tools of a spoken conversation, and what they have it say unasked.

In: files of tools, and timers where the built-in tools are wanted. Out: a toolbox; and what a
listener takes: who answers with it, and its notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from edge_gemma.assistant.builtin_tools import builtin_tools
from edge_gemma.assistant.ringing import Ringing
from edge_gemma.assistant.timers import Timers
from edge_gemma.assistant.tool_loop import ToolLoop
from edge_gemma.assistant.tools import Toolbox
from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.notice import Notice
from edge_gemma.hearing.devices import Speaker


@dataclass(frozen=True)
class TalkTools:
    """``timers`` where the built-in tools are among them."""

    toolbox: Toolbox
    timers: Timers | None = None


def tools_of_files(files: Sequence[str | PathLike[str]]) -> Toolbox | None:
    """Raises UsageError."""
    if not files:
        return None
    toolboxes = [Toolbox.from_file(file) for file in files]
    return Toolbox([tool for toolbox in toolboxes for tool in toolbox.tools])


def talk_tools(
    files: Sequence[str | PathLike[str]],
    timers: Timers | None = None,
    folder: str | PathLike[str] = ".",
) -> TalkTools | None:
    """Those of the files, behind the built-in ones where there are ``timers``; ``folder`` holds the
    shopping list. None for none at all. Raises UsageError.
    """
    others = tools_of_files(files)
    if timers is None:
        return None if others is None else TalkTools(others)
    return TalkTools(builtin_tools(timers, folder, others.tools if others else ()), timers)


@dataclass(frozen=True)
class ToolsAtWork:
    loop: ToolLoop
    ringing: Ringing | None

    def notice(self) -> Notice | None:
        """What is to be said now: nobody answered a question, or a timer is over."""
        text = self.loop.overdue()
        if text is not None:
            return Notice(text)
        return self.ringing() if self.ringing is not None else None


def tools_at_work(
    chat: Chat, tools: TalkTools, speaker: Speaker, languages: Sequence[str]
) -> ToolsAtWork:
    """What rings and asks does so in the first of ``languages`` (none: English); yes is understood
    in all.
    """
    loop = ToolLoop(chat, tools.toolbox, languages=languages)
    ringing = None
    if tools.timers is not None:
        language = languages[0] if languages else "en"
        ringing = Ringing(tools.timers, speaker.play, speaker.stop, language=language)
    return ToolsAtWork(loop, ringing)
