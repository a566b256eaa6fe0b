"""plan, run and chat."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.answering import Answer, Cost, finish, load_model, stats_line, stream
from edge_gemma.cli.common import (
    BundleArg,
    JsonOption,
    StatsOption,
    note,
    open_bundle,
    print_json,
)
from edge_gemma.cli.options import (
    LOADING,
    PLANNING,
    SAMPLING,
    LoadingOptions,
    PlanningOptions,
    SamplingOptions,
    grouped,
)
from edge_gemma.cli.personas import TELLING, TellingOptions
from edge_gemma.cli.tools import ToolsOption, tools_of
from edge_gemma.sources import first_path, typed, typed_line
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.assistant.tools import Toolbox
    from edge_gemma.bundles.manifest import Sense
    from edge_gemma.conversation.chat import Chat
    from edge_gemma.conversation.stream import Chunk
    from edge_gemma.messages import Part
    from edge_gemma.model import Model
    from edge_gemma.options import Sampling
    from edge_gemma.plan.records import Plan

CHATTING = SamplingOptions(max_tokens=1024)


def register(app: typer.Typer) -> None:
    app.command("plan")(grouped(plan))
    app.command("run")(grouped(run))
    app.command("chat")(grouped(chat))


def plan(
    bundle: BundleArg,
    planning: PlanningOptions = PLANNING,
    text_only: Annotated[
        bool,
        typer.Option("--text-only", help="Plan without the bundle's audio and vision encoders."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a bundle will take on a device, byte by byte. Nothing is loaded. Exit code 4 when it
    does not fit.
    """
    from edge_gemma.machine.probe import find_device
    from edge_gemma.model import plan_bundle

    found = open_bundle(bundle)
    request = planning.request(() if text_only else None)
    made = plan_bundle(found, device=planning.device, request=request)
    if as_json:
        print_json(made)
    else:
        _print_plan(found.manifest.name, find_device(planning.device).name, made)
    if not made.fits:
        raise typer.Exit(4)


def _print_plan(name: str, device: str, made: Plan) -> None:
    from edge_gemma.plan.ladder import arithmetic

    if not made.fits:
        print(made.refusal)
        return
    print(f"{name} on {device}: fits in {format_bytes(made.budget_bytes)}")
    free = format_bytes(made.budget_bytes - made.needed_bytes)
    load_peak = format_bytes(made.load_peak_bytes)
    reclaimable_bytes = sum(item.bytes for item in made.items if item.kind == "reclaimable")
    print(arithmetic(made))
    print(f"  {free:>10}  free of the budget")
    print(
        f"  {load_peak:>10}  for a moment while loading, of which reclaimable: "
        f"{format_bytes(reclaimable_bytes)}"
    )
    settings = made.settings
    is_repacked = any(item.name == "weights, repacked" for item in made.items)
    print(
        f"settings: n_ctx {settings.n_ctx}, n_ubatch {settings.n_ubatch}, "
        f"KV {settings.kv_type}, {'repacked' if is_repacked else 'not repacked'}, "
        f"{settings.n_threads} threads, {settings.n_gpu_layers} GPU layers"
    )
    for line in made.concessions:
        print(f"conceded: {line}")
    for line in made.notes:
        print(f"note: {line}")


def _read_option(value: str | None, what: str) -> str | None:
    """A file's text for @FILE, or the value itself."""
    from edge_gemma.errors import UsageError

    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(typed(value[1:])).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {what} from {value[1:]}: {error}") from None


def _schema(value: str | None) -> dict | None:
    import json

    from edge_gemma.errors import UsageError

    text = _read_option(value, "--schema")
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--schema is not JSON: {error}") from None


