"""What runs a bundle fastest on this machine: measured once, kept, and used by ``load``.

In: a bundle. Out: engine, threads and the size of a prefill step, in a small file of this machine
and these weights; and, for the ONNX engine, packed weights in a file. A coarser decoder is never
chosen for its speed: that would change what is answered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import Manifest
from edge_gemma.engines.engine import Context, Weights
from edge_gemma.engines.llama.weights import repacked_here
from edge_gemma.engines.onnx.prepacked import (
    find_prepacked,
    forget_prepacked,
    kept_bytes,
    make_prepacked,
)
from edge_gemma.engines.opening import open_weights
from edge_gemma.errors import (
    EdgeGemmaError,
    PlanRefused,
    RuntimeFailure,
    UnsupportedModel,
    UsageError,
)
from edge_gemma.files import cache_folder, written_whole
from edge_gemma.machine.device import Device
from edge_gemma.machine.probe import cpu_kind, machine_for
from edge_gemma.plan.engines import engine_for
from edge_gemma.plan.ladder import make_plan
from edge_gemma.plan.records import Engine, Plan, PlanRequest
from edge_gemma.spans import Tokens

# a turn whose time is compared: of a question with its context, of an answer
PROMPT_TOKENS, ANSWER_TOKENS = 256, 64
_N_CTX = 1024
_DECODE_STEPS = 24
_ROUNDS = 2
_SLOW_S = 20.0  # of one measurement: no second round
_MARGIN = 0.95  # an engine or setting is changed for a gain that is more than noise
_UBATCHES = (128, 512)  # beside the plan's own
_MAX_BYTES = 1 << 16
# recipes by how far answers lie from the whole weights' (docs/convert.md), the nearest first
_BY_DIVERGENCE = tuple(
    """f32 bf16 f16 q8_0 q6_k q5_k_m q4_k_m q4_k_s edge iq4_nl iq4_xs edge_fast edge_onnx q4_0
    q3_k_m""".split()
)
Tell = Callable[[str], None]


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine with one setting: the best of the rounds."""

    engine: Engine
    n_threads: int
    n_ubatch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float

    @property
    def turn_s(self) -> float:
        return PROMPT_TOKENS / self.prefill_tokens_per_s + ANSWER_TOKENS / self.decode_tokens_per_s


