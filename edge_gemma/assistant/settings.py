"""assistant.toml: everything an assistant is told, each key with what it means.

In: a folder with the file. Out: :class:`Settings`, or the file's text for a new assistant. A key
that is not known, or of another type, is an error that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from edge_gemma.errors import UsageError, first_line
from edge_gemma.files import read_bounded

FILE_NAME = "assistant.toml"
_MAX_BYTES = 64 << 10
_COLUMNS = 96
BUTTON, ALWAYS = "button", "none"

_Seconds = Annotated[float, Meta(ge=0, le=3600)]
_Count = Annotated[int, Meta(ge=0, le=1 << 20)]


class Planning(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table [model]."""

    budget: Annotated[
        str, Meta(description='Memory to stay inside, like "2GiB". "": what the machine has.')
    ] = ""
    context: Annotated[
        int,
        Meta(ge=0, le=1 << 20, description="Tokens that a conversation may hold. 0: what fits."),
    ] = 0
    level: Annotated[
        Literal["efficiency", "balanced", "performance"],
        Meta(description="efficiency (little memory), balanced or performance."),
    ] = "balanced"
    threads: Annotated[int, Meta(ge=0, le=1024, description="0: all usable cores.")] = 0
    max_tokens: Annotated[
        int, Meta(ge=1, le=1 << 20, description="An answer ends after so many.")
    ] = 512
    temperature: Annotated[
        float,
        Meta(ge=-1, le=10, description="0 is greedy. -1: as the model's authors say."),
    ] = -1.0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file. Texts that are "" stand for what the description says; files are looked for in the
    folder of assistant.toml.
    """

    bundle: Annotated[
        str, Meta(description="The model: an installed bundle's name, or a bundle's folder.")
    ] = ""
    persona: Annotated[
        str,
        Meta(
            description="What the model is told first: a name that `edge-gemma personas` lists, or "
            'a FILE.toml of yours. "": only what `system` says.'
        ),
    ] = "assistant"
    system: Annotated[str, Meta(description="What it is told behind that.")] = ""
    instruction: Annotated[
        str, Meta(description='What it is told before each utterance. "": what the persona says.')
    ] = ""
    answer_in: Annotated[
        str,
        Meta(
            description='The language of the answers: a code like de or de-AT, or a name. "": the '
            "one that is spoken."
        ),
    ] = ""
    language: Annotated[
        str,
        Meta(
            description='Of stop words, of yes and no, and of what is said unasked, like "de". "": '
            "the voice's."
        ),
    ] = ""
    microphone: Annotated[
        str,
        Meta(description='A number or part of a name (`edge-gemma devices`). "": the default.'),
    ] = ""
    loudspeaker: Annotated[str, Meta(description="The same for the loudspeaker.")] = ""
    voice: Annotated[
        str,
        Meta(
            description='An espeak-ng voice like "en", a piper voice file, KOKORO.onnx:VOICE, or '
            '"none": answers are only shown. Several, like "en,de": each clause by the voice of '
            "its language."
        ),
    ] = "en"
    wake_word: Annotated[
        str,
        Meta(
            description="okay_nabu, hey_jarvis, hey_mycroft, alexa, a microWakeWord .json; "
            '"button": it sleeps until the button of `hooks` is pressed; "none": it is always '
            "awake."
        ),
    ] = "okay_nabu"
    stop_word: Annotated[
        str,
        Meta(
            description="A microWakeWord .json that is listened for while something is said or "
            'awaited; it ends that at once, without the model. "": none.'
        ),
    ] = ""
    stop_phrases: Annotated[
        bool,
        Meta(
            description='A short utterance is written down first; "stop", "goodbye" and the like '
            "send it to sleep. Takes a pass more for each short utterance."
        ),
    ] = True
    follow_up_s: Annotated[
        _Seconds,
        Meta(description="After an answer no wake word is needed for so many seconds."),
    ] = 8.0
    tones: Annotated[
        bool, Meta(description="A short tone when it begins to listen, and when it sleeps.")
    ] = True
    tools: Annotated[
        list[str],
        Meta(
            description='"builtin" (time, timers, alarms, volume, shopping list), FILE.py, '
            "FILE.json: see docs/talk.md."
        ),
    ] = msgspec.field(default_factory=lambda: ["builtin"])
    hooks: Annotated[
        str,
        Meta(
            description="A Python file of yours for an LED and a button; it has "
            'connect(press) -> on_state. "": none.'
        ),
    ] = ""
    barge_in: Annotated[
        bool,
        Meta(
            description="Speech stops an answer. Without, only the wake word, the stop word and "
            "the button do."
        ),
    ] = True
    echo: Annotated[
        Literal["auto", "aec", "system", "off"],
        Meta(description="What keeps its own voice out of the microphone; off: headphones."),
    ] = "auto"
    noise_suppression: Annotated[int, Meta(ge=0, le=4, description="0 (off) to 4.")] = 0
    gain: Annotated[
        int, Meta(ge=0, le=31, description="Automatic gain: 0 (off), or up to 31 dB.")
    ] = 0
    pause_s: Annotated[
        float, Meta(ge=0.1, le=5, description="Seconds of silence that end an utterance.")
    ] = 0.6
    adaptive_pause: Annotated[
        bool, Meta(description="Half to twice of that, by how somebody speaks.")
    ] = True
    pad_audio: Annotated[
        bool,
        Meta(description="Fill each clip to 188 rows as transformers does: answers come later."),
    ] = False
    transcript: Annotated[
        bool,
        Meta(description="Keep what was said in transcript.jsonl (`edge-gemma assistant log`)."),
    ] = False
    transcript_mib: Annotated[
        int, Meta(ge=1, le=1024, description="It takes no more than this; the oldest goes.")
    ] = 10
    transcribe: Annotated[
        bool,
        Meta(
            description="Have the model write down what you say, too, before it answers. Answers "
            "come later."
        ),
    ] = False
    resume: Annotated[
        bool,
        Meta(description="After a restart, go on with the conversation of before."),
    ] = False
    state: Annotated[
        str,
        Meta(description='Where timers, lists and all else is kept. "": the folder state here.'),
    ] = ""
    slots: Annotated[
        dict[str, str],
        Meta(
            description='What fills the persona\'s slots, like style = "cheerful": see `edge-gemma '
            "personas`."
        ),
    ] = {}
    model: Annotated[Planning, Meta(description="How the model is loaded and sampled.")] = (
        Planning()
    )


@dataclasses.dataclass(frozen=True)
class Home:
    """An assistant's folder and what its file says."""

    folder: Path
    settings: Settings

    @property
    def state(self) -> Path:
        return self.path(self.settings.state or "state")

    def path(self, name: str) -> Path:
        """A file named in assistant.toml."""
        return self.folder / Path(name).expanduser()

    def found(self, name: str) -> str:
        """Names, with commas between them, that may be those of files: a file's where there is
        one.
        """
        return ",".join(map(self._found, name.split(",")))

    def _found(self, name: str) -> str:
        head, dot, tail = name.partition(".onnx")
        path = self.path(head + dot)
        return f"{path}{tail}" if head and path.is_file() else name


