"""Segments of speech → subtitles. Pure."""

from __future__ import annotations

from edge_gemma.conversation.transcription import Segment


def cue(segment: Segment, number: int | None) -> str:
    """One subtitle with the blank line behind it; numbered and with decimal commas for SubRip.

    >>> print(cue(Segment(3661.5, 3662.25, "Hello --> there"), 7))
    7
    01:01:01,500 --> 01:01:02,250
    Hello -> there
    <BLANKLINE>
    """

    mark = "." if number is None else ","
    # a blank line or an arrow would end the cue
    lines = segment.text.replace("-->", "->").splitlines()
    text = "\n".join(line for line in lines if line.strip())
    times = f"{_clock(segment.start_s, mark)} --> {_clock(segment.end_s, mark)}"
    numbered = [] if number is None else [str(number)]
    return "\n".join([*numbered, times, text or "…", ""])


def _clock(seconds: float, mark: str) -> str:
    total_ms = round(seconds * 1000)
    whole_s, ms = divmod(total_ms, 1000)
    hours, minutes, seconds_left = whole_s // 3600, whole_s // 60 % 60, whole_s % 60
    return f"{hours:02}:{minutes:02}:{seconds_left:02}{mark}{ms:03}"
