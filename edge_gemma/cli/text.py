"""plan, run and chat."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.answering import finish, load_model, stats_line, stream
from edge_gemma.cli.common import (
    BundleArg,
    DebugOption,
    JsonOption,
    note,
    open_bundle,
    print_json,
)
from edge_gemma.cli.options import Loading, Planning, Sampling, grouped

if TYPE_CHECKING:
    from edge_gemma.bundles.manifest import Sense

System = Annotated[str | None, typer.Option("--system", help="System text.")]


def register(app: typer.Typer) -> None:
    app.command("plan")(grouped(plan))
    app.command("run")(grouped(run))
    app.command("chat")(grouped(chat))


def plan(
    bundle: BundleArg,
    planning: Planning = Planning(),
    text_only: Annotated[
        bool,
        typer.Option("--text-only", help="Plan without the bundle's audio and vision encoders."),
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what a bundle will take on a device, byte by byte, without loading it. Exit code 4 when
    it does not fit.
    """
    from edge_gemma.machine.probe import find_device
    from edge_gemma.machine.repack import repacked
    from edge_gemma.plan.ladder import make_plan

    found, target = open_bundle(bundle), find_device(planning.device)
    if planning.device == "auto":
        from edge_gemma.engines.llama.weights import repacked_here as repacks
    else:

        def repacks(tensor) -> bool:
            return repacked(tensor.type, tensor.shape, target.cpu_features)

    made = make_plan(found.manifest, target, planning.request(() if text_only else None), repacks)
    if as_json:
        print_json(made)
    else:
        _print_plan(found.manifest.name, target.name, made)
    if not made.fits:
        raise typer.Exit(4)


