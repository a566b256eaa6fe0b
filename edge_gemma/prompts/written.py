"""Kinds of text in a message that are not simply what somebody wrote."""

from __future__ import annotations


class ExactText(str):
    """Text that is kept to the letter: a template may not trim it, and no control token in it
    counts.
    """


class ControlText(str):
    """Text of our own in which control tokens count, as in what a template writes."""
