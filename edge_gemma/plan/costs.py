"""What each part of a loaded model takes, as formulas with visible arithmetic."""

from __future__ import annotations

from collections.abc import Callable

from edge_gemma.bundles.gguf import TYPE_SIZES
from edge_gemma.bundles.manifest import Manifest, Tensor
from edge_gemma.machine.device import Device
from edge_gemma.machine.footprint import RUNTIME_ANON_BYTES, RUNTIME_FILE_BYTES
from edge_gemma.plan.records import AFTER_LOAD, PHASES, Item, PlanRequest, Settings, wanted_senses
from edge_gemma.units import MiB

KV_TYPES = ("f16", "q8_0", "q4_0")  # of the KV cache, by their ggml names in lower case
# What loading a vocabulary adds, measured as RUNTIME_ANON_BYTES is.
VOCABULARY_BYTES_PER_TOKEN = 120
GRAPH_BYTES_PER_LAYER = 128 << 10  # ggml's graph and scheduler nodes
ONNXRUNTIME_BYTES = (
    32 * MiB
    # the library once it was used, with an opened audio graph; it stays when an encoder is let go.
    # `python -m edge_gemma.benchmarks.hear memory`
)
VISION_GRAPH_BYTES = (
    13 * MiB
)  # an opened vision graph, its weights mapped; `python -m edge_gemma.benchmarks.vision run`
PICTURE_BYTES = (
    7 * 12_000_000
)  # a 12-megapixel photograph while it is decoded (vision.DECODE_BYTES_PER_PIXEL)
HEADROOM = (
    0.04  # of the total, kept free when anonymous repacked weights could starve the mapped ones
)


