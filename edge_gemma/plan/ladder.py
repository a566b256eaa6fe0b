"""Manifest + device + request → an itemised list of bytes, or a refusal that shows the arithmetic.

Pure: no I/O, no clock.

The cost formulas live here, beside the ladder of concessions. Nothing is allocated before a plan
says yes, and what was planned is held against what was measured by ``edge-gemma demo`` and the
benchmarks.

The ladder, taken in this order until the request fits; a setting the caller named is never
conceded:

0. At the level ``performance``, which begins with 16384 tokens of context and 512 of a prefill
   step: context → 8192 → 4096. ``efficiency`` begins with 2048 and 128, ``balanced`` with 4096 and
   256. Then the prompt cache, where it was left to the plan: four states of a whole context, two,
   one, none; and drafts, which take rows of logits.
1. ``n_ubatch`` 256 → 128 → 64: smaller compute buffers, slower prefill. Never below 256 where an
   image must fit one ubatch.
2. ``n_ctx`` 4096 → 2048. Before the KV cache, which costs every prompt time: on a CPU, prefill
   with q8_0 ran at 0.77 of its speed with f16 behind 512 tokens, at 0.65 behind 2048 and at 0.60
   behind 3840 (real 270M); decode kept its speed.
3. KV cache f16 → q8_0: half the cache, a small loss of precision, slower prefill. Then ``n_ctx``
   → 1024 → 512.
4. Encoders one at a time: each is opened when it is needed and closed before the next, instead of
   both staying open.
5. Structured output, where it was asked for, by llama.cpp's grammar instead of llguidance's tables:
   fewer schema keywords.
6. No repacked weights: slower (about a third), but then every weight is a clean file page that the
   kernel may take back. With repacked weights, which are anonymous, the plan keeps HEADROOM free,
   so that pressure never falls on the hot pages.
7. The best candidates are not scored again with the finer rows: those rows then stay on the disk.
8. Hear first, then decode (the same for pictures). Once more from the top, without repacked
   weights: the encoder is open alone, its soft tokens wait, and the decoder's mapped weights are
   read again when it was closed. Only where one conversation at a time is served, and where pages
   can be given back. It comes last because every turn waits for that.

A model that embeds concedes context and repacking alone: a text is computed in one ubatch of
``n_ctx`` tokens, and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

from edge_gemma.bundles.manifest import SENSES, Manifest, Tensor, finer_head_rows, require
from edge_gemma.errors import UsageError
from edge_gemma.machine.device import Device
from edge_gemma.plan.costs import HEADROOM, KV_TYPES, Costs
from edge_gemma.plan.engines import ONNX_KV_TYPE, engine_for, onnx_part
from edge_gemma.plan.records import (
    AFTER_LOAD,
    MAX_DRAFT,
    Encoders,
    Item,
    Level,
    Plan,
    PlanRequest,
    Settings,
    wanted_senses,
)
from edge_gemma.units import MiB, format_bytes

LARGE_N_CTX_LADDER = (8192, 4096)  # from what only the level performance begins with
N_CTX_LADDER = (4096, 2048, 1024, 512)
N_UBATCH_LADDER = (256, 128, 64)
Done = tuple[str, ...]  # what was conceded, for people
Rung = tuple[Settings, Done]
# where a board's profile does not say how fast its disk is: of a memory card in a Raspberry Pi 4
# (pidramble.com/wiki/benchmarks/microsd-cards), and of a SATA SSD on USB 3
CARD_MB_S, SSD_MB_S = 43.0, 400.0
NOT_REPACKED = "weights not repacked: slower, every weight reclaimable"
KV_PRICE = "KV cache in q8_0: a small loss of precision, prefill up to 1.7 times slower on a CPU"
# level → (context, ubatch) that the ladder begins with
LEVELS: dict[Level, tuple[int, int]] = {
    "efficiency": (2048, 128),
    "balanced": (4096, 256),
    "performance": (16384, 512),
}
MIN_N_CTX = 64
PROMPT_CACHE_STATES = (4, 2, 1, 0)  # of a whole context, that are kept unless bytes are named


def make_plan(
    manifest: Manifest, device: Device, request: PlanRequest, repacks: Callable[[Tensor], bool]
) -> Plan:
    """Plan ``request`` for a bundle on a device.

    Never raises for what merely does not fit: see :meth:`Plan.require`.

    ``repacks`` tells whether the device's llama.cpp copies a matmul weight into a repacked buffer.
    Raises UsageError for a request that no memory could satisfy (a context beyond the model),
    UnsupportedModel for an encoder that the bundle lacks.
    """
    _check(manifest, request)
    budget = (
        device.usable_bytes
        if request.budget_bytes is None
        else min(request.budget_bytes, device.usable_bytes)
    )
    costs = Costs(manifest, device, request, repacks)
    if request.encoders == "hear first" and costs.senses and not costs.may_hear_first(request):
        raise UsageError(
            "hearing first needs weights that can be let go (Linux, none on the GPU) and one "
            f"conversation at a time; there are {request.n_seq_max} sequences and "
            f"{request.n_gpu_layers or 0} GPU layers on {device.name}"
        )
    for settings, concessions in _ladder(manifest, device, request, costs):
        candidate = _plan(costs.items(settings), settings, concessions, budget)
        if candidate.fits:
            break
    notes = _notes(device, request, budget)
    if candidate.fits:
        return replace(candidate, notes=notes)
    refusal = _refusal(candidate, manifest, device, request, costs)
    return replace(candidate, refusal=refusal, notes=notes)


def _check(manifest: Manifest, request: PlanRequest) -> None:
    engine_for(manifest, request)
    train = manifest.decoder.n_ctx_train
    if request.n_ctx is not None and not MIN_N_CTX <= request.n_ctx <= train:
        raise UsageError(
            f"a context of {request.n_ctx} tokens was asked for; {manifest.name} takes "
            f"{MIN_N_CTX} … {train}"
        )
    if request.n_ubatch is not None and not 1 <= request.n_ubatch <= 4096:
        raise UsageError(f"n_ubatch is {request.n_ubatch}; expected 1 … 4096")
    if request.n_ubatch is not None and manifest.embedding is not None:
        raise UsageError(
            f"n_ubatch is {request.n_ubatch}; {manifest.name} embeds a text in one ubatch, so it "
            "is n_ctx: give that"
        )
    if not 1 <= request.n_seq_max <= 64:
        raise UsageError(f"{request.n_seq_max} parallel sequences were asked for; expected 1 … 64")
    if request.n_threads is not None and not 1 <= request.n_threads <= 512:
        raise UsageError(f"{request.n_threads} threads were asked for; expected 1 … 512")
    if request.kv_type is not None and request.kv_type not in KV_TYPES:
        raise UsageError(
            f"KV type {request.kv_type!r} is unknown; expected one of {', '.join(KV_TYPES)}"
        )
    if request.level not in LEVELS:
        raise UsageError(f"level {request.level!r} is unknown; expected one of {', '.join(LEVELS)}")
    if request.n_draft is not None and not 0 <= request.n_draft <= 64:
        raise UsageError(f"drafts of {request.n_draft} tokens were asked for; expected 0 … 64")
    if request.rescore and finer_head_rows(manifest.decoder) is None:
        raise UsageError(
            f"{manifest.name} keeps no finer rows of its output head, so candidates cannot be "
            "scored again; recipes with untied = true do (edge, edge_fast)"
        )
    _check_senses(manifest, request)


def _check_senses(manifest: Manifest, request: PlanRequest) -> None:
    if request.encoders not in (None, *get_args(Encoders)):
        raise UsageError(
            f"encoders {request.encoders!r} is unknown; expected one of "
            f"{', '.join(get_args(Encoders))}"
        )
    for sense in request.senses or ():
        if sense not in SENSES:
            raise UsageError(f"sense {sense!r} is unknown; expected {' or '.join(SENSES)}")
        require(manifest, sense)


def _ladder(
    manifest: Manifest, device: Device, request: PlanRequest, costs: Costs
) -> Iterator[Rung]:
    """Settings from the most comfortable to the most frugal, with what was conceded on the way."""
    senses = wanted_senses(manifest, request)
    train = manifest.decoder.n_ctx_train
    start_n_ctx, start_n_ubatch = LEVELS[request.level]
    image_in_one_ubatch = manifest.family == "gemma3" and "vision" in senses
    if image_in_one_ubatch:
        start_n_ubatch = max(start_n_ubatch, N_UBATCH_LADDER[0])
    n_ctx = request.n_ctx or min(start_n_ctx, train)
    settings = Settings(
        n_ctx=n_ctx,
        n_ubatch=request.n_ubatch or start_n_ubatch,
        n_seq_max=request.n_seq_max,
        n_threads=request.n_threads or device.n_threads,
        kv_type=request.kv_type or "f16",
        repack=True if request.repack is None else request.repack,
        n_gpu_layers=request.n_gpu_layers or 0,
        prompt_cache_bytes=request.prompt_cache_bytes or 0,
        n_draft=MAX_DRAFT if request.n_draft is None else request.n_draft,
        rescore=request.rescore is not False and finer_head_rows(manifest.decoder) is not None,
        encoders=request.encoders or "resident",
        engine=engine_for(manifest, request),
    )
    if settings.engine == "onnx":
        n_most = onnx_part(manifest).n_positions
        settings = replace(
            settings,
            n_ctx=min(settings.n_ctx, n_most),
            kv_type=ONNX_KV_TYPE,
            repack=False,
            rescore=False,
            prepacked_bytes=request.prepacked_bytes,
        )
        request = replace(request, kv_type=ONNX_KV_TYPE, repack=False)  # nothing to concede
    if manifest.embedding is not None:
        settings = replace(settings, n_ubatch=n_ctx, prompt_cache_bytes=0, n_draft=0)
        yield from _embedding_ladder(settings, request)
        return
    smallest = 256 if image_in_one_ubatch else 0
    hears_first = costs.may_hear_first(request)
    if not (hears_first and request.encoders == "hear first"):
        yield from _descent((settings, ()), request, costs, smallest)
    if hears_first and request.encoders in (None, "hear first"):
        yield from _descent(_hearing_first(settings, request, costs), request, costs, smallest)


def _hearing_first(settings: Settings, request: PlanRequest, costs: Costs) -> Rung:
    """Where the ladder begins once more. Copies of weights cannot be let go while one listens, so
    there are none.
    """
    settings = replace(settings, encoders="hear first")
    done: Done = (hear_first_price(settings, costs),)
    if request.repack is None and costs.repacked_bytes and not settings.n_gpu_layers:
        settings = replace(settings, repack=False)
        done = (hear_first_price(settings, costs), NOT_REPACKED)
    return settings, done


def hear_first_price(settings: Settings, costs: Costs) -> str:
    """What hearing first costs, in bytes of the disk and seconds."""
    encoder_bytes, weights_bytes = costs.read_again_bytes(settings)
    known = costs.device.read_mb_s
    disks = {"a memory card": CARD_MB_S, "an SSD": SSD_MB_S}
    times = "; ".join(
        f"{encoder_bytes / 1e6 / mb_s:.0f} s and {weights_bytes / 1e6 / mb_s:.0f} s from {disk} "
        f"that reads {mb_s:.0f} MB/s"
        for disk, mb_s in ({"this board's card": known} if known else disks).items()
    )
    return (
        f"hear first, then decode: for each turn the {' and '.join(costs.senses)} encoder is "
        f"opened ({format_bytes(encoder_bytes)}) and closed, and the answer waits until the "
        f"decoder's weights are read again (at most {format_bytes(weights_bytes)}): {times}"
    )


def _descent(first: Rung, request: PlanRequest, costs: Costs, smallest: int) -> Iterator[Rung]:
    """From one rung on, everything that can be conceded, in the ladder's order."""
    settings, done = first
    last: Rung = next(_prompt_caches(settings, done, request, costs), first)
    yield last
    steps: list[Callable[[Rung], Iterator[Rung]]] = [
        lambda rung: _contexts(*rung, request, LARGE_N_CTX_LADDER),
        lambda rung: _prompt_caches(*rung, request, costs),
        lambda rung: _no_drafts(*rung, request),
        lambda rung: _ubatches(*rung, request, smallest),
        lambda rung: _contexts(*rung, request, N_CTX_LADDER[:2]),
        lambda rung: _smaller_kv(*rung, request),
        lambda rung: _contexts(*rung, request, N_CTX_LADDER),
        lambda rung: _late(*rung, request, len(costs.senses)),
    ]
    for step in steps:
        for rung in step(last):
            last = rung  # the next step goes on from where this one ended
            yield rung


