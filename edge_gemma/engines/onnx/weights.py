"""Open a bundle's ``decoder.onnx`` as planned.

In: a bundle and an accepted plan. Out: :class:`Weights`. Nothing of the graph reaches onnxruntime
before its hash, its operators, its sizes and the place of its data were checked, and it fits the
decoder that the manifest describes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from edge_gemma.bundles.folder import Bundle, sha256_file
from edge_gemma.bundles.manifest import Manifest, OnnxPart, end_tokens
from edge_gemma.engines.llama.decoder import Decoder as LlamaDecoder
from edge_gemma.engines.llama.weights import media_tokens, overrides
from edge_gemma.engines.onnx import masks
from edge_gemma.engines.onnx.context import LoadedGraph
from edge_gemma.engines.onnx.decoder import Decoder
from edge_gemma.engines.onnx.graph_file import GraphFile, read_graph_file
from edge_gemma.engines.onnx.prepacked import find_prepacked
from edge_gemma.engines.onnx.row_table import Table
from edge_gemma.engines.onnx.runtime import open_decoder, version
from edge_gemma.errors import BundleError, HashMismatch, RuntimeFailure
from edge_gemma.machine.footprint import let_mapping_go, trim_heap
from edge_gemma.plan.engines import onnx_part
from edge_gemma.plan.records import Plan


class Weights:
    """A loaded decoder and the tables beside it. A context manager. Raises BundleError,
    HashMismatch, MissingExtra, UsageError.

    ``on_progress(fraction)`` is called before and after onnxruntime loads, which tells nothing in
    between; it may return False to stop (KeyboardInterrupt).
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        *,
        on_progress: Callable[[float], bool | None] | None = None,
    ):
        manifest = bundle.manifest
        part = onnx_part(manifest)
        self._version = version()  # onnxruntime is here, and new enough
        bundle.check_header()
        found = _checked(bundle, part)
        self.identity = _identity(manifest, part)
        with ExitStack() as opened:
            embeddings = Table(
                bundle.path(part.embeddings.file), part.embeddings, manifest.decoder.n_embd**0.5
            )
            opened.callback(embeddings.close)
            per_layer = None
            if part.per_layer:
                path, scale = bundle.path(part.per_layer.file), manifest.decoder.ple_width**0.5
                per_layer = Table(path, part.per_layer, scale)
                opened.callback(per_layer.close)
            vocabulary = LlamaDecoder(
                bundle.decoder_path,
                plan.settings,
                suppressed=media_tokens(manifest),
                ends=end_tokens(manifest),
                controls=[*manifest.special_tokens.values()],
                overrides=overrides(manifest),
                vocab_only=True,
            )
            opened.callback(vocabulary.close)
            if vocabulary.n_vocab != manifest.decoder.n_vocab:
                raise BundleError(
                    f"{bundle.decoder_path} has {vocabulary.n_vocab} tokens; its manifest says "
                    f"{manifest.decoder.n_vocab}"
                )
            _tell(on_progress, 0.0)
            graph_path = _graph_path(bundle, part, plan)
            session = open_decoder(graph_path, n_threads=plan.settings.n_threads)
            self._data_path = _data_of(graph_path)
            _tell(on_progress, 1.0)
            opened.pop_all()
        trim_heap()
        self._let_weights_go()
        decoder = manifest.decoder
        graph = LoadedGraph(
            session,
            decoder.n_vocab,
            decoder.n_embd,
            decoder.n_layer,
            _kv_layers(found),
            decoder.n_head_kv,
            decoder.head_dim,
            embeddings,
            per_layer,
            decoder.sliding_window if part.takes_masks else None,
        )
        self._on_wake: Callable[[], None] | None = None
        self._tables = [embeddings, *([per_layer] if per_layer else [])]
        self.decoder = Decoder(graph, vocabulary, min(decoder.n_ctx_train, part.n_positions))

    @property
    def version(self) -> str:
        return self._version

    def prefetch(self, ids: Iterable[int]) -> None:
        wanted = set(ids)
        for table in self._tables:
            table.prefetch(wanted)

    def trim(self) -> None:
        for table in self._tables:
            table.trim()

    def rest(self, on_wake: Callable[[], None]) -> None:
        """Rows that were looked up go, and packed weights that lie in a file. Those that were
        packed into memory of their own cannot be read again: no plan counts on more.
        """
        self.trim()
        self._let_weights_go()
        self._on_wake = on_wake

    def _let_weights_go(self) -> None:
        """Pages of the data file: what lies unpacked in it was mapped while it was opened, and most
        of it is never read again.
        """
        let_mapping_go(self._data_path)

    def wake(self) -> None:
        on_wake, self._on_wake = self._on_wake, None
        if on_wake is not None:
            on_wake()

    def close(self) -> None:
        self.decoder.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _graph_path(bundle: Bundle, part: OnnxPart, plan: Plan) -> Path:
    """The bundle's graph, or the same over packed weights, where the plan counts on those."""
    if not plan.settings.prepacked_bytes:
        return bundle.path(part.file)
    packed = find_prepacked(bundle, part)
    if packed is None:
        raise RuntimeFailure(
            f"the packed weights of {bundle.manifest.name} that the plan counted on are gone or "
            "damaged; load again"
        )
    read_graph_file(packed, _data_of(packed))
    return packed


