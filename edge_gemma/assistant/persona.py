"""What an assistant's model is told before the conversation and before each utterance.

In: its settings. Out: :class:`Instructions`. The one place where settings become such text.
"""

from __future__ import annotations

from edge_gemma.assistant.personas import Instructions, Persona, language_of
from edge_gemma.assistant.settings import Home
from edge_gemma.errors import UsageError


def briefing(home: Home) -> Instructions:
    """Raises UsageError: a persona, a slot or a language that is not known."""
    settings = home.settings
    if settings.persona:
        name = settings.persona
        persona = Persona.of(home.path(name) if name.endswith(".toml") else name)
        told = persona.instructions(settings.answer_in or None, **settings.slots)
    elif settings.slots:
        raise UsageError('[slots] are those of a persona, and persona is ""')
    else:
        language = settings.answer_in and f"Answer in {language_of(settings.answer_in)[1]}."
        told = Instructions(language, "")
    system = " ".join(filter(None, (told.system, settings.system)))
    return Instructions(system, settings.instruction or told.instruction)