def _contexts(
    settings: Settings, done: Done, request: PlanRequest, sizes: tuple[int, ...]
) -> Iterator[Rung]:
    before = tuple(line for line in done if not line.startswith("context"))
    for n_ctx in sizes:
        if request.n_ctx is None and n_ctx < settings.n_ctx:
            settings = replace(settings, n_ctx=n_ctx)
            yield settings, (*before, f"context of {n_ctx} tokens")


def _no_drafts(settings: Settings, done: Done, request: PlanRequest) -> Iterator[Rung]:
    if request.n_draft is None:
        yield (
            replace(settings, n_draft=0),
            (*done, "no drafts out of the text: fewer tokens a pass"),
        )


def _smaller_kv(settings: Settings, done: Done, request: PlanRequest) -> Iterator[Rung]:
    if request.kv_type is None:
        yield replace(settings, kv_type="q8_0"), (*done, KV_PRICE)


def _late(settings: Settings, done: Done, request: PlanRequest, n_senses: int) -> Iterator[Rung]:
    """What is conceded when nothing else can be: encoders, llguidance's tables, repacking."""
    if n_senses > 1 and request.encoders is None and settings.encoders == "resident":
        settings = replace(settings, encoders="one at a time")
        done = (*done, "encoders one at a time: each loads when it is needed")
        yield settings, done
    if request.structured:
        settings = replace(settings, guidance=False)
        done = (*done, "structured output by llama.cpp's grammar: fewer schema keywords")
        yield settings, done
    if request.repack is None and settings.n_gpu_layers == 0 and settings.repack:
        settings = replace(settings, repack=False)
        done = (*done, NOT_REPACKED)
        yield settings, done
    if request.rescore is None and settings.rescore:
        yield (
            replace(settings, rescore=False),
            (*done, "candidates not scored again: the output head's own precision"),
        )