class Tuned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was chosen, and what it was chosen from."""

    bundle: str
    chosen: Measured
    measured: tuple[Measured, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Asked:
    bundle: Bundle
    device: Device
    tell: Tell


def kept_in(bundle: Bundle) -> Path:
    """The file of this bundle on this machine with these libraries; made or not."""
    hashes = sorted(
        f"{name} {file.sha256}"
        for name, file in bundle.manifest.files.items()
        if name.startswith("decoder.")
    )
    releases = [_release(name) for name in ("llama-cpp-python", "onnxruntime")]
    key = hashlib.sha256("\n".join((*hashes, *releases, cpu_kind())).encode()).hexdigest()
    return cache_folder("tuned") / f"{key[:32]}.json"


def find_tuned(bundle: Bundle) -> Tuned | None:
    """What :func:`tune` kept; None where it was not run, or its file is broken."""
    try:
        with open(kept_in(bundle), "rb") as file:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=Tuned)
    except (OSError, ValueError):
        return None


def plan_here(bundle: Bundle, device: Device, request: PlanRequest) -> Plan:
    """A plan for this machine: what the request leaves open is as it was tuned, where that fits,
    and packed weights that are kept are counted as they lie. Raises UsageError, UnsupportedModel.
    """
    manifest = bundle.manifest
    first = _as_tuned(bundle, request, device)
    made = make_plan(manifest, device, _with_packed(bundle, first), repacked_here)
    if made.fits or first is request:
        return made
    return make_plan(manifest, device, _with_packed(bundle, request), repacked_here)


def _as_tuned(bundle: Bundle, request: PlanRequest, device: Device) -> PlanRequest:
    found = find_tuned(bundle)
    if found is None:
        return request
    chosen = found.chosen
    engine = request.engine
    if engine == "auto" and chosen.engine == "onnx" and _runs_all(bundle.manifest, request):
        engine = "onnx"
    runs = "llama" if engine == "auto" else engine
    if runs != chosen.engine:
        return request
    threads = request.n_threads or min(chosen.n_threads, device.n_threads)
    n_ubatch = request.n_ubatch
    if n_ubatch is None and request.level == "balanced" and bundle.manifest.vision is None:
        n_ubatch = chosen.n_ubatch  # a picture has a smallest step of its own
    return dataclasses.replace(request, engine=engine, n_threads=threads, n_ubatch=n_ubatch)


def _runs_all(manifest: Manifest, request: PlanRequest) -> bool:
    """Whether the ONNX engine does all that is asked, and all that may be asked later. Several
    sequences at once were not measured: it runs them one after the other.
    """
    if request.n_seq_max > 1:
        return False
    if manifest.family == "gemma3" and manifest.vision and request.senses is None:
        return False
    try:
        engine_for(manifest, dataclasses.replace(request, engine="onnx"))
    except (UsageError, UnsupportedModel):
        return False
    return True


def _with_packed(bundle: Bundle, request: PlanRequest) -> PlanRequest:
    part = bundle.manifest.onnx
    if request.engine != "onnx" or part is None:
        return request
    return dataclasses.replace(request, prepacked_bytes=kept_bytes(bundle, part))


def tune(bundle: Bundle, *, pack: bool = True, tell: Tell = lambda text: None) -> Tuned:
    """Measure, choose, keep. With ``pack`` the ONNX engine's weights are packed into a file first,
    where there is room. Raises UsageError (an embedding bundle), PlanRefused (nothing fits),
    RuntimeFailure.
    """
    manifest = bundle.manifest
    if manifest.embedding is not None:
        raise UsageError(f"{manifest.name} makes vectors of texts: there is nothing to choose")
    path = _made_folder_of(kept_in(bundle))  # before anything takes time
    asked = _Asked(bundle, machine_for("auto"), tell)
    notes: list[str] = []
    engines: list[Engine] = ["llama"]
    if manifest.onnx is not None:
        if said := _packed(asked, pack):
            notes.append(said)
        engines.append("onnx")
    found = _by_engine(asked, engines, notes)
    best = _chosen(manifest, found, notes)
    others = [each for each in found if each.engine != best.engine]
    near = _neighbours(asked, best)
    best = min(near, key=_favoured(near[0]))
    found = [*others, *near]
    tuned = Tuned(bundle=manifest.name, chosen=best, measured=tuple(found), notes=tuple(notes))
    with written_whole(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(tuned)))
    return tuned


def _made_folder_of(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise RuntimeFailure(
            f"cannot keep a choice in {path.parent}: {error.strerror}; set XDG_CACHE_HOME to a "
            "folder that can be written"
        ) from None
    return path


def _packed(asked: _Asked, pack: bool) -> str:
    """Pack where that is wanted and not done; what is to be said of it."""
    part = asked.bundle.manifest.onnx
    assert part is not None
    if find_prepacked(asked.bundle, part) is not None:
        return ""
    if not pack:
        return "weights were not packed into a file: the ONNX engine packs them at every load"
    asked.tell("packing the ONNX engine's weights")
    try:
        make_prepacked(asked.bundle, part, asked.device.n_threads)
    except EdgeGemmaError as error:
        return f"weights were not packed into a file: {error}"
    return ""


def _by_engine(asked: _Asked, engines: Sequence[Engine], notes: list[str]) -> list[Measured]:
    """Each engine with the plan's own settings, in turns, so that both see the same machine."""
    found: dict[Engine, Measured] = {}
    for round_ in range(_ROUNDS):
        for engine in engines:
            if engine in found and _measuring_s(found[engine]) > _SLOW_S:
                continue
            if round_ and engine not in found:
                continue
            try:
                measured = _measure(asked, PlanRequest(engine=engine, n_ctx=_N_CTX))
            except EdgeGemmaError as error:
                if engine == "llama" and len(engines) == 1:
                    raise
                notes.append(f"{engine} was not measured: {error}")
                continue
            found[engine] = _better(found.get(engine), measured)
    if not found:
        plan = make_plan(asked.bundle.manifest, asked.device, PlanRequest(), repacked_here)
        raise PlanRefused(plan.refusal or "; ".join(notes), plan)
    return list(found.values())


