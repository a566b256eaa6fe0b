"""assistant.toml: what is written, what is read, and what is refused."""

from __future__ import annotations

import tomllib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.assistant.parts import find_bundle, find_hooks, find_wake_words, plan_request
from edge_gemma.assistant.persona import briefing
from edge_gemma.assistant.settings import FILE_NAME, Home, Planning, Settings, new_file, read_home
from edge_gemma.errors import UsageError


def home(tmp_path, text):
    (tmp_path / FILE_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_home(tmp_path)


def test_the_file_that_init_writes_is_read_back(tmp_path):
    slots = {"style": "cheerful", "a b": 'c"d'}
    settings = Settings(bundle="x", voice="de", tools=["a.py"], follow_up_s=3.5, slots=slots)
    assert home(tmp_path, new_file(settings)).settings == settings


@given(st.text())
def test_any_text_is_read_back(text):
    assert tomllib.loads(new_file(Settings(system=text)))["system"] == text


def test_every_key_is_explained():
    lines = new_file(Settings()).splitlines()
    keys = [field.name for kind in (Settings, Planning) for field in msgspec.structs.fields(kind)]
    for table in ("model", "slots"):
        keys.remove(table)
        assert lines[lines.index(f"[{table}]") - 1].startswith("# ")
    for key in keys:
        at = [number for number, line in enumerate(lines) if line.startswith(f"{key} = ")]
        assert len(at) == 1 and lines[at[0] - 1].startswith("# "), key
    assert max(map(len, lines)) <= 100


def test_an_empty_file_is_the_defaults(tmp_path):
    assert home(tmp_path, "").settings == Settings()


@pytest.mark.compat(
    kind="talk",
    what="an assistant.toml with a key that is not known, or of another type",
    happens="refused; the key is named, and what was meant perhaps",
)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tone = true", "tone is no setting; did you mean tones"),
        ("wakeword = 'alexa'", "wakeword is no setting; did you mean wake_word"),
        ("xyzzy = 1", "xyzzy is no setting; There are: bundle, persona"),
        ("tones = 'yes'", "tones: expected true or false, got text"),
        ("bundle = 3", "bundle: expected text, got a whole number"),
        ("tools = 'builtin'", "tools: expected a list, got text"),
        ("tools = ['builtin', 3]", r"tools\[1\]: expected text"),
        ("follow_up_s = -1", "follow_up_s: expected a number >= 0"),
        ("follow_up_s = inf", "follow_up_s: expected a number <= 3600"),
        ("follow_up_s = nan", "follow_up_s: "),
        ("pause_s = nan", "pause_s: "),
        ("pause_s = 0", "pause_s: expected a number >= 0.1"),
        ("echo = 'acc'", "echo: it is 'acc'; expected auto, aec, system, off"),
        ("transcript_mib = 0", "transcript_mib: expected a whole number >= 1"),
        ("gain = 2.5", "gain: expected a whole number, got a number"),
        ("voice = 2026-11-27", "voice: expected text, got"),
        ("model = 3", "model: expected a table"),
        ("slots = ['style']", "slots: expected a table"),
        ("[slots]\nstyle = 3", "slots.*: expected text"),
        ("[model]\nlevel = 'fast'", "model.level: it is 'fast'; expected efficiency"),
        ("[model]\nctx = 3", "model.ctx is no setting; did you mean context"),
        ("[model]\ntones = true", r"model.tones is no setting; it stands above \[model\]"),
        ("[model]\ncontext = 99999999", "model.context: expected a whole number <= 1048576"),
        ('system = "a\\u0000b"', "system holds a NUL"),
        ("tones = ", "is no TOML"),
        ("a = " + "[" * 5000, "is no TOML"),
        (b"\xff\xfe", "is no TOML"),
        ("# " + "x" * (65 << 10), "larger than 64 KiB"),
    ],
)
def test_nonsense(tmp_path, text, reason):
    with pytest.raises(UsageError, match=reason):
        home(tmp_path, text)


def test_no_file_and_a_folder_in_its_place(tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path} holds no assistant.toml.*assistant init"):
        read_home(tmp_path)
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(UsageError, match="cannot read .*assistant.toml"):
        read_home(tmp_path)


def test_files_are_looked_for_beside_the_configuration(tmp_path, monkeypatch):
    at = Home(tmp_path, Settings())
    assert at.state == tmp_path / "state"
    assert Home(tmp_path, Settings(state="/x")).state.as_posix() == "/x"
    (tmp_path / "de.onnx").touch()
    assert at.found("de.onnx") == f"{tmp_path / 'de.onnx'}"
    assert at.found("de.onnx:af") == f"{tmp_path / 'de.onnx'}:af"
    assert at.found("en") == "en" and at.found("no.onnx") == "no.onnx"
    assert at.found("en,de.onnx") == f"en,{tmp_path / 'de.onnx'}"


def test_what_the_model_is_told(tmp_path):
    def told(**settings):
        found = briefing(Home(tmp_path, Settings(**settings)))
        return found.system, found.instruction

    assert told(persona="", system="Be brief.", instruction="Now:") == ("Be brief.", "Now:")
    assert told(persona="") == ("", "")
    assert told(persona="", answer_in="de") == ("Answer in German.", "")
    system, _ = told(system="Be brief.", slots={"name": "Ada"})
    assert "Your name is Ada." in system and system.endswith(" Be brief.")
    assert told(persona="translator", slots={"to": "fr"})[1].endswith("into French:")
    (tmp_path / "own.toml").write_text('about = "x"\n[text.en]\nsystem = ["Mine."]')
    assert told(persona="own.toml") == ("Mine.", "")
    for wrong, reason in (
        ({"persona": "asistant"}, "did you mean assistant"),
        ({"persona": "no.toml"}, "cannot read"),
        ({"slots": {"x": "y"}}, "has no slot 'x'"),
        ({"persona": "", "slots": {"x": "y"}}, "those of a persona"),
        ({"answer_in": "xx"}, "is no language"),
        ({"persona": "translator"}, "needs to"),
    ):
        with pytest.raises(UsageError, match=reason):
            told(**wrong)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(), "names no bundle"),
        (Settings(bundle="no-such"), "no-such"),
    ],
)
def test_no_bundle(tmp_path, settings, reason):
    with pytest.raises(Exception, match=reason):
        find_bundle(Home(tmp_path, settings))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(wake_word="button"), "hooks names no file"),
        (Settings(wake_word="hey_nobody"), "is no wake word.*okay_nabu"),
        (Settings(stop_word="no.json"), "is no wake word"),
    ],
)
def test_no_wake_word(tmp_path, settings, reason):
    pytest.importorskip("pymicro_wakeword")
    with pytest.raises(UsageError, match=reason):
        find_wake_words(Home(tmp_path, settings))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "is no hooks file"),
        ("1 / 0", "line 1, could not be run: ZeroDivisionError"),
        ("x = 1", "has no function connect"),
        ("connect = 3", "has no function connect"),
    ],
)
def test_no_hooks(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "led.py").write_text(text)
    with pytest.raises(UsageError, match=reason):
        find_hooks(Home(tmp_path, Settings(hooks="led.py")))


def test_what_the_plan_is_asked_for():
    table = {"model": {"budget": "2GiB", "context": 1024, "threads": 2, "level": "efficiency"}}
    request = plan_request(msgspec.convert(table, Settings))
    assert (request.budget_bytes, request.n_ctx, request.n_threads) == (2 << 30, 1024, 2)
    assert request.senses == ("audio",) and request.structured and request.level == "efficiency"
    with pytest.raises(UsageError):
        plan_request(Settings(model=Planning(budget="much")))