def _identity(manifest: Manifest, part: OnnxPart) -> str:
    """What saved conversations of this decoder are compared with: a SHA-256 over those of its
    files.
    """
    names = [name for name in (part.file, _data_name(part)) if name in manifest.files]
    hashes = "".join(manifest.files[name].sha256 for name in names)
    return hashlib.sha256(hashes.encode()).hexdigest()


def _data_name(part: OnnxPart) -> str:
    return f"{part.file}.data"


def _data_of(graph: Path) -> Path:
    return graph.with_name(f"{graph.name}.data")


def _tell(on_progress: Callable[[float], bool | None] | None, fraction: float) -> None:
    if on_progress is not None and on_progress(fraction) is False:
        raise KeyboardInterrupt


def _checked(bundle: Bundle, part: OnnxPart) -> GraphFile:
    manifest, decoder = bundle.manifest, bundle.manifest.decoder
    path = bundle.path(part.file)
    if sha256_file(path) != manifest.files[part.file].sha256:
        raise HashMismatch(f"{path} was changed or damaged; convert or pull it again")
    name = _data_name(part)
    if name not in manifest.files:
        raise BundleError(f"the manifest of {bundle.folder} does not list {name}")
    found = read_graph_file(path, bundle.path(name))
    tables = {"embeddings": (part.embeddings, decoder.n_embd)}
    if part.per_layer:
        tables["per_layer"] = (part.per_layer, decoder.n_layer * decoder.ple_width)
    for table, (rows, width) in tables.items():
        if (rows.n_rows, rows.n_per_row) != (decoder.n_vocab, width):
            raise BundleError(
                f"onnx.{table} of {bundle.folder} has {rows.n_rows} rows of {rows.n_per_row}; its "
                f"decoder takes {decoder.n_vocab} of {width}: they are of different models"
            )
    wanted = _wanted_inputs(manifest, part)
    if set(found.inputs) != wanted:
        odd = ", ".join(sorted(wanted.symmetric_difference(found.inputs))[:4])
        raise BundleError(
            f"the inputs of {path} do not fit the decoder of its manifest: {odd}; they are of "
            "different models"
        )
    return found


def _wanted_inputs(manifest: Manifest, part: OnnxPart) -> set[str]:
    names = {"inputs_embeds", "attention_mask", "num_logits_to_keep"}
    if part.per_layer:
        names.add("per_layer_inputs")
    if part.takes_masks:
        names |= {*masks.NAMES}
    layers = range(len(manifest.decoder.kv_layers))
    return names | {f"past_key_values.{n}.{side}" for n in layers for side in ("key", "value")}


def _kv_layers(found: GraphFile) -> tuple[int, ...]:
    prefix, suffix = "past_key_values.", ".key"
    keys = [n for n in found.inputs if n.startswith(prefix) and n.endswith(suffix)]
    return tuple(sorted(int(name.removeprefix(prefix).removesuffix(suffix)) for name in keys))
