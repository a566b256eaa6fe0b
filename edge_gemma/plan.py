"""Manifest + device + request → an itemised list of bytes, or a refusal that shows the arithmetic. Pure: no I/O, no clock.

The cost formulas live here, beside the ladder of concessions. Nothing is allocated before a plan says yes, and what was
planned is held against what was measured by ``edge-gemma demo`` and the benchmarks.

The ladder, taken in this order until the request fits; a setting the caller named is never conceded:

1. ``n_ubatch`` 256 → 128 → 64: smaller compute buffers, slower prefill. Never below 256 where an image must fit one ubatch.
2. KV cache f16 → q8_0: half the cache, a small loss of precision.
3. ``n_ctx`` 4096 → 2048 → 1024 → 512.
4. Encoders one at a time: each is opened when it is needed and closed before the next, instead of both staying open.
5. No repacked weights: slower (about a third), but then every weight is a clean file page that the kernel may take back.
   With repacked weights, which are anonymous, the plan keeps HEADROOM free, so that pressure never falls on the hot pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .bundle import Manifest, Tensor
from .device import Device
from .errors import PlanRefused, UsageError
from .units import MiB, format_bytes

PHASES = ("load", "listen", "look", "prefill", "decode")
AFTER_LOAD = PHASES[1:]
KV_BYTES = {"f16": (2, 1), "q8_0": (34, 32), "q4_0": (18, 32)}  # bytes per values
DEFAULT_N_CTX = 4096
N_CTX_LADDER = (4096, 2048, 1024, 512)
N_UBATCH_LADDER = (256, 128, 64)
MIN_N_CTX = 64

# Measured on x86-64 Linux, CPython 3.11, by `python -m edge_gemma.benchmarks.spine base`: PSS of the process with this package
# and llama.cpp loaded, no model; and what loading a vocabulary adds.
RUNTIME_ANON_BYTES = 36 * MiB
RUNTIME_FILE_BYTES = 15 * MiB
VOCABULARY_BYTES_PER_TOKEN = 120
GRAPH_BYTES_PER_LAYER = 128 << 10  # ggml's graph and scheduler nodes
ONNXRUNTIME_BYTES = 32 * MiB  # the library once it was used, with an opened audio graph; it stays when an encoder is let go. `python -m edge_gemma.benchmarks.hear memory`
VISION_GRAPH_BYTES = 13 * MiB  # an opened vision graph, its weights mapped; `python -m edge_gemma.benchmarks.vision run`
PICTURE_BYTES = 7 * 12_000_000  # a 12-megapixel photograph while it is decoded (vision.DECODE_BYTES_PER_PIXEL)
HEADROOM = 0.04  # of the total, kept free when anonymous repacked weights could starve the mapped ones

Kind = Literal["anon", "file_hot", "file_cold", "reclaimable"]


@dataclass(frozen=True)
class Settings:
    """What a plan decided for one decoder. Sizes in tokens."""

    n_ctx: int
    n_ubatch: int = 256
    n_seq_max: int = 1
    n_threads: int = 1
    kv_type: str = "f16"
    repack: bool = True
    n_gpu_layers: int = 0
    flash_attention: bool = True
    encoders: Literal["resident", "one at a time"] = "resident"


@dataclass(frozen=True)
class Request:
    """What the caller wants. ``None`` leaves the choice, and the conceding, to the plan."""

    budget_bytes: int | None = None
    n_ctx: int | None = None
    n_ubatch: int | None = None
    n_seq_max: int = 1
    n_threads: int | None = None
    kv_type: str | None = None
    repack: bool | None = None
    n_gpu_layers: int | None = None
    encoders: tuple[str, ...] | None = None  # of "audio", "vision"; None: all the bundle has
    lora_bytes: int = 0


@dataclass(frozen=True)
class Item:
    """One line of a plan. ``kind``: anon (only swap could take it), file_hot (mapped and read for every token), file_cold
    (mapped, a few rows per token), reclaimable (clean pages that hurt nobody when taken)."""

    name: str
    bytes: int
    kind: Kind
    phases: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """``total_bytes`` is the maximum over the phases after load of that phase's sum: what will be resident at the peak.

    ``load_peak_bytes`` counts the clean file pages too that loading maps for a moment; the kernel may take those back at any
    time, so they decide nothing.
    """

    fits: bool
    total_bytes: int
    load_peak_bytes: int
    budget_bytes: int
    needed_bytes: int  # total and the headroom that repacked weights ask for
    items: tuple[Item, ...]
    settings: Settings
    concessions: tuple[str, ...]
    notes: tuple[str, ...] = ()
    refusal: str = ""

    def phase_bytes(self, phase: str) -> int:
        return sum(item.bytes for item in self.items if phase in item.phases)

    def require(self) -> "Plan":
        """This plan, or PlanRefused with the arithmetic and the nearest request that fits."""
        if not self.fits:
            raise PlanRefused(self.refusal, self)
        return self


def make_plan(manifest: Manifest, device: Device, request: Request, repacks: Callable[[Tensor], bool]) -> Plan:
    """Plan ``request`` for a bundle on a device. Never raises for what merely does not fit: see :meth:`Plan.require`.

    ``repacks`` tells whether the device's llama.cpp copies a matmul weight into a repacked buffer. Raises UsageError for a
    request that no memory could satisfy (a context beyond the model, an encoder the bundle lacks).
    """
    _check(manifest, request)
    budget = device.usable_bytes if request.budget_bytes is None else min(request.budget_bytes, device.usable_bytes)
    costs = _Costs(manifest, device, request, repacks)
    first = candidate = None
    for settings, concessions in _ladder(manifest, device, request):
        items = costs.items(settings)
        candidate = _plan(items, settings, concessions, budget, request)
        first = first or candidate
        if candidate.fits:
            return replace(candidate, notes=_notes(device, settings, request, budget))
    refusal = _refusal(candidate, manifest, device, request, costs, budget)
    return replace(candidate, refusal=refusal, notes=_notes(device, candidate.settings, request, budget))


def _check(manifest: Manifest, request: Request) -> None:
    train = manifest.decoder.n_ctx_train
    if request.n_ctx is not None and not MIN_N_CTX <= request.n_ctx <= train:
        raise UsageError(f"a context of {request.n_ctx} tokens was asked for; {manifest.name} takes {MIN_N_CTX} … {train}")
    if request.n_ubatch is not None and not 1 <= request.n_ubatch <= 4096:
        raise UsageError(f"n_ubatch is {request.n_ubatch}; expected 1 … 4096")
    if not 1 <= request.n_seq_max <= 64:
        raise UsageError(f"{request.n_seq_max} parallel sequences were asked for; expected 1 … 64")
    if request.n_threads is not None and not 1 <= request.n_threads <= 512:
        raise UsageError(f"{request.n_threads} threads were asked for; expected 1 … 512")
    if request.kv_type is not None and request.kv_type not in KV_BYTES:
        raise UsageError(f"KV type {request.kv_type!r} is unknown; expected one of {', '.join(KV_BYTES)}")
    for encoder in request.encoders or ():
        if encoder not in ("audio", "vision"):
            raise UsageError(f"encoder {encoder!r} is unknown; expected audio or vision")
        if getattr(manifest, encoder) is None:
            verb = {"audio": "hear", "vision": "see"}[encoder]
            raise UsageError(f"{manifest.name} is a bundle without {'an' if encoder == 'audio' else 'a'} {encoder} encoder, so it cannot {verb}; convert the checkpoint with --{encoder}")


def _wanted_encoders(manifest: Manifest, request: Request) -> tuple[str, ...]:
    present = tuple(name for name in ("audio", "vision") if getattr(manifest, name) is not None)
    return present if request.encoders is None else request.encoders


def _ladder(manifest: Manifest, device: Device, request: Request) -> Iterator[tuple[Settings, tuple[str, ...]]]:
    """Settings from the most comfortable to the most frugal, with what was conceded on the way."""
    encoders = _wanted_encoders(manifest, request)
    train = manifest.decoder.n_ctx_train
    settings = Settings(
        n_ctx=request.n_ctx or min(DEFAULT_N_CTX, train),
        n_ubatch=request.n_ubatch or N_UBATCH_LADDER[0],
        n_seq_max=request.n_seq_max,
        n_threads=request.n_threads or device.n_threads,
        kv_type=request.kv_type or "f16",
        repack=True if request.repack is None else request.repack,
        n_gpu_layers=request.n_gpu_layers or 0,
    )
    done: tuple[str, ...] = ()
    yield settings, done

    image_in_one = manifest.vision is not None and manifest.family == "gemma3" and "vision" in encoders
    if request.n_ubatch is None and not image_in_one:
        for n_ubatch in N_UBATCH_LADDER[1:]:
            settings = replace(settings, n_ubatch=n_ubatch)
            yield settings, (*done, f"n_ubatch {n_ubatch}: slower prefill")
        done = (*done, f"n_ubatch {settings.n_ubatch}: slower prefill")
    if request.kv_type is None:
        settings, done = replace(settings, kv_type="q8_0"), (*done, "KV cache in q8_0: a small loss of precision")
        yield settings, done
    if request.n_ctx is None:
        before = done
        for n_ctx in N_CTX_LADDER:
            if n_ctx < settings.n_ctx:
                settings, done = replace(settings, n_ctx=n_ctx), (*before, f"context of {n_ctx} tokens")
                yield settings, done
    if len(encoders) > 1:
        settings, done = replace(settings, encoders="one at a time"), (*done, "encoders one at a time: each loads when it is needed")
        yield settings, done
    if request.repack is None and settings.n_gpu_layers == 0:
        settings, done = replace(settings, repack=False), (*done, "weights not repacked: slower, every weight reclaimable")
        yield settings, done


class _Costs:
    """The cost of settings for one manifest on one device. Sums over the tensor table are taken once."""

    def __init__(self, manifest: Manifest, device: Device, request: Request, repacks: Callable[[Tensor], bool]):
        self.manifest, self.device, self.request = manifest, device, request
        tensors = manifest.decoder.tensors
        matmul = [t for t in tensors if t.use == "matmul"]
        self.matmul_bytes = sum(t.nbytes for t in matmul)
        self.repacked_bytes = sum(t.nbytes for t in tensors if t.use != "lookup" and repacks(t))
        self.mapped_beside_copies_bytes = sum(t.nbytes for t in matmul if not repacks(t))
        self.cold_bytes = sum(t.nbytes for t in tensors if t.use != "matmul")
        self.file_bytes = manifest.files[manifest.decoder.file].size
        self.lookups = [t for t in tensors if t.use == "lookup"]
        self.embedding = next((t for t in tensors if t.name == "token_embd.weight"), None)
        self.embedding_repacked = self.embedding is not None and self.embedding.use == "matmul" and repacks(self.embedding)
        self.encoders = _wanted_encoders(manifest, request)

    def items(self, s: Settings) -> tuple[Item, ...]:
        decoder, device = self.manifest.decoder, self.device
        rows = [Item("python and libraries", RUNTIME_ANON_BYTES, "anon", PHASES), Item("library code", RUNTIME_FILE_BYTES, "file_hot", PHASES)]
        rows.append(Item("vocabulary", decoder.n_vocab * VOCABULARY_BYTES_PER_TOKEN, "anon", PHASES))
        repacked = self.repacked_bytes if s.repack and not s.n_gpu_layers else 0
        copied = self._offloaded(s.n_gpu_layers) if s.n_gpu_layers else repacked
        if copied:
            rows.append(Item("weights, on the GPU" if s.n_gpu_layers else "weights, repacked", copied, "anon", PHASES))
        mapped = self.mapped_beside_copies_bytes if copied and not s.n_gpu_layers else self.matmul_bytes - copied
        if mapped > 0:
            rows.append(Item("weights, mapped", mapped, "file_hot", PHASES))
        rows += self._cold(s, copied)
        rows += self._kv(s)
        rows.append(Item("compute buffers", self.compute_bytes(s), "anon", AFTER_LOAD))
        # the output row of each sequence, and llama_token_data (12 bytes) for each candidate
        rows.append(Item("logits and sampling", decoder.n_vocab * (4 * s.n_seq_max + 12), "anon", ("prefill", "decode")))
        if self.request.lora_bytes:
            rows.append(Item("LoRA adapters", self.request.lora_bytes, "anon", PHASES))
        rows += self._encoders(s)
        if device.can_release and self.file_bytes > mapped:
            # MAP_POPULATE maps the whole file before the first progress callback lets the cold part go
            rows.append(Item("file pages mapped while loading", self.file_bytes - mapped, "reclaimable", ("load",)))
        return tuple(rows)

    def _offloaded(self, n_gpu_layers: int) -> int:
        n_layer = self.manifest.decoder.n_layer
        share = 1.0 if n_gpu_layers < 0 or n_gpu_layers > n_layer else n_gpu_layers / n_layer
        return int(self.matmul_bytes * share)

    def _cold(self, s: Settings, copied: int) -> list[Item]:
        if not self.device.can_release:
            stays = self.file_bytes - (self.mapped_beside_copies_bytes if copied else self.matmul_bytes)
            return [Item("cold weights (this platform cannot release them)", stays, "file_cold", PHASES)] if stays > 0 else []
        tables = list(self.lookups)
        if self.embedding_repacked and copied:
            tables.append(self.embedding)
        if not tables:
            return []
        # A row lies on 1 + row/page pages on average. A turn touches at most n_ctx different tokens; natural text about a quarter
        # of that. The pages are let go after every turn (weights.py), so this is a bound per turn, not a growth.
        page = self.device.page_bytes
        row_bytes = [t.nbytes // t.shape[1] for t in tables]
        touched = sum((1 + r / page) * page for r in row_bytes) * min(s.n_ctx // 4, 2048) * s.n_seq_max
        return [Item("cold rows in use", min(int(touched), sum(t.nbytes for t in tables)), "file_cold", ("prefill", "decode", "listen", "look"))]

    def _kv(self, s: Settings) -> list[Item]:
        decoder = self.manifest.decoder
        values, per = KV_BYTES[s.kv_type]
        cell = 2 * decoder.n_head_kv * decoder.head_dim * values // per  # K and V of one layer
        n_global = sum(kind == "global" for kind in decoder.kv_layers)
        n_sliding = len(decoder.kv_layers) - n_global
        rows = []
        if n_global:
            rows.append(Item("KV cache, global layers", n_global * cell * _pad(s.n_ctx) * s.n_seq_max, "anon", AFTER_LOAD))
        if n_sliding:
            rows.append(Item("KV cache, sliding layers", n_sliding * cell * self.sliding_cells(s) * s.n_seq_max, "anon", AFTER_LOAD))
        return rows

    def sliding_cells(self, s: Settings) -> int:
        """llama-kv-cache-iswa.cpp: the window and one ubatch, padded to 256."""
        return _pad(min(_pad(s.n_ctx), self.manifest.decoder.sliding_window + s.n_ubatch))

    def compute_bytes(self, s: Settings) -> int:
        """Activations of one ubatch, by token: fitted to within 3 % of what llama.cpp 0.3.36 reserves for all five sizes."""
        d = self.manifest.decoder
        floats = 3 * d.n_ff + 4 * d.n_embd
        if d.ple_width:  # AltUp keeps four streams, twice at the widest point, and the per-layer inputs of all layers
            floats = 3 * d.n_ff + 10 * d.n_embd + d.ple_width * d.n_layer
        masks = 2 * (_pad(s.n_ctx) + self.sliding_cells(s))  # f16
        if not s.flash_attention:
            masks += 4 * d.n_head * _pad(s.n_ctx)
        return s.n_ubatch * (4 * floats + masks) + GRAPH_BYTES_PER_LAYER * d.n_layer

    def _encoders(self, s: Settings) -> list[Item]:
        rows = []
        always = s.encoders == "resident"
        if self.encoders:
            rows.append(Item("onnxruntime", ONNXRUNTIME_BYTES, "anon", AFTER_LOAD))
        if "audio" in self.encoders:
            audio = self.manifest.audio
            rows.append(Item("audio encoder weights", audio.weights_bytes, "anon", AFTER_LOAD if always else ("listen",)))
            rows.append(Item("audio encoder activations", audio.activation_bytes, "anon", ("listen",)))
        if "vision" in self.encoders:
            vision = self.manifest.vision
            # used as they lie in the mapped file (encode.py, in_place)
            rows.append(Item("vision encoder weights", vision.weights_bytes, "file_hot", AFTER_LOAD if always else ("look",)))
            rows.append(Item("vision encoder, its graph", VISION_GRAPH_BYTES, "anon", AFTER_LOAD if always else ("look",)))
            rows.append(Item("picture being read", PICTURE_BYTES, "anon", ("look",)))
            # a conversation keeps its pictures' soft tokens; a whole context of them at most
            rows.append(Item("soft tokens of pictures", 4 * s.n_ctx * self.manifest.decoder.n_embd, "anon", AFTER_LOAD))
            rows.append(Item("vision encoder activations", vision.activation_bytes.get(str(vision.image_sizes[0]), 0), "anon", ("look",)))
        return rows


def _pad(n: int, to: int = 256) -> int:
    return -(-n // to) * to


def _plan(items: tuple[Item, ...], settings: Settings, concessions: tuple[str, ...], budget: int, request: Request) -> Plan:
    def phase_sum(phase: str, kinds=("anon", "file_hot", "file_cold")) -> int:
        return sum(i.bytes for i in items if phase in i.phases and i.kind in kinds)

    total = max(phase_sum(phase) for phase in AFTER_LOAD)
    load_peak = sum(i.bytes for i in items if "load" in i.phases)
    repacked = any(i.name == "weights, repacked" for i in items)
    needed = total + (int(HEADROOM * total) if repacked and any(i.kind != "anon" and i.name.startswith(("weights", "cold")) for i in items) else 0)
    return Plan(needed <= budget, total, load_peak, budget, needed, items, settings, concessions)


def _notes(device: Device, settings: Settings, request: Request, budget: int) -> tuple[str, ...]:
    notes = []
    if request.budget_bytes is not None and budget < request.budget_bytes:
        notes.append(f"the budget of {format_bytes(request.budget_bytes)} was lowered to the {format_bytes(budget)} that {device.name} has to give")
    if not device.can_release:
        notes.append("this platform cannot give cold file pages back: the whole file counts")
    return tuple(notes)


def arithmetic(plan: Plan) -> str:
    """The sum of a plan's worst phase, line by line."""
    phase = max(AFTER_LOAD, key=lambda p: sum(i.bytes for i in plan.items if p in i.phases and i.kind != "reclaimable"))
    lines = [f"  {format_bytes(i.bytes):>10}  {i.name}" for i in plan.items if phase in i.phases and i.kind != "reclaimable"]
    lines.append(f"  {format_bytes(plan.total_bytes):>10}  in use at the peak ({phase})")
    if plan.needed_bytes > plan.total_bytes:
        lines.append(f"  {format_bytes(plan.needed_bytes - plan.total_bytes):>10}  headroom beside repacked weights")
    return "\n".join(lines)


