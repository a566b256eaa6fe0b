"""Personas are data that everybody may write, so nothing of it is believed; and a voice for each
language of an answer.
"""

from __future__ import annotations

import json
import tomllib

import numpy as np
import pytest
from test_cli import cli

from edge_gemma.assistant.personas import Persona, culture_of, language_of, persona_names
from edge_gemma.conversation.language_guess import LanguageGuess
from edge_gemma.conversation.voice import Voice
from edge_gemma.errors import UsageError
from edge_gemma.languages import NAMES

NEEDED = {"translator": {"to": "French"}}


@pytest.mark.parametrize("name", persona_names())
def test_each_persona_can_be_told_in_each_language(name):
    persona = Persona.of(name)
    for language in (None, "de-AT", "fr", "Swiss German", *NAMES):
        if name == "translator" and language not in (None, "en"):
            continue
        told = persona.instructions(language, **NEEDED.get(name, {}))
        assert told.system
        assert "{" not in told.system + told.instruction
        if language in NAMES and language not in persona.languages:
            assert f"Answer in {NAMES[language]}." in told.system


@pytest.mark.parametrize("name", persona_names())
def test_what_is_filled_is_told_and_the_rest_is_left_out(name):
    persona = Persona.of(name)
    assert {"style", "audience", "context"} <= persona.slots.keys()
    for language in persona.languages:
        plain = persona.instructions(language, **NEEDED.get(name, {})).system
        for slot in persona.slots:
            values = NEEDED.get(name, {}) | {slot: "XYZ"}
            assert "XYZ" in persona.instructions(language, **values).system
            if slot not in persona.required:
                assert "XYZ" not in plain
                empty = NEEDED.get(name, {}) | {slot: "  "}
                assert persona.instructions(language, **empty).system == plain


def test_a_region_has_its_own_habits():
    assistant = Persona.of("assistant")
    assert "Paradeiser" in assistant.instructions("de_AT").system
    assert "Paradeiser" not in assistant.instructions("German").system
    assert culture_of("en-US", "en") != culture_of("en", "en")
    assert culture_of("tr") == ""
    assert "yours" in assistant.instructions("de", culture="yours").system
    assert "spoken to" in assistant.instructions().system


def test_no_persona_speaks_a_language_it_was_not_asked_for():
    with pytest.raises(UsageError, match="--with to="):
        Persona.of("translator").instructions("de", to="fr")


@pytest.mark.parametrize("text", ["", "x", "12", "de; drop", "a" * 50, "\n", "<end_of_turn>"])
def test_nonsense_is_no_language(text):
    with pytest.raises(UsageError, match="no language"):
        language_of(text)


GOOD = 'about = "a"\n[slots]\nmood = "how"\n[text.en]\nsystem = ["Be {mood}.", "Be brief."]\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is no persona"),
        (b"about = ", "is no persona"),
        (b"", "about"),
        (b'about = "a"', "text"),
        (b'about = "a"\n[text]', "has no text"),
        (b'about = 3\n[text.en]\nsystem = ["a"]', "about"),
        (b'about = "a"\n[text.en]\nsystem = "a"', "system"),
        (b'about = "a"\n[text.en]\nsytem = ["a"]', "sytem"),
        (b'about = "a"\n[text.en]\nsystem = ["{mood}"]', "mood"),
        (b'about = "a"\nrequired = ["x"]\n[text.en]\nsystem = ["a"]', "requires"),
        (b"#" * 70_000, "larger than"),
    ],
)
def test_a_file_that_is_no_persona_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Persona.of(path)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    persona = Persona.of(path)
    assert persona.instructions().system == "Be brief."
    assert persona.instructions(mood="kind {mood}").system == "Be kind {mood}. Be brief."
    with pytest.raises(UsageError, match="has no slot 'style'; it has culture, mood"):
        persona.instructions(style="x")
    with pytest.raises(UsageError, match="at most"):
        persona.instructions(mood="x" * 5000)
    with pytest.raises(UsageError, match="cannot read"):
        Persona.of(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match="did you mean assistant"):
        Persona.of("asistant")


# --- the command line ---


def test_personas_are_listed_and_shown():
    listed = cli("personas")
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in persona_names())
    assert {each["name"] for each in json.loads(cli("personas", "--json").stdout)} == set(
        persona_names()
    )
    shown = cli("personas", "translator", "--with", "to=fr", "--json")
    assert "into French" in json.loads(shown.stdout)["system"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["personas", "translator"], "--with to="),
        (["personas", "assistant", "--with", "style"], "KEY=VALUE"),
        (["personas", "assistant", "--with", "style=a", "--with", "style=b"], "given twice"),
        (["personas", "--answer-in", "de"], "give its NAME"),
        (["run", "x", "hi", "--with", "style=a"], "none was given"),
        (["run", "x", "hi", "--persona", "nobody"], "no persona 'nobody'"),
        (["run", "x", "hi", "--raw", "--persona", "assistant"], "no system turn"),
        (["run", "x", "hi", "--answer-in", "?"], "is no language"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    done = cli(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_persona_stands_in_front_of_the_prompt(tiny_bundle, monkeypatch):
    """What --persona, --answer-in and --system come to is what the chat is opened with."""
    from edge_gemma.cli import main
    from edge_gemma.model import Model

    told = []
    chat = Model.chat
    monkeypatch.setattr(
        Model,
        "chat",
        lambda self, **options: told.append(options["system"]) or chat(self, **options),
    )
    run = ["run", str(tiny_bundle), "hi", "--max-tokens", "1", "--ctx", "1024"]
    for options in (
        ["--persona", "assistant", "--answer-in", "de", "--system", "Sei nett."],
        ["--answer-in", "sl"],
    ):
        with pytest.raises(SystemExit) as left:
            main([*run, *options])
        assert left.value.code == 0
    assert told[0] == Persona.of("assistant").instructions("de").system + " Sei nett."
    assert told[1] == "Answer in Slovenian."


# --- voices ---


def test_each_clause_is_spoken_by_the_voice_of_its_language():
    said: list[tuple[str, str]] = []

    def speaker(language):
        def synthesize(text):
            said.append((language, text))
            return np.zeros(8, np.float32), 16000

        return synthesize

    voices = {language: speaker(language) for language in ("en-us", "de")}
    voice = Voice(voices, lambda samples, rate_hz: True)
    voice.push(
        "It is 21 °C in the town today. Heute ist es in der Stadt 21 °C warm. It was not so."
    )
    voice.finish()
    voice.join()
    assert voice.error is None
    assert [language for language, _ in said] == ["en-us", "de", "en-us"]
    assert "degrees" in said[0][1]
    assert "Grad" in said[1][1]


def test_a_language_without_a_voice_is_never_guessed():
    guess = LanguageGuess(["en", "sl"])
    for text in (
        "",
        "...",
        "21",
        "今日は暖かいです。",
        "x" * 5000,
        "Il fait très beau aujourd'hui.",
    ):
        assert guess(text) in ("en", "sl")


def test_voices_of_one_language_are_refused():
    done = cli("listen", "x", "--voice", "en-us,en-gb")
    assert (done.returncode, "two voices of one language" in done.stderr) == (2, True)
    done = cli("listen", "x", "--voice", "en,none")
    assert (done.returncode, "one voice for each" in done.stderr) == (2, True)


def test_every_culture_is_of_a_known_language():
    from edge_gemma.assistant.personas import _FOLDER

    table = tomllib.loads((_FOLDER / "cultures.toml").read_text("utf-8"))
    assert {key.partition("-")[0] for key in table} - {"any"} <= NAMES.keys()
