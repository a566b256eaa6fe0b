"""How likely a turn is over by what was said so far: the probability that a language model gives to
an end there.

In: a text without its last punctuation, as a recogniser has it at a pause; a model, which may be
another and smaller one than that which answers. Out: a probability. No weights were trained for
this: the text stands in a list of questions to an assistant, and what counts is whether an end of a
sentence, of the line or of the answer comes next.
"""

from __future__ import annotations

import numpy as np

from edge_gemma.conversation.session import Session
from edge_gemma.prompts.prompt import Prompt
from edge_gemma.spans import Tokens

LEAD = "Questions to a voice assistant:\n- What time is it?\n- Switch off the radio.\n- "
_ENDS = [mark + tail for mark in (".", "?", "!", "…", "") for tail in ("", "\n", "\n\n")][:-3]
_LINES = ["\n", "\n\n"]


class TurnEnd:
    """Asks a model through a session of its own; only what is new of a text is prefilled. ``lead``
    is the list that the text goes on, best in its language. Close it.

    >>> with TurnEnd(model.session(), model.prompt) as turn_end:
    ...     0 <= turn_end.probability("Set a timer for") <= 1
    True
    """

    def __init__(self, session: Session, prompt: Prompt, lead: str = LEAD):
        self._session, self._prompt, self._lead = session, prompt, lead
        special = prompt.manifest.special_tokens
        ids = {special[name] for name in ("eos", "end_of_turn") if name in special}
        n_head = len(self._ids_of("a")) - 1  # begin of sequence
        for end in [*_ENDS, *_LINES]:
            found = self._ids_of(f"a{end}")[1 + n_head :]
            ids.update(found[:1])
        self._ends = sorted(ids)

    def _ids_of(self, text: str) -> list[int]:
        spans = self._prompt.raw(text)
        return [id for span in spans if isinstance(span, Tokens) for id in span.ids]

    def probability(self, text: str) -> float:
        """Raises ContextFull (a text too long), Cancelled, RuntimeFailure."""
        text = " ".join(text.split()).rstrip(".?!…,;: ")
        if not text:
            return 0.0
        self._session.replace(self._prompt.raw(self._lead + text))
        logits = self._session.logits().astype(np.float64)
        weights = np.exp(logits - logits.max())
        return float(weights[self._ends].sum() / weights.sum())

    def close(self) -> None:
        self._session.close(keep=False)

    def __enter__(self) -> TurnEnd:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