def run(
    bundle: BundleArg,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - or nothing reads it from stdin.")
    ] = None,
    sampling: SamplingOptions = SAMPLING,
    telling: TellingOptions = TELLING,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="A picture to show first. Repeatable.")
    ] = None,
    audio: Annotated[
        list[str] | None, typer.Option("--audio", help="A sound to play first. Repeatable.")
    ] = None,
    tools: ToolsOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    schema: Annotated[
        str | None, typer.Option("--schema", help="Answer in JSON of this schema; text or @FILE.")
    ] = None,
    grammar: Annotated[
        str | None, typer.Option("--grammar", help="Answer in this GBNF grammar; text or @FILE.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="With --json: this many alternatives for each token."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End at this text. Repeatable.")
    ] = None,
    loading: LoadingOptions = LOADING,
    stats: StatsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt and leave. Instruct bundles get it as a user turn, base bundles (or --raw)
    continue it.
    """
    from dataclasses import replace

    from edge_gemma.errors import UsageError
    from edge_gemma.machine.peak import PeakSampler
    from edge_gemma.messages import Audio, Image

    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json: plain text has no place for them")
    system = telling.system_text()
    if raw and system:
        raise UsageError(
            "give --raw, or --system and --persona, not both: raw text has no system turn"
        )
    if tools and (raw or schema or grammar):
        raise UsageError("give --tools or one of --raw, --schema and --grammar")
    toolbox = tools_of(tools)
    text = _prompt(prompt)
    media: list[Part] = [*map(Image, image or ()), *map(Audio, audio or ())]
    content = [*media, text] if media else text
    options = replace(
        sampling.sampling(bundle),
        stop=tuple(stop or ()),
        grammar=_read_option(grammar, "--grammar"),
        schema=_schema(schema),
        logprobs=logprobs,
    )
    senses: list[Sense] = []
    if audio:
        senses.append("audio")
    if image:
        senses.append("vision")
    with PeakSampler() as peak:
        model, load_s = load_model(
            bundle,
            loading,
            tuple(senses),
            structured=options.schema is not None or toolbox is not None,
        )
        if said := _cut_note(model, text):
            note(said)
        peak.rebase()  # a plan's peak counts from the end of load
        with model:
            started = time.perf_counter()
            if not raw and (model.bundle.manifest.instruct or system or toolbox):
                with Speaking(model, system, toolbox) as talk:
                    chunks = talk.send(content, options)
                    answer = stream(chunks, talk.cancel, quiet=as_json)
                    if talk.asks:
                        note("nobody can say yes here, so it is not done; use: edge-gemma chat")
            else:
                answer = _continue(model, [*media, text], options, quiet=as_json)
            wall_s = time.perf_counter() - started
    cost = Cost(load_s, wall_s, model.plan.total_bytes, peak.peak_pss_bytes)
    finish(answer, cost, as_json=as_json, stats=stats)


def _prompt(given: str | None) -> str:
    """The prompt as given, or from stdin. Raises UsageError where there is none."""
    from edge_gemma.errors import UsageError

    if given is None and sys.stdin.isatty():
        raise UsageError("no prompt: give one, or pipe text in")
    if given in (None, "-"):
        given = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    if not given or not given.strip():
        raise UsageError("the prompt is empty")
    return given


def _continue(model: Model, parts: Sequence[Part], options: Sampling, *, quiet: bool) -> Answer:
    """The parts as they are, without the chat template, and what the model makes of them."""
    session = model.session()
    session.replace(model.spans(parts))
    return stream(session.generate(options), session.cancel, quiet=quiet)


HELP = """/image PATH [question]   show a picture      /audio PATH [question]   play a sound
/save FILE  /load FILE   keep and take up    /reset                   forget the turns
/stats                   figures of the last answer                   /exit or Ctrl-D
Ctrl-C stops an answer, not the chat. A line that ends in \\ goes on."""


def chat(
    bundle: BundleArg,
    telling: TellingOptions = TELLING,
    tools: ToolsOption = None,
    sampling: SamplingOptions = CHATTING,
    loading: LoadingOptions = LOADING,
    stats: StatsOption = False,
) -> None:
    """Talk with a bundle. /help lists what can be typed besides words."""
    options = sampling.sampling(bundle)
    system = telling.system_text()
    toolbox = tools_of(tools)
    model, _ = load_model(bundle, loading, structured=toolbox is not None)
    with model, Speaking(model, system, toolbox) as speaking:
        talk = speaking.chat
        manifest = model.bundle.manifest
        if not manifest.instruct:
            note(
                f"{manifest.name} holds base weights: they continue text rather than answer. "
                "For conversation use an instruct bundle (its name ends in -it); a GGUF that has "
                "no chat template and follows turns is imported with --instruct."
            )
        if sys.stdin.isatty():
            note(f"{manifest.name}, {talk.session.n_ctx} tokens of context. /help for commands.")
            import readline  # noqa: F401  (line editing and history for input())
        _converse(speaking, options, stats, partial(_cut_note, model))


def _cut_note(model: Model, text: str) -> str | None:
    """What to say of a text that the bundle's vocabulary was not cut for."""
    from edge_gemma.prompts.cut_vocabulary import cut_vocabulary_note

    part = model.bundle.manifest.vocabulary
    if part is None:
        return None
    return cut_vocabulary_note(part, text, [model.decoder.piece(i) for i in model.tokenize(text)])