def _ubatches(
    settings: Settings, done: Done, request: PlanRequest, smallest: int
) -> Iterator[Rung]:
    for n_ubatch in N_UBATCH_LADDER:
        if request.n_ubatch is None and smallest <= n_ubatch < settings.n_ubatch:
            settings = replace(settings, n_ubatch=n_ubatch)
            yield settings, (*done, f"n_ubatch {n_ubatch}: slower prefill")


def _prompt_caches(
    settings: Settings, done: Done, request: PlanRequest, costs: Costs
) -> Iterator[Rung]:
    for n_states in PROMPT_CACHE_STATES if request.prompt_cache_bytes is None else ():
        kept_bytes = n_states * costs.state_bytes(settings)
        size = f"prompt cache of {format_bytes(kept_bytes)}" if kept_bytes else "no prompt cache"
        conceded = (
            () if n_states == PROMPT_CACHE_STATES[0] else (f"{size}: more is prefilled again",)
        )
        yield replace(settings, prompt_cache_bytes=kept_bytes), (*done, *conceded)


def _embedding_ladder(settings: Settings, request: PlanRequest) -> Iterator[Rung]:
    """For a model that embeds: a text is computed in one ubatch, and there is no KV cache."""
    done: tuple[str, ...] = ()
    yield settings, done
    if request.n_ctx is None:
        for n_ctx in N_CTX_LADDER:
            if n_ctx < settings.n_ctx:
                settings = replace(settings, n_ctx=n_ctx, n_ubatch=n_ctx)
                done = (f"texts of at most {n_ctx} tokens",)
                yield settings, done
    if request.repack is None and settings.n_gpu_layers == 0:
        settings = replace(settings, repack=False)
        yield settings, (*done, NOT_REPACKED)


