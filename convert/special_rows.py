"""The hard embeddings of Gemma 3n that its token table does not hold: end
of image, end of audio and audio padding.

In: a checkpoint. Out: ``special_rows.npy`` and the names of its rows. The
ids of these tokens lie beyond the table of the decoder; what stands for
them among embedding rows is an entry of the embedder's own table, normed,
projected and normed again (transformers 5.23 ``modeling_gemma3n.py``,
``Gemma3nMultimodalEmbedder``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_gemma.convert.tensors import TensorReader
from edge_gemma.errors import CheckpointError

FILE = "special_rows.npy"
_AUDIO, _VISION = "model.embed_audio.", "model.embed_vision."
_CONFIG_OF = {_AUDIO: "audio_config", _VISION: "vision_config"}
# name in the manifest → (embedder, index in its table; −1 is the last)
_ROWS = {
    "end_of_image": (_VISION, 0),
    "end_of_audio": (_AUDIO, 0),
    "audio_padding": (_AUDIO, -1),
}


def write_special_rows(tensors: TensorReader, folder: Path) -> tuple[str, ...]:
    """Write ``special_rows.npy`` [n, n_embd] float32 for the embedders the
    checkpoint has; returns the rows' names. Nothing is written, and ()
    returned, where it has none (Gemma 3).
    """
    rows = {}
    for name, (embedder, index) in _ROWS.items():
        if f"{embedder}hard_embedding_norm.weight" in tensors.names():
            n_rows = tensors.shape(f"{embedder}embedding.weight")[0]
            rows[name] = hard_rows(tensors, embedder, [index % n_rows])
    if rows:
        np.save(folder / FILE, np.concatenate(list(rows.values())).astype(np.float32))
    return tuple(rows)


def hard_rows(tensors: TensorReader, embedder: str, indices: list[int]) -> np.ndarray:
    """Entries ``indices`` of an embedder's hard table as rows
    ``[len(indices), n_embd]`` float32.

    ``embedder`` is ``model.embed_audio.`` (0 = end of audio, 127 = audio
    padding) or ``model.embed_vision.`` (0 = end of image). The table's own
    ids start at its ``vocab_offset``. Raises CheckpointError for an index
    outside the table.
    """
    config = tensors.config.get(_CONFIG_OF[embedder]) or {}
    epsilon = float(config.get("rms_norm_eps", 1e-6))
    table = f"{embedder}embedding.weight"
    n_rows = tensors.shape(table)[0]
    if not all(0 <= i < n_rows for i in indices):
        raise CheckpointError(f"{table} has {n_rows} rows, asked for {indices}")
    x = np.concatenate([tensors.read(table, slice(i, i + 1)) for i in indices])  # [k, hidden]
    x = _rms_norm(x, epsilon) * tensors.read(f"{embedder}hard_embedding_norm.weight")
    projection = tensors.read(f"{embedder}embedding_projection.weight")  # [n_embd, hidden]
    return _rms_norm(x @ projection.T, epsilon)


def _rms_norm(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(epsilon))
