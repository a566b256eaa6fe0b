"""What the ONNX engine takes, as formulas with visible arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from edge_gemma.bundles.manifest import Manifest, OnnxPart
from edge_gemma.machine.device import Device
from edge_gemma.plan.records import AFTER_LOAD, PHASES, Item, Settings
from edge_gemma.units import KiB, MiB

# The library with an opened decoder's graph, its weights apart.
RUNTIME_ANON_BYTES = 16 * MiB
RUNTIME_FILE_BYTES = 34 * MiB
# Packed weights by what the files hold. Blocks of 32 carry a float32 scale, and packed a sum, too:
# 10 bits a weight of 9 (Q8_0), 6 of 5 (Q4_0) or of 5.125 (Q4_1); float16 is widened. With the two
# constants above, within 5 % of the PSS that a 270M had with 1024 tokens of context: q8_0 532 MiB,
# edge_onnx 406. The float types were not measured.
PACKED_PER_STORED = {"f32": 1.0, "f16": 2.0, "q8_0": 10 / 9, "edge_onnx": 9 / 8}
PACKED_BLOCKS_PER_STORED = 1.2
_FLOAT_BYTES = 4
FAULT_BYTES = 64 * KiB  # what Linux maps around a page that is read (fault_around_bytes)


def onnx_decoder_items(
    manifest: Manifest, part: OnnxPart, s: Settings, device: Device
) -> Iterator[Item]:
    """Library, weights, tables, KV cache and activations."""
    decoder = manifest.decoder
    yield Item("onnxruntime", RUNTIME_ANON_BYTES, "anon", PHASES)
    yield Item("onnxruntime, code", RUNTIME_FILE_BYTES, "file_hot", PHASES)
    # the rotary tables are mapped, and few of their rows read
    rotary = 4 * part.n_positions * (decoder.head_dim // 2) * _FLOAT_BYTES
    if s.prepacked_bytes:
        yield Item("weights, packed in a file", s.prepacked_bytes, "file_hot", PHASES)
    else:
        yield Item("weights, packed", packed_bytes(part, rotary), "anon", PHASES)
    cell = 2 * _FLOAT_BYTES * decoder.n_head_kv * decoder.head_dim
    n_layer = len(decoder.kv_layers)
    yield Item("KV cache, all layers", n_layer * cell * s.n_ctx * s.n_seq_max, "anon", AFTER_LOAD)
    yield Item("activations", _activation_bytes(manifest, s), "anon", AFTER_LOAD)
    if part.takes_masks:
        yield Item("masks", 2 * _FLOAT_BYTES * s.n_ubatch * s.n_ctx, "anon", AFTER_LOAD)
    yield _cold_rows(manifest, part, s, device)


def packed_bytes(part: OnnxPart, rotary_bytes: int = 0) -> int:
    stored = max(0, part.weights_bytes - rotary_bytes)
    return int(stored * PACKED_PER_STORED.get(part.recipe, PACKED_BLOCKS_PER_STORED))


def _activation_bytes(manifest: Manifest, s: Settings) -> int:
    """Of one ubatch. They are freed as soon as they were read; the widest stand together in the
    feed-forward layer, and in attention: a row of scores for each head of each thread's row.
    """
    d = manifest.decoder
    floats = 3 * d.n_ff + 4 * d.n_embd
    if d.ple_width:  # AltUp's four streams, twice; the per-layer inputs of all layers, three times
        floats = 3 * d.n_ff + 10 * d.n_embd + 3 * d.ple_width * d.n_layer
    scores = d.n_head * s.n_ctx
    return s.n_ubatch * _FLOAT_BYTES * (floats + scores)


def _cold_rows(manifest: Manifest, part: OnnxPart, s: Settings, device: Device) -> Item:
    """Rows that are looked up in the tables on disk; see costs.py."""
    tables = [table for table in (part.embeddings, part.per_layer) if table]
    whole = [manifest.files[table.file].size for table in tables]
    per_token = sum(
        FAULT_BYTES + nbytes // table.n_rows for table, nbytes in zip(tables, whole, strict=True)
    )
    touched = per_token * min(s.n_ctx // 4, 2048) * s.n_seq_max
    if not device.can_release:
        touched = sum(whole)
    phases = ("prefill", "decode", "listen", "look")
    return Item("cold rows in use", min(touched, sum(whole)), "file_cold", phases)