def _plan(
    items: tuple[Item, ...], settings: Settings, concessions: tuple[str, ...], budget: int
) -> Plan:
    total = max(_in_use(items, phase) for phase in AFTER_LOAD)
    load_peak = sum(item.bytes for item in items if "load" in item.phases)
    repacked = any(item.name == "weights, repacked" for item in items)
    mapped = any(
        item.kind != "anon" and item.name.startswith(("weights", "cold")) for item in items
    )
    needed = total + (int(HEADROOM * total) if repacked and mapped else 0)
    return Plan(
        fits=needed <= budget,
        total_bytes=total,
        load_peak_bytes=load_peak,
        budget_bytes=budget,
        needed_bytes=needed,
        items=items,
        settings=settings,
        concessions=concessions,
    )


def _in_use(items: tuple[Item, ...], phase: str) -> int:
    """What is resident in a phase: all but the pages that hurt nobody when they are taken."""
    in_phase = (item for item in items if phase in item.phases)
    return sum(item.bytes for item in in_phase if item.kind != "reclaimable")


def _notes(device: Device, request: PlanRequest, budget: int) -> tuple[str, ...]:
    notes = []
    if request.budget_bytes is not None and budget < request.budget_bytes:
        notes.append(
            f"the budget of {format_bytes(request.budget_bytes)} was lowered to the "
            f"{format_bytes(budget)} that {device.name} has to give"
        )
    if not device.can_release:
        notes.append("this platform cannot give cold file pages back: the whole file counts")
    return tuple(notes)


