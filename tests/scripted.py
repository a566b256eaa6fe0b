"""A scripted decoder: it stands in for what a model would choose to say."""

from __future__ import annotations

import json
from dataclasses import replace

from edge_gemma import Chat, FunctionCall, Sampling


class ScriptedDecoder:
    """Each answer of ``chat`` is the next of ``script``: text, or a call. The tokens are decoded
    for real, under a grammar that allows nothing else; the weights decide nothing.
    """

    def __init__(self, chat: Chat, script):
        self.script = list(script)
        self.samplings: list[Sampling | None] = []
        self._generate = chat.session.generate
        chat.session.generate = self.generate

    def generate(self, sampling=None):
        self.samplings.append(sampling)
        said = self.script.pop(0)
        text = said.to_json() if isinstance(said, FunctionCall) else said
        literal = json.dumps(text, ensure_ascii=False)
        held = replace(
            sampling or Sampling(),
            grammar=f"root ::= {literal}",
            schema=None,
            call_schema=None,
            max_tokens=1000,
        )
        return self._generate(held)
