"""What each part of a loaded model takes, as formulas with visible arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy

from edge_gemma.bundles.gguf import TYPE_SIZES
from edge_gemma.bundles.manifest import (
    AudioPart,
    Manifest,
    Tensor,
    VisionPart,
    finer_head_rows,
    is_loaded_to_multiply,
    require,
)
from edge_gemma.machine.device import Device
from edge_gemma.machine.footprint import RUNTIME_ANON_BYTES, RUNTIME_FILE_BYTES
from edge_gemma.plan.engines import onnx_part
from edge_gemma.plan.onnx_costs import onnx_decoder_items
from edge_gemma.plan.records import (
    AFTER_LOAD,
    DECODER_ALONE,
    EMBED_TEXTS,
    PHASES,
    Item,
    PlanRequest,
    Settings,
    wanted_senses,
)
from edge_gemma.units import KiB, MiB

KV_TYPES = ("f16", "q8_0", "q4_0")  # of the KV cache, by their ggml names in lower case
KV_PADDING = 256  # cells; llama.cpp rounds a cache up to it
# What loading a vocabulary adds, measured as RUNTIME_ANON_BYTES is.
VOCABULARY_BYTES_PER_TOKEN = 120
GRAPH_BYTES_PER_LAYER = 128 * KiB  # ggml's graph and scheduler nodes
# The library once it was used, with an opened audio graph; it stays when an encoder is let go.
# Measured by `edge-gemma bench run listening`.
ONNXRUNTIME_BYTES = 32 * MiB
# An opened vision graph, its weights mapped; `edge-gemma bench run pictures`.
VISION_GRAPH_BYTES = 13 * MiB
# A 12-megapixel photograph while it is decoded: RGBA and its RGB copy stand together.
PICTURE_BYTES = 12_000_000 * (4 + 3)
# llguidance's tables of a vocabulary, while they are made (afterwards 170): measured on Gemma's
# 262,144 tokens
STRUCTURED_BYTES_PER_TOKEN = 272
# Rows of the token embedding that score candidates again and are kept between two releases
RESCORED_ROWS = 2048
# Of the total, kept free where anonymous repacked weights could starve the mapped ones.
HEADROOM = 0.04


class Costs:
    """The cost of settings for one manifest on one device. Sums over the tensor table are taken
    once.
    """

    def __init__(
        self,
        manifest: Manifest,
        device: Device,
        request: PlanRequest,
        repacks: Callable[[Tensor], bool],
    ):
        self.manifest, self.device = manifest, device
        self.lora_bytes, self.structured = request.lora_bytes, request.structured
        self.senses = wanted_senses(manifest, request)
        tensors = manifest.decoder.tensors
        matmul = [t for t in tensors if t.use == "matmul"]
        self.matmul_bytes = sum(t.nbytes for t in matmul)
        self.repacked_bytes = sum(
            t.nbytes for t in tensors if is_loaded_to_multiply(manifest, t) and repacks(t)
        )
        self.mapped_beside_copies_bytes = sum(t.nbytes for t in matmul if not repacks(t))
        self.file_bytes = manifest.files[manifest.decoder.file].size
        self.lookups = [t for t in tensors if t.use == "lookup"]
        # a tied embedding that is copied: the mapped original is only looked up from then on
        tied = [t for t in matmul if t.name == "token_embd.weight" and repacks(t)]
        self.lookups_beside_copies = self.lookups + tied

    def may_hear_first(self, request: PlanRequest) -> bool:
        """Whether letting go of the mapped weights while an encoder is open can help at all."""
        alone = request.n_seq_max == 1 and not request.n_gpu_layers
        alone = alone and request.engine != "onnx"  # its packed weights cannot be read again
        return bool(self.senses) and self.device.can_release and alone

    def without_senses(self) -> Costs:
        """The same without encoders."""
        other = copy(self)
        other.senses = ()
        return other

    def items(self, s: Settings) -> tuple[Item, ...]:
        decoder = self.manifest.decoder
        vocabulary = decoder.n_vocab * VOCABULARY_BYTES_PER_TOKEN
        # a row of logits and a sampler's candidates for each sequence, and the ids in order
        n_rows = max(s.n_seq_max, 1 + s.n_draft)
        logits = decoder.n_vocab * (4 * n_rows + 12 * s.n_seq_max + 4)
        # with several sequences, one's clip may be encoded while the others' tokens are decoded
        sampled_in = AFTER_LOAD if s.n_seq_max > 1 else ("prefill", "decode")
        if self.manifest.embedding is not None:
            # llama.cpp reserves a row for each token; engines/llama/output_rows.py takes their
            # memory away where pages can be given back
            logits = 0 if self.device.can_release else decoder.n_vocab * 4 * s.n_ctx
        rows = [
            Item("python and libraries", RUNTIME_ANON_BYTES, "anon", PHASES),
            Item("library code", RUNTIME_FILE_BYTES, "file_hot", PHASES),
            Item("vocabulary", vocabulary, "anon", PHASES),
            *self._decoder(s),
            Item("logits and sampling", logits, "anon", sampled_in),
            *self._structured(s),
            Item("prompt cache", s.prompt_cache_bytes, "anon", AFTER_LOAD),
            *self._rescored(s),
            Item("LoRA adapters", self.lora_bytes, "anon", PHASES),
            *self._encoders(s),
        ]
        return tuple(row for row in rows if row.bytes > 0)

    def _decoder(self, s: Settings) -> Iterator[Item]:
        """Weights, KV cache and activations."""
        if s.engine == "onnx":
            part = onnx_part(self.manifest)
            yield from onnx_decoder_items(self.manifest, part, s, self.device)
            return
        yield from self._weights(s)
        yield from self._kv(s)
        yield Item("compute buffers", self.compute_bytes(s), "anon", AFTER_LOAD)
        yield from self._mapped_while_loading(s)

    def _structured(self, s: Settings) -> Iterator[Item]:
        if self.structured and s.guidance:
            tables = self.manifest.decoder.n_vocab * STRUCTURED_BYTES_PER_TOKEN
            yield Item("structured output", tables, "anon", AFTER_LOAD)

    def _rescored(self, s: Settings) -> Iterator[Item]:
        table = finer_head_rows(self.manifest.decoder) if s.rescore else None
        if table is not None:
            page = self.device.page_bytes
            row = table.nbytes // table.shape[1]
            touched = min(int(RESCORED_ROWS * (1 + row / page) * page), table.nbytes)
            # mapped a second time; where pages cannot be given back all of them may stay
            read = touched if self.device.can_release else table.nbytes
            yield Item("rows that score candidates again", read, "file_cold", ("prefill", "decode"))

    def _copied_bytes(self, s: Settings) -> int:
        """Weights in buffers of their own: on the GPU, or repacked for the CPU."""
        if s.n_gpu_layers:
            return self._offloaded_bytes(s.n_gpu_layers)
        return self.repacked_bytes if s.repack else 0

    def _offloaded_bytes(self, n_gpu_layers: int) -> int:
        n_layer = self.manifest.decoder.n_layer
        share = 1.0 if n_gpu_layers < 0 or n_gpu_layers > n_layer else n_gpu_layers / n_layer
        return int(self.matmul_bytes * share)

    def read_again_bytes(self, s: Settings) -> tuple[int, int]:
        """What hearing first reads from the disk for a turn, at most: encoders, decoder weights."""
        sizes = {"audio": self.manifest.audio, "vision": self.manifest.vision}
        parts = [part for sense in self.senses if (part := sizes[sense]) is not None]
        return sum(part.weights_bytes for part in parts), self._mapped_bytes(s)

    def _mapped_bytes(self, s: Settings) -> int:
        """Weights that are read where the file is mapped, for every token."""
        copied = self._copied_bytes(s)
        if copied and not s.n_gpu_layers:
            return self.mapped_beside_copies_bytes
        return self.matmul_bytes - copied

    def _weights(self, s: Settings) -> Iterator[Item]:
        name = "weights, on the GPU" if s.n_gpu_layers else "weights, repacked"
        yield Item(name, self._copied_bytes(s), "anon", PHASES)
        mapped_in = DECODER_ALONE if s.encoders == "hear first" else PHASES
        yield Item("weights, mapped", self._mapped_bytes(s), "file_hot", mapped_in)
        if self.device.can_release:
            yield self._cold_rows(s)
            return
        copied = self._copied_bytes(s)
        read = self.mapped_beside_copies_bytes if copied else self.matmul_bytes
        name = "cold weights (this platform cannot release them)"
        yield Item(name, self.file_bytes - read, "file_cold", PHASES)

    def _cold_rows(self, s: Settings) -> Item:
        """Rows that are looked up.

        A row lies on 1 + row/page pages on average. A turn touches at most n_ctx different tokens;
        natural text about a quarter of that. The pages are let go after every turn
        (engines/llama/weights.py), so this is a bound per turn, not a growth.
        """
        tables = self.lookups_beside_copies if self._copied_bytes(s) else self.lookups
        page = self.device.page_bytes
        row_bytes = [t.nbytes // t.shape[1] for t in tables]
        bytes_per_token = sum((1 + row / page) * page for row in row_bytes)
        touched = bytes_per_token * min(s.n_ctx // 4, 2048) * s.n_seq_max
        whole = sum(t.nbytes for t in tables)
        # the rows of a turn that waits for its end are looked up behind it
        phases = DECODER_ALONE[1:] if s.encoders == "hear first" else AFTER_LOAD
        return Item("cold rows in use", min(int(touched), whole), "file_cold", phases)

    def _mapped_while_loading(self, s: Settings) -> Iterator[Item]:
        # MAP_POPULATE maps the whole file before the first progress callback lets the cold part go
        if self.device.can_release:
            cold = self.file_bytes - max(0, self._mapped_bytes(s))
            yield Item("file pages mapped while loading", cold, "reclaimable", ("load",))

    def _kv(self, s: Settings) -> Iterator[Item]:
        if self.manifest.embedding is not None:  # each text is computed whole, and nothing is kept
            return
        decoder = self.manifest.decoder
        cell = self._cell_bytes(s)
        n_global = sum(kind == "global" for kind in decoder.kv_layers)
        n_sliding = len(decoder.kv_layers) - n_global
        global_bytes = n_global * cell * _pad(s.n_ctx) * s.n_seq_max
        sliding_bytes = n_sliding * cell * self.sliding_cells(s) * s.n_seq_max
        yield Item("KV cache, global layers", global_bytes, "anon", AFTER_LOAD)
        yield Item("KV cache, sliding layers", sliding_bytes, "anon", AFTER_LOAD)

    def state_bytes(self, s: Settings) -> int:
        """A kept state of the KV cache, of a conversation that fills the context."""
        decoder = self.manifest.decoder
        n_global = sum(kind == "global" for kind in decoder.kv_layers)
        window = min(s.n_ctx, decoder.sliding_window)  # llama.cpp saves no more of a sliding layer
        if s.engine == "onnx":  # all of it
            window = s.n_ctx
        n_sliding = len(decoder.kv_layers) - n_global
        return self._cell_bytes(s) * (n_global * s.n_ctx + n_sliding * window)

    def _cell_bytes(self, s: Settings) -> int:
        """K and V of one position in one layer."""
        decoder = self.manifest.decoder
        values, nbytes = TYPE_SIZES[s.kv_type.upper()]
        return 2 * decoder.n_head_kv * decoder.head_dim * nbytes // values

    def sliding_cells(self, s: Settings) -> int:
        """llama-kv-cache-iswa.cpp: the window and one ubatch, padded."""
        return _pad(min(_pad(s.n_ctx), self.manifest.decoder.sliding_window + s.n_ubatch))

    def compute_bytes(self, s: Settings) -> int:
        """Activations of one ubatch, by token: fitted to within 3 % of what llama.cpp 0.3.36
        reserves for all five sizes.
        """
        d = self.manifest.decoder
        if self.manifest.embedding is not None:
            return self._embedding_bytes(s)
        floats = 3 * d.n_ff + 4 * d.n_embd
        # AltUp keeps four streams, twice at the widest point, and the per-layer inputs of all
        # layers
        if d.ple_width:
            floats = 3 * d.n_ff + 10 * d.n_embd + d.ple_width * d.n_layer
        masks = 2 * (_pad(s.n_ctx) + self.sliding_cells(s))  # f16
        if not s.flash_attention:
            masks += 4 * d.n_head * _pad(s.n_ctx)
        return s.n_ubatch * (4 * floats + masks) + GRAPH_BYTES_PER_LAYER * d.n_layer

    def _embedding_bytes(self, s: Settings) -> int:
        """Activations of one pass of ``n_ctx`` tokens that all attend to each other, by token:
        within 1 % of what llama.cpp 0.3.36 reserves for 128 … 2048 tokens, two widths.
        """
        d = self.manifest.decoder
        shares = EMBED_TEXTS  # of each token in the mean of each text
        floats = 3 * d.n_ff + 3 * d.n_embd + shares
        masks = 2 * 2 * s.n_ctx  # f16, of the global and of the sliding layers
        if not s.flash_attention:
            masks *= 2  # f32
            floats = max(floats, d.n_head * s.n_ctx + 5 * d.n_embd + shares)
        return s.n_ctx * (4 * floats + masks) + GRAPH_BYTES_PER_LAYER * d.n_layer

    def _encoders(self, s: Settings) -> Iterator[Item]:
        if self.senses and s.engine == "llama":
            yield Item("onnxruntime", ONNXRUNTIME_BYTES, "anon", AFTER_LOAD)
        if "audio" in self.senses:
            yield from _audio(require(self.manifest, "audio"), s)
        if "vision" in self.senses:
            yield from _vision(require(self.manifest, "vision"), s, self.manifest.decoder.n_embd)


def _audio(part: AudioPart, s: Settings) -> Iterator[Item]:
    open_in = AFTER_LOAD if s.encoders == "resident" else ("listen",)
    yield Item("audio encoder weights", part.weights_bytes, "anon", open_in)
    yield Item("audio encoder activations", part.activation_bytes, "anon", ("listen",))


def _vision(part: VisionPart, s: Settings, n_embd: int) -> Iterator[Item]:
    open_in = AFTER_LOAD if s.encoders == "resident" else ("look",)
    activations = part.activation_bytes.get(str(part.image_sizes[0]), 0)
    soft_tokens = s.n_ctx * n_embd * 4  # a conversation keeps them; at most a whole context
    # the weights are used as they lie in the mapped file (engines/onnx)
    yield Item("vision encoder weights", part.weights_bytes, "file_hot", open_in)
    yield Item("vision encoder, its graph", VISION_GRAPH_BYTES, "anon", open_in)
    yield Item("picture being read", PICTURE_BYTES, "anon", ("look",))
    yield Item("soft tokens of pictures", soft_tokens, "anon", AFTER_LOAD)
    yield Item("vision encoder activations", activations, "anon", ("look",))


def _pad(n_cells: int) -> int:
    return -(-n_cells // KV_PADDING) * KV_PADDING