def _neighbours(asked: _Asked, best: Measured) -> list[Measured]:
    """The chosen engine as it was, with fewer threads, and with other prefill steps; in turns."""
    n, is_slow = best.n_threads, _measuring_s(best) > _SLOW_S
    usual = PlanRequest(engine=best.engine, n_ctx=_N_CTX)
    fewer = sorted({n - 1, n // 2} - {0, n}, reverse=True)
    requests = [usual, *(dataclasses.replace(usual, n_threads=each) for each in fewer)]
    if not is_slow:
        steps = (each for each in _UBATCHES if each != best.n_ubatch)
        requests += [dataclasses.replace(usual, n_ubatch=each) for each in steps]
    found: list[Measured | None] = [best, *[None] * (len(requests) - 1)]
    for _ in range(1 if is_slow else _ROUNDS):
        found = [
            _better(before, _measure(asked, request))
            for before, request in zip(found, requests, strict=True)
        ]
    return [each for each in found if each is not None]


def _measuring_s(measured: Measured) -> float:
    return (
        PROMPT_TOKENS / measured.prefill_tokens_per_s + _DECODE_STEPS / measured.decode_tokens_per_s
    )


def _measure(asked: _Asked, request: PlanRequest) -> Measured:
    request = _with_packed(asked.bundle, request)
    plan = make_plan(asked.bundle.manifest, asked.device, request, repacked_here).require()
    s = plan.settings
    threads = "1 thread" if s.n_threads == 1 else f"{s.n_threads} threads"
    asked.tell(f"{s.engine}, {threads}, {s.n_ubatch} tokens a step")
    with closing(open_weights(asked.bundle, plan)) as weights:
        context = weights.decoder.context()
        try:
            prefill_s, decode_s = _timed(context, _ids(weights))
        finally:
            context.close()
    return Measured(
        engine=s.engine,
        n_threads=s.n_threads,
        n_ubatch=s.n_ubatch,
        prefill_tokens_per_s=PROMPT_TOKENS / prefill_s,
        decode_tokens_per_s=_DECODE_STEPS / decode_s,
    )


def _ids(weights: Weights) -> list[int]:
    """Tokens from all over the vocabulary: their rows lie apart, as a text's do."""
    n = weights.decoder.n_vocab
    places = np.linspace(min(1000, n // 2), n - 1, PROMPT_TOKENS + _DECODE_STEPS)
    return [int(place) for place in places]


def _timed(context: Context, ids: list[int]) -> tuple[float, float]:
    """Seconds of a prefill and of single steps behind it."""
    context.decode(0, 0, Tokens(tuple(ids[:8])), "last")  # wakes threads, faults weights in
    context.clear(0)
    started = time.perf_counter()
    context.decode(0, 0, Tokens(tuple(ids[:PROMPT_TOKENS])), "last")
    prefilled = time.perf_counter()
    for i, token in enumerate(ids[PROMPT_TOKENS:]):
        context.decode_step([(0, PROMPT_TOKENS + i, [token])])
    return prefilled - started, time.perf_counter() - prefilled


def _better(one: Measured | None, other: Measured) -> Measured:
    """The best of both rounds: what disturbs a measurement makes it slower."""
    if one is None:
        return other
    return msgspec.structs.replace(
        one,
        prefill_tokens_per_s=max(one.prefill_tokens_per_s, other.prefill_tokens_per_s),
        decode_tokens_per_s=max(one.decode_tokens_per_s, other.decode_tokens_per_s),
    )


def _chosen(manifest: Manifest, found: Sequence[Measured], notes: list[str]) -> Measured:
    by_engine = {each.engine: each for each in found}
    if len(by_engine) < 2:
        return found[0]
    llama, onnx = by_engine["llama"], by_engine["onnx"]
    if onnx.turn_s >= _MARGIN * llama.turn_s:
        return llama
    if _is_coarser(manifest):
        assert manifest.onnx is not None
        notes.append(
            f"the ONNX decoder is faster, and coarser ({manifest.onnx.recipe}; the GGUF is "
            f"{manifest.recipe.get('name', 'of another recipe')}): it is not chosen; ask for it by "
            "name"
        )
        return llama
    return onnx


def _is_coarser(manifest: Manifest) -> bool:
    """Whether the ONNX decoder's answers lie further from the whole weights' than the GGUF's; so it
    is taken where a recipe is not known.
    """
    assert manifest.onnx is not None
    if manifest.onnx.recipe == manifest.recipe.get("name"):
        return False
    names = manifest.onnx.recipe, manifest.recipe.get("name", "")
    if not all(name in _BY_DIVERGENCE for name in names):
        return True
    onnx, gguf = map(_BY_DIVERGENCE.index, names)
    return onnx > gguf


def _favoured(best: Measured) -> Callable[[Measured], float]:
    """Seconds of a turn; another setting must be clearly better to be taken."""
    return lambda each: each.turn_s * (_MARGIN if each == best else 1.0)


def forget(bundle: Bundle) -> int:
    """Remove what was kept of this bundle on this machine; bytes that are free again."""
    path = kept_in(bundle)
    n_bytes = path.stat().st_size if path.is_file() else 0
    path.unlink(missing_ok=True)
    part = bundle.manifest.onnx
    return n_bytes + (forget_prepacked(bundle, part) if part else 0)


def _release(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"no {package}"