def arithmetic(plan: Plan) -> str:
    """The sum of a plan's worst phase, line by line."""
    phase = max(AFTER_LOAD, key=lambda name: _in_use(plan.items, name))
    lines = [
        f"  {format_bytes(item.bytes):>10}  {item.name}"
        for item in plan.items
        if phase in item.phases and item.kind != "reclaimable"
    ]
    lines.append(f"  {format_bytes(plan.total_bytes):>10}  in use at the peak ({phase})")
    if plan.needed_bytes > plan.total_bytes:
        lines.append(
            f"  {format_bytes(plan.needed_bytes - plan.total_bytes):>10}  headroom beside "
            "repacked weights"
        )
    if plan.settings.encoders == "hear first":
        listening = max(_in_use(plan.items, name) for name in ("listen", "look"))
        lines.append(
            f"  {format_bytes(listening):>10}  in use while an encoder is open; the decoder's "
            "weights are not"
        )
    return "\n".join(lines)


def _refusal(
    plan: Plan, manifest: Manifest, device: Device, request: PlanRequest, costs: Costs
) -> str:
    conceded = "; ".join(plan.concessions) or "nothing could be conceded"
    nearest = _nearest(plan, manifest, device, request, costs)
    missing = format_bytes(plan.needed_bytes - plan.budget_bytes)
    return (
        f"{manifest.name} does not fit: {format_bytes(plan.needed_bytes)} needed, "
        f"{format_bytes(plan.budget_bytes)} to spend on {device.name}: {missing} too little.\n"
        f"{arithmetic(plan)}\n  already conceded: {conceded}\n  nearest that fits: {nearest}"
    )


def _nearest(
    plan: Plan, manifest: Manifest, device: Device, request: PlanRequest, costs: Costs
) -> str:
    """The largest context under this budget; else the request without encoders; else the smallest
    budget at all.
    """

    def planned(settings: Settings, with_costs: Costs = costs) -> Plan:
        return _plan(with_costs.items(settings), settings, (), plan.budget_bytes)

    if request.n_ctx is not None:
        n_ctx = _largest_context(
            request.n_ctx, lambda n: planned(replace(plan.settings, n_ctx=n)).fits
        )
        if n_ctx:
            return f"--ctx {n_ctx}"
    smallest = replace(plan.settings, n_ctx=min(512, manifest.decoder.n_ctx_train))
    if costs.senses and planned(smallest, costs.without_senses()).fits:
        encoders = " and ".join(costs.senses)
        return f"the same without its {encoders} encoder, --ctx {smallest.n_ctx}"
    floor = planned(replace(smallest, repack=False) if request.repack is None else smallest)
    if request.budget_bytes is not None and floor.needed_bytes <= device.usable_bytes:
        return f"--budget {-(-floor.needed_bytes // MiB)}MiB --ctx {smallest.n_ctx}"
    return (
        f"a device with {format_bytes(floor.needed_bytes)} to spend, --ctx {smallest.n_ctx}; or "
        "a smaller recipe or model"
    )


def _largest_context(below: int, fits: Callable[[int], bool], step: int = 256) -> int:
    """The largest multiple of ``step`` up to ``below`` that fits, or 0; by bisection."""
    low, high = 0, below // step
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle - 1
    return low * step