def _print_plan(name: str, device: str, made) -> None:
    from edge_gemma.plan.ladder import arithmetic
    from edge_gemma.units import format_bytes

    s = made.settings
    print(
        f"{name} on {device}: {'fits' if made.fits else 'does not fit'} in "
        f"{format_bytes(made.budget_bytes)}"
    )
    if not made.fits:
        print(made.refusal)
        return
    print(arithmetic(made))
    print(f"  {format_bytes(made.budget_bytes - made.needed_bytes):>10}  free of the budget")
    print(
        f"  {format_bytes(made.load_peak_bytes):>10}  for a moment while loading, of which "
        "reclaimable: "
        f"{format_bytes(sum(i.bytes for i in made.items if i.kind == 'reclaimable'))}"
    )
    print(
        f"settings: n_ctx {s.n_ctx}, n_ubatch {s.n_ubatch}, KV {s.kv_type}, "
        f"{'repacked' if any(i.name == 'weights, repacked' for i in made.items) else 'not repacked'}, "
        f"{s.n_threads} threads, {s.n_gpu_layers} GPU layers"
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
        return Path(value[1:]).read_text()
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
    sampling: Sampling = Sampling(),
    system: System = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", help="A picture to show first. Repeatable.")
    ] = None,
    audio: Annotated[
        list[str] | None, typer.Option("--audio", help="A sound to play first. Repeatable.")
    ] = None,
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
    loading: Loading = Loading(),
    stats: Annotated[
        bool, typer.Option("--stats", help="Show time and memory at the end.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer one prompt and leave. Instruct bundles get it as a user turn, base bundles (or --raw)
    continue it.
    """
    from edge_gemma.errors import UsageError
    from edge_gemma.machine.peak import PeakSampler
    from edge_gemma.messages import Audio, Image, Message

    if prompt in (None, "-"):
        if prompt is None and sys.stdin.isatty():
            raise UsageError("no prompt: give one, or pipe text in")
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    options = sampling.options(
        stop=tuple(stop or ()),
        grammar=_read_option(grammar, "--grammar"),
        schema=_schema(schema),
        logprobs=logprobs,
    )
    senses: tuple[Sense, ...] = (("audio",) if audio else ()) + (("vision",) if image else ())
    media = [*map(Image, image or ()), *map(Audio, audio or ())]

    with PeakSampler() as sampler:
        model, load_s = load_model(bundle, loading, senses)
        sampler.rebase()  # a plan's peak counts from the end of load
        with model:
            session = model.session()
            templated = not raw and (model.bundle.manifest.instruct or system)
            started = time.perf_counter()
            if templated:
                messages = ([Message("system", system)] if system else []) + [
                    Message("user", model.media([*media, prompt]) if media else prompt)
                ]
                spans = model.prompt.spans(messages, encode=model.encode)
            else:
                spans = model.prompt.raw(model.media([*media, prompt]), encode=model.encode)
            session.replace(spans)
            answer = stream(session.generate(options), session.cancel, quiet=as_json)
            wall_s = time.perf_counter() - started
        planned = model.plan.total_bytes
    finish(answer, load_s, wall_s, planned, sampler.peak_pss_bytes, as_json=as_json, stats=stats)


HELP = """/image PATH [question]   show a picture      /audio PATH [question]   play a sound
/save FILE  /load FILE   keep and take up    /reset                   forget the turns
/stats                   figures of the last answer                   /exit or Ctrl-D
Ctrl-C stops an answer, not the chat. A line that ends in \\ goes on."""


def chat(
    bundle: BundleArg,
    system: System = None,
    sampling: Sampling = Sampling(max_tokens=1024),
    loading: Loading = Loading(),
    stats: Annotated[
        bool, typer.Option("--stats", help="Show time and memory after each answer.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Talk with a bundle. /help lists what can be typed besides words."""
    from edge_gemma.errors import EdgeGemmaError

    options = sampling.options()
    model, _ = load_model(bundle, loading)
    with model, model.chat(system=system) as talk:
        manifest = model.bundle.manifest
        if not manifest.instruct:
            note(
                f"{manifest.name} holds base weights: they continue text rather than answer. "
                "For conversation use an instruct bundle (its name ends in -it)."
            )
        if sys.stdin.isatty():
            note(f"{manifest.name}, {talk.session.n_ctx} tokens of context. /help for commands.")
            import readline  # noqa: F401  (line editing and history for input())
        last = None
        while (line := _read_line()) is not None:
            try:
                content = _command(line, talk, last)
                if content is None:
                    continue
                last = _answer(talk, content, options) or last
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


def _command(line: str, talk, last):
    """A line → what to send, or None when it was a command or empty."""
    from edge_gemma.errors import UsageError
    from edge_gemma.messages import Audio, Image

    word, _, rest = line.strip().partition(" ")
    if not word:
        return None
    if not word.startswith("/"):
        return line
    if word in ("/exit", "/quit"):
        raise _Leave
    if word == "/help":
        note(HELP)
    elif word == "/reset":
        talk.reset()
        note("forgotten")
    elif word in ("/save", "/load"):
        if not rest:
            raise UsageError(f"{word} needs a file")
        (talk.save if word == "/save" else talk.restore)(rest)
        note(
            f"{'saved to' if word == '/save' else 'taken up from'} {rest}: "
            f"{len(talk.messages)} messages"
        )
    elif word == "/stats":
        note(stats_line(last) if last else "no answer yet")
    elif word in ("/image", "/audio"):
        path, _, question = rest.partition(" ")
        if not path:
            raise UsageError(f"{word} needs a file")
        return [
            (Image if word == "/image" else Audio)(path),
            *([question] if question.strip() else []),
        ]
    else:
        raise UsageError(f"{word} is no command; /help lists them")
    return None


def _answer(talk, content, options):
    end = stream(talk.send(content, options), talk.cancel).end
    print()
    if end is None or end.usage is None:
        note("stopped before the answer began; the turn was taken back")
        return None
    if end.usage.dropped_turns:
        note(f"the context was full: the {end.usage.dropped_turns} oldest turns were forgotten")
    if end.finish_reason in ("length", "context"):
        note(
            "(cut at "
            f"{'--max-tokens' if end.finish_reason == 'length' else 'the end of the context'})"
        )
    return end
