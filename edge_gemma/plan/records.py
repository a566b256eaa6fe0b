"""What goes into a plan and comes out of it: request, settings, items, plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_gemma.bundles.manifest import SENSES, Manifest, Sense
from edge_gemma.errors import PlanRefused

PHASES = ("load", "listen", "look", "prefill", "decode")
AFTER_LOAD = PHASES[1:]
DECODER_ALONE = ("load", "prefill", "decode")  # the phases in which no encoder is open
MAX_DRAFT = 15  # tokens that the commands have proposed at a time; each takes a row of logits
EMBED_TEXTS = 32  # that an embedding model computes in one pass, at most
Kind = Literal["anon", "file_hot", "file_cold", "reclaimable"]
Engine = Literal["llama", "onnx"]
EngineChoice = Literal["auto", "llama", "onnx"]
# where the ladder begins: a small context in small steps, the usual one, or a large one
Level = Literal["efficiency", "balanced", "performance"]
# All stay open; or each is opened when it is needed and closed before the other; or the decoder's
# mapped weights make room, too, and come back when the encoder was closed.
Encoders = Literal["resident", "one at a time", "hear first"]


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
    rescore: bool = False  # the best candidates again with the token embedding (finer_head_rows)
    guidance: bool = True  # schemas by llguidance's tables, else by llama.cpp's grammar
    n_draft: int = 0  # tokens that are proposed out of the text itself and verified in one pass
    prompt_cache_bytes: int = 0  # for kept states of the KV cache; 0: none are kept
    encoders: Encoders = "resident"
    engine: Engine = "llama"
    prepacked_bytes: int = 0  # of onnxruntime's packed weights in a file that is mapped


@dataclass(frozen=True)
class PlanRequest:
    """What the caller wants. ``None`` leaves the choice, and the conceding, to the plan."""

    budget_bytes: int | None = None
    n_ctx: int | None = None
    n_ubatch: int | None = None
    n_seq_max: int = 1
    n_threads: int | None = None
    kv_type: str | None = None
    repack: bool | None = None
    n_gpu_layers: int | None = None
    senses: tuple[Sense, ...] | None = None  # whose encoders to count; None: all the bundle has
    encoders: Encoders | None = None
    lora_bytes: int = 0
    # for kept states of the KV cache; None: as much as serves, and less where that does not fit
    prompt_cache_bytes: int | None = 0
    n_draft: int | None = 0  # None: MAX_DRAFT, or none where that does not fit
    structured: bool = False  # answers will be held to JSON schemas: count what that takes
    level: Level = "balanced"
    rescore: bool | None = None  # None: where the bundle's head is coarser than its embedding
    engine: EngineChoice = "auto"  # llama.cpp, or onnxruntime; auto: see plan.engine_for
    # of onnxruntime's packed weights, where they are kept in a file on this machine
    prepacked_bytes: int = 0


@dataclass(frozen=True)
class Item:
    """One line of a plan.

    ``kind``: anon (only swap could take it), file_hot (mapped and read for every token), file_cold
    (mapped, a few rows per token), reclaimable (clean pages that hurt nobody when taken).
    """

    name: str
    bytes: int
    kind: Kind
    phases: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """``total_bytes`` is the maximum over the phases after load of that phase's sum: what will be
    resident at the peak.

    ``load_peak_bytes`` counts the clean file pages too that loading maps for a moment; the kernel
    may take those back at any time, so they decide nothing.
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

    def require(self) -> Plan:
        """This plan, or PlanRefused with the arithmetic and the nearest request that fits."""
        if not self.fits:
            raise PlanRefused(self.refusal, self)
        return self


def wanted_senses(manifest: Manifest, request: PlanRequest) -> tuple[Sense, ...]:
    """The senses whose encoders a plan counts."""
    present = {"audio": manifest.audio, "vision": manifest.vision}
    if request.senses is None:
        return tuple(sense for sense in SENSES if present[sense] is not None)
    return request.senses