class Speaking:
    """A written conversation, with tools or without: what was asked for a dangerous one is asked
    here, and the next line is the answer.
    """

    def __init__(self, model: Model, system: str | None, toolbox: Toolbox | None):
        from edge_gemma.assistant.tool_loop import ToolLoop

        self.chat = model.chat(system=system, tools=toolbox.specs if toolbox else ())
        self._loop = ToolLoop(self.chat, toolbox) if toolbox else None
        self._stopped = threading.Event()

    def send(self, content: str | list[Part], options: Sampling) -> Iterator[Chunk]:
        if self._loop is None:
            return self.chat.send(content, options)
        self._stopped.clear()
        return self._loop.send(
            content, options, stopped=self._stopped, tell=lambda line: note(f"({line})")
        )

    @property
    def asks(self) -> bool:
        """Whether a question waits for yes or no."""
        return self._loop is not None and self._loop.asks

    def cancel(self) -> None:
        self._stopped.set()
        self.chat.cancel()

    def __enter__(self) -> Speaking:
        return self

    def __exit__(self, *_: object) -> None:
        self.chat.close()


def _converse(
    speaking: Speaking, options: Sampling, stats: bool, note_on: Callable[[str], str | None]
) -> None:
    """Read a line, answer it, until /exit or the end of the input. What ``note_on`` says of a line
    is told once.
    """
    from edge_gemma.errors import EdgeGemmaError

    talk = speaking.chat
    last: Chunk | None = None
    is_told = False
    while (line := _read_line()) is not None:
        try:
            if not is_told and (said := note_on(line)):
                note(said)
                is_told = True
            content = _command(line, talk, last)
            if content is None:
                continue
            last = _answer(speaking, content, options) or last
            if stats and last:
                note(stats_line(last))
        except _Leave:
            return
        except EdgeGemmaError as error:
            note(f"edge-gemma: {error}")


class _Leave(Exception):
    pass


def _read_line() -> str | None:
    """The next input, or None at its end. Ctrl-C clears the line."""
    lines: list[str] = []
    while True:
        try:
            line = input(("> " if not lines else ". ") if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return "\n".join(lines) or None
        except KeyboardInterrupt:
            print()
            lines = []
            continue
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        lines.append(line)
        return "\n".join(lines)


def _command(line: str, talk: Chat, last: Chunk | None) -> str | list[Part] | None:
    """A line → what to send, or None when it was a command or empty."""
    from edge_gemma.errors import UsageError

    word, _, rest = line.strip().partition(" ")
    if not word.startswith("/"):
        return line if word else None
    if word in ("/exit", "/quit"):
        raise _Leave
    if word in ("/image", "/audio"):
        return _media_turn(word, rest)
    if word in ("/save", "/load"):
        _keep(talk, word, rest)
    elif word == "/help":
        note(HELP)
    elif word == "/reset":
        talk.reset()
        note("forgotten")
    elif word == "/stats":
        note(stats_line(last) if last else "no answer yet")
    else:
        raise UsageError(f"{word} is no command; /help lists them")
    return None


def _media_turn(word: str, rest: str) -> list[Part]:
    """``/image`` or ``/audio``: a file and, behind it, the question."""
    from edge_gemma.messages import Audio, Image

    path, question = first_path(rest)
    _require_file(word, path)
    parts: list[Part] = [Image(path) if word == "/image" else Audio(path)]
    return [*parts, question] if question else parts


def _keep(talk: Chat, word: str, rest: str) -> None:
    """``/save`` or ``/load``."""
    path = typed_line(rest)
    _require_file(word, path)
    if word == "/save":
        talk.save(path)
        note(f"saved to {path}: {len(talk.messages)} messages")
    else:
        talk.restore(path)
        note(f"taken up from {path}: {len(talk.messages)} messages")


def _require_file(word: str, path: str) -> None:
    from edge_gemma.errors import UsageError

    if not path:
        raise UsageError(f"{word} needs a file")


def _answer(speaking: Speaking, content: str | list[Part], options: Sampling) -> Chunk | None:
    end = stream(speaking.send(content, options), speaking.cancel).end
    print()
    if end is not None and end.usage is None and end.finish_reason == "stop":
        return None  # a sentence that no model made
    if end is None or end.usage is None:
        note("stopped before the answer began; the turn was taken back")
        return None
    if end.usage.dropped_turns:
        note(f"the context was full: the {end.usage.dropped_turns} oldest turns were forgotten")
    if end.finish_reason == "length":
        note("(cut at --max-tokens)")
    elif end.finish_reason == "context":
        note("(cut at the end of the context)")
    return end