def read_home(folder: Path) -> Home:
    """Raises UsageError."""
    path = folder / FILE_NAME
    if not path.exists():
        raise UsageError(
            f"{folder} holds no {FILE_NAME}; make one with: edge-gemma assistant init {folder}"
        )
    data = read_bounded(path, _MAX_BYTES, "a few lines of settings")
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {first_line(error)}") from None
    return Home(folder, _settings(table, path))


def _settings(table: dict[str, Any], path: Path) -> Settings:
    _check_keys(table, Settings, path)
    if isinstance(table.get("model"), dict):
        _check_keys(table["model"], Planning, path, "model.")
    try:
        found = msgspec.convert(table, Settings)
    except (msgspec.ValidationError, RecursionError) as error:
        what, _, where = first_line(error).partition(" - at `$.")
        key = where.rstrip("`") or "the file"
        raise UsageError(f"{path}: {key}: {_plain(what, key)}") from None
    for key, value in msgspec.structs.asdict(found).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{path}: {key} is {value}; expected a number")
        if isinstance(value, str) and "\0" in value:
            raise UsageError(f"{path}: {key} holds a NUL character")
    return found


_WORDS = {
    "`bool`": "true or false",
    "`str`": "text",
    "`int`": "a whole number",
    "`float`": "a number",
    "`object`": "a table",
    "`array`": "a list",
}


def _plain(what: str, key: str) -> str:
    """msgspec's reason, in plain words."""
    if what.startswith("Invalid enum value"):
        kind = Planning if key.startswith("model.") else Settings
        hint = get_type_hints(kind)[key.rpartition(".")[2]]
        return (
            f"{what.replace('Invalid enum value', 'it is')}; expected {', '.join(get_args(hint))}"
        )
    for name, word in _WORDS.items():
        what = what.replace(name, word)
    return what[:1].lower() + what[1:]


def _check_keys(table: dict[str, Any], kind: type, path: Path, prefix: str = "") -> None:
    known = [field.name for field in msgspec.structs.fields(kind)]
    for key in table:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, 3, 0.5)
        # keys behind a table's head belong to the table
        strayed = prefix and key in [field.name for field in msgspec.structs.fields(Settings)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        if strayed:
            hint = "it stands above [model]. "
        raise UsageError(
            f"{path}: {prefix}{key} is no setting; {hint}There are: {', '.join(known)}"
        )


def new_file(settings: Settings) -> str:
    """The text of assistant.toml: every key, and what it means."""
    lines = [
        "# An assistant by voice. Run it:    edge-gemma assistant run FOLDER",
        "#                        Check it:  edge-gemma assistant test FOLDER",
        "",
    ]
    tables: list[str] = []
    for name, description, value in _described(settings):
        if isinstance(value, Planning):
            tables += [*_comment(description), f"[{name}]"]
            for key, about, each in _described(value):
                tables += [*_comment(about), f"{key} = {_toml(each)}", ""]
        elif isinstance(value, dict):
            tables += [*_comment(description), f"[{name}]"]
            tables += [*(f"{_toml(key)} = {_toml(each)}" for key, each in value.items()), ""]
        else:
            lines += [*_comment(description), f"{name} = {_toml(value)}", ""]
    return "\n".join([*lines, *tables]).rstrip() + "\n"


def _described(record: msgspec.Struct) -> Iterator[tuple[str, str, object]]:
    """Name, description and value of each key."""
    for name, hint in get_type_hints(type(record), include_extras=True).items():
        if get_origin(hint) is Annotated:
            metas = [meta for meta in get_args(hint)[1:] if isinstance(meta, Meta)]
            text = next(meta.description for meta in reversed(metas) if meta.description)
            yield name, text, getattr(record, name)


def _comment(text: str) -> list[str]:
    lines, line = [], "#"
    for word in text.split():
        if len(line) + 1 + len(word) > _COLUMNS:
            lines.append(line)
            line = "#"
        line += f" {word}"
    return [*lines, line]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        # a JSON string is a TOML one, but for the characters that JSON leaves as they are
        return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
    return repr(value)
