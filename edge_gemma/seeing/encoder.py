"""Pictures → soft tokens, with the vision encoder of a bundle.

In: pixels ``[1, 3, size, size]`` float32. Out: rows ``[n_soft_tokens, n_embd]``
float32 for the decoder. It does not know files, prompts or the decoder.
"""

from __future__ import annotations

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import require
from edge_gemma.engines.onnx.runtime import Graph, open_onnx, run_onnx
from edge_gemma.errors import BundleError, RuntimeFailure, UsageError
from edge_gemma.machine.footprint import trim_heap


class ImageEncoder:
    """The vision tower of a bundle, loaded for square inputs of ``size`` pixels
    (default: the bundle's first). One picture at a time. Raises UnsupportedModel
    (the bundle has none), UsageError (no such size), BundleError, MissingExtra.

    >>> with ImageEncoder(Bundle.open("my-gemma-3"), n_threads=1) as encoder:
    ...     encoder.encode(np.zeros((1, 3, 224, 224), np.float32)).shape
    (16, 256)
    """

    def __init__(self, bundle: Bundle, *, size: int | None = None, n_threads: int = 2):
        self.part = require(bundle.manifest, "vision")
        self.size = size or self.part.image_sizes[0]
        if self.size not in self.part.image_sizes:
            raise UsageError(
                f"pictures of {self.size} px were asked for; this encoder takes "
                f"{', '.join(map(str, self.part.image_sizes))}"
            )
        path = bundle.path(self.part.file)
        # spin: a picture takes thousands of short products, and waking a thread for
        # each would take a tenth of the time
        graph = open_onnx(
            path, n_threads=n_threads, spin=True, in_place=True, sides={"side": self.size}
        )
        expected = [
            ("pixels", [1, 3, self.size, self.size]),
            ("soft_tokens", [self.part.n_soft_tokens, self.part.n_embd]),
        ]
        values = (*graph.get_inputs(), *graph.get_outputs())
        found = [(value.name, list(value.shape)) for value in values]
        if found != expected:
            raise BundleError(
                f"{path} is not the vision encoder its manifest describes: it has {found}, "
                f"expected {expected}; convert the model again"
            )
        self._graph: Graph | None = graph

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """``pixels [1, 3, size, size]`` float32, normalised
        (:meth:`edge_gemma.seeing.picture.Picture.array`) → soft tokens
        ``[n_soft_tokens, n_embd]`` float32.

        Raises RuntimeFailure.
        """
        if self._graph is None:
            raise RuntimeFailure("the vision encoder was closed; open it again")
        try:
            return run_onnx(self._graph, ["soft_tokens"], {"pixels": pixels})[0]
        finally:
            trim_heap()  # activations are needed again only with the next picture

    def close(self) -> None:
        """Free the weights."""
        self._graph = None
        trim_heap()

    def __enter__(self) -> ImageEncoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
