"""`personas`, and the options that say what a model is told before a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import JsonOption, SystemOption, print_json, table
from edge_gemma.errors import UsageError

if TYPE_CHECKING:
    from edge_gemma.assistant.personas import Instructions, Persona

PersonaOption = Annotated[
    str | None,
    typer.Option(
        "--persona",
        help="What the model is told first: a name that `personas` lists, or a FILE.toml. --system "
        "is added to it.",
    ),
]
AnswerInOption = Annotated[
    str | None,
    typer.Option(
        "--answer-in",
        help="The language of the answers: a code like de or de-AT, or a name. Default: the one "
        "that is spoken.",
    ),
]
WithOption = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="KEY=VALUE",
        help="Fill a slot of the persona: style=, audience=, context= … Repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    app.command("personas")(personas)


@dataclass(frozen=True)
class TellingOptions:
    """What the model is told first."""

    system: SystemOption = None
    persona: PersonaOption = None
    answer_in: AnswerInOption = None
    values: WithOption = None

    def instructions(self) -> Instructions:
        """Raises UsageError."""
        from edge_gemma.assistant.personas import Instructions, Persona, language_of

        values = slot_values(self.values)
        if self.persona is None:
            if values:
                raise UsageError("--with fills the slots of a --persona; none was given")
            language = f"Answer in {language_of(self.answer_in)[1]}." if self.answer_in else None
            return Instructions(" ".join(filter(None, (self.system, language))), "")
        told = Persona.of(self.persona).instructions(self.answer_in, **values)
        return Instructions(" ".join(filter(None, (told.system, self.system))), told.instruction)

    def system_text(self) -> str | None:
        return self.instructions().system or None


TELLING = TellingOptions()


def slot_values(pairs: list[str] | None) -> dict[str, str]:
    """``["style=short"]`` → ``{"style": "short"}``. Raises UsageError."""
    values: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UsageError(f"--with is {pair!r}; expected KEY=VALUE, like style=formal")
        if key.strip() in values:
            raise UsageError(f"--with {key.strip()} was given twice")
        values[key.strip()] = value
    return values


def personas(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A name, or a FILE.toml. Default: all.")
    ] = None,
    answer_in: AnswerInOption = None,
    values: WithOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the personas, or print what the model is told by one."""
    from edge_gemma.assistant.personas import Persona, persona_names

    if name is None:
        if answer_in is not None or values:
            raise UsageError("--answer-in and --with are for one persona; give its NAME")
        found = [Persona.of(each) for each in persona_names()]
        if as_json:
            print_json([_facts(persona) for persona in found])
            return
        rows = [(each.name, each.about, " ".join(_slots(each))) for each in found]
        print(table([("name", "what it does", "slots (* needed)"), *rows]))
        return
    persona = Persona.of(name)
    told = persona.instructions(answer_in, **slot_values(values))
    if as_json:
        print_json(_facts(persona) | {"system": told.system, "instruction": told.instruction})
        return
    print(told.system)
    if told.instruction:
        print(f"\nbefore each utterance: {told.instruction}")


def _facts(persona: Persona) -> dict[str, object]:
    return {
        "name": persona.name,
        "about": persona.about,
        "slots": persona.slots,
        "required": persona.required,
        "languages": persona.languages,
    }


def _slots(persona: Persona) -> list[str]:
    return [f"{slot}{'*' if slot in persona.required else ''}" for slot in persona.slots]