def _refusal(plan: Plan, manifest: Manifest, device: Device, request: Request, costs: _Costs, budget: int) -> str:
    conceded = "; ".join(plan.concessions) or "nothing could be conceded"
    return (
        f"{manifest.name} does not fit: {format_bytes(plan.needed_bytes)} needed, {format_bytes(budget)} to spend on {device.name}.\n"
        f"{arithmetic(plan)}\n  already conceded: {conceded}\n  nearest that fits: {_nearest(plan, manifest, device, request, costs, budget)}"
    )


def _nearest(plan: Plan, manifest: Manifest, device: Device, request: Request, costs: _Costs, budget: int) -> str:
    """The largest context under this budget; else the request without encoders; else the smallest budget at all."""

    def fits(settings: Settings, with_costs: _Costs = costs) -> Plan:
        return _plan(with_costs.items(settings), settings, (), budget, request)

    if request.n_ctx is not None:
        low, high = 0, request.n_ctx // 256
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(replace(plan.settings, n_ctx=middle * 256)).fits else (low, middle - 1)
        if low:
            return f"--ctx {low * 256}"
    smallest = replace(plan.settings, n_ctx=min(512, manifest.decoder.n_ctx_train))
    if costs.encoders:
        without = _Costs(manifest, device, replace(request, encoders=()), lambda t: False)
        without.repacked_bytes, without.mapped_beside_copies_bytes = costs.repacked_bytes, costs.mapped_beside_copies_bytes
        without.embedding_repacked = costs.embedding_repacked
        if fits(smallest, without).fits:
            return f"the same without its {' and '.join(costs.encoders)} encoder, --ctx {smallest.n_ctx}"
    floor = fits(replace(smallest, repack=False) if request.repack is None else smallest)
    if request.budget_bytes is not None and floor.needed_bytes <= device.usable_bytes:
        return f"--budget {-(-floor.needed_bytes // MiB)}MiB --ctx {smallest.n_ctx}"
    return f"a device with {format_bytes(floor.needed_bytes)} to spend, --ctx {smallest.n_ctx}; or a smaller recipe or model"