class _Costs:
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
        self.manifest, self.device, self.request = manifest, device, request
        tensors = manifest.decoder.tensors
        matmul = [t for t in tensors if t.use == "matmul"]
        self.matmul_bytes = sum(t.nbytes for t in matmul)
        self.repacked_bytes = sum(t.nbytes for t in tensors if t.use != "lookup" and repacks(t))
        self.mapped_beside_copies_bytes = sum(t.nbytes for t in matmul if not repacks(t))
        self.file_bytes = manifest.files[manifest.decoder.file].size
        self.lookups = [t for t in tensors if t.use == "lookup"]
        self.embedding = next((t for t in tensors if t.name == "token_embd.weight"), None)
        self.embedding_repacked = (
            self.embedding is not None
            and self.embedding.use == "matmul"
            and repacks(self.embedding)
        )
        self.senses = wanted_senses(manifest, request)

    def items(self, s: Settings) -> tuple[Item, ...]:
        decoder, device = self.manifest.decoder, self.device
        rows = [
            Item("python and libraries", RUNTIME_ANON_BYTES, "anon", PHASES),
            Item("library code", RUNTIME_FILE_BYTES, "file_hot", PHASES),
        ]
        rows.append(
            Item("vocabulary", decoder.n_vocab * VOCABULARY_BYTES_PER_TOKEN, "anon", PHASES)
        )
        repacked = self.repacked_bytes if s.repack and not s.n_gpu_layers else 0
        copied = self._offloaded(s.n_gpu_layers) if s.n_gpu_layers else repacked
        if copied:
            rows.append(
                Item(
                    "weights, on the GPU" if s.n_gpu_layers else "weights, repacked",
                    copied,
                    "anon",
                    PHASES,
                )
            )
        mapped = (
            self.mapped_beside_copies_bytes
            if copied and not s.n_gpu_layers
            else self.matmul_bytes - copied
        )
        if mapped > 0:
            rows.append(Item("weights, mapped", mapped, "file_hot", PHASES))
        rows += self._cold(s, copied)
        rows += self._kv(s)
        rows.append(Item("compute buffers", self.compute_bytes(s), "anon", AFTER_LOAD))
        # the output row of each sequence, and llama_token_data (12 bytes) for each candidate
        rows.append(
            Item(
                "logits and sampling",
                decoder.n_vocab * (4 * s.n_seq_max + 12),
                "anon",
                ("prefill", "decode"),
            )
        )
        if self.request.lora_bytes:
            rows.append(Item("LoRA adapters", self.request.lora_bytes, "anon", PHASES))
        rows += self._encoders(s)
        if device.can_release and self.file_bytes > mapped:
            # MAP_POPULATE maps the whole file before the first progress callback lets the cold part
            # go
            rows.append(
                Item(
                    "file pages mapped while loading",
                    self.file_bytes - mapped,
                    "reclaimable",
                    ("load",),
                )
            )
        return tuple(rows)

    def _offloaded(self, n_gpu_layers: int) -> int:
        n_layer = self.manifest.decoder.n_layer
        share = 1.0 if n_gpu_layers < 0 or n_gpu_layers > n_layer else n_gpu_layers / n_layer
        return int(self.matmul_bytes * share)

    def _cold(self, s: Settings, copied: int) -> list[Item]:
        if not self.device.can_release:
            stays = self.file_bytes - (
                self.mapped_beside_copies_bytes if copied else self.matmul_bytes
            )
            return (
                [
                    Item(
                        "cold weights (this platform cannot release them)",
                        stays,
                        "file_cold",
                        PHASES,
                    )
                ]
                if stays > 0
                else []
            )
        tables = list(self.lookups)
        if self.embedding_repacked and copied:
            tables.append(self.embedding)
        if not tables:
            return []
        # A row lies on 1 + row/page pages on average. A turn touches at most n_ctx different
        # tokens; natural text about a quarter of that. The pages are let go after every turn
        # (weights.py), so this is a bound per turn, not a growth.
        page = self.device.page_bytes
        row_bytes = [t.nbytes // t.shape[1] for t in tables]
        touched = (
            sum((1 + r / page) * page for r in row_bytes) * min(s.n_ctx // 4, 2048) * s.n_seq_max
        )
        return [
            Item(
                "cold rows in use",
                min(int(touched), sum(t.nbytes for t in tables)),
                "file_cold",
                ("prefill", "decode", "listen", "look"),
            )
        ]

    def _kv(self, s: Settings) -> list[Item]:
        decoder = self.manifest.decoder
        values, nbytes = TYPE_SIZES[s.kv_type.upper()]
        cell = 2 * decoder.n_head_kv * decoder.head_dim * nbytes // values  # K and V of one layer
        n_global = sum(kind == "global" for kind in decoder.kv_layers)
        n_sliding = len(decoder.kv_layers) - n_global
        rows = []
        if n_global:
            rows.append(
                Item(
                    "KV cache, global layers",
                    n_global * cell * _pad(s.n_ctx) * s.n_seq_max,
                    "anon",
                    AFTER_LOAD,
                )
            )
        if n_sliding:
            rows.append(
                Item(
                    "KV cache, sliding layers",
                    n_sliding * cell * self.sliding_cells(s) * s.n_seq_max,
                    "anon",
                    AFTER_LOAD,
                )
            )
        return rows

    def sliding_cells(self, s: Settings) -> int:
        """llama-kv-cache-iswa.cpp: the window and one ubatch, padded to 256."""
        return _pad(min(_pad(s.n_ctx), self.manifest.decoder.sliding_window + s.n_ubatch))

    def compute_bytes(self, s: Settings) -> int:
        """Activations of one ubatch, by token: fitted to within 3 % of what llama.cpp 0.3.36
        reserves for all five sizes.
        """
        d = self.manifest.decoder
        floats = 3 * d.n_ff + 4 * d.n_embd
        # AltUp keeps four streams, twice at the widest point, and the per-layer inputs of all
        # layers
        if d.ple_width:
            floats = 3 * d.n_ff + 10 * d.n_embd + d.ple_width * d.n_layer
        masks = 2 * (_pad(s.n_ctx) + self.sliding_cells(s))  # f16
        if not s.flash_attention:
            masks += 4 * d.n_head * _pad(s.n_ctx)
        return s.n_ubatch * (4 * floats + masks) + GRAPH_BYTES_PER_LAYER * d.n_layer

    def _encoders(self, s: Settings) -> list[Item]:
        rows = []
        always = s.encoders == "resident"
        if self.senses:
            rows.append(Item("onnxruntime", ONNXRUNTIME_BYTES, "anon", AFTER_LOAD))
        if "audio" in self.senses:
            audio = self.manifest.audio
            rows.append(
                Item(
                    "audio encoder weights",
                    audio.weights_bytes,
                    "anon",
                    AFTER_LOAD if always else ("listen",),
                )
            )
            rows.append(
                Item("audio encoder activations", audio.activation_bytes, "anon", ("listen",))
            )
        if "vision" in self.senses:
            vision = self.manifest.vision
            # used as they lie in the mapped file (encode.py, in_place)
            rows.append(
                Item(
                    "vision encoder weights",
                    vision.weights_bytes,
                    "file_hot",
                    AFTER_LOAD if always else ("look",),
                )
            )
            rows.append(
                Item(
                    "vision encoder, its graph",
                    VISION_GRAPH_BYTES,
                    "anon",
                    AFTER_LOAD if always else ("look",),
                )
            )
            rows.append(Item("picture being read", PICTURE_BYTES, "anon", ("look",)))
            # a conversation keeps its pictures' soft tokens; a whole context of them at most
            rows.append(
                Item(
                    "soft tokens of pictures",
                    4 * s.n_ctx * self.manifest.decoder.n_embd,
                    "anon",
                    AFTER_LOAD,
                )
            )
            rows.append(
                Item(
                    "vision encoder activations",
                    vision.activation_bytes.get(str(vision.image_sizes[0]), 0),
                    "anon",
                    ("look",),
                )
            )
        return rows


def _pad(n: int, to: int = 256) -> int:
    return -(-n // to) * to
