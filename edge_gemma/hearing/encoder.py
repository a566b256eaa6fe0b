"""Log-mel features → soft tokens, with the audio encoder of a bundle, while the
clip still grows.

In: 16 kHz mono float32, in packets of any size. Out: rows ``[k, n_embd]`` float32
for the decoder, one per 160 ms. It does not know devices, prompts or the decoder.
"""

from __future__ import annotations

from copy import copy
from typing import Protocol

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import require
from edge_gemma.engines.onnx.runtime import Graph, open_onnx, run_onnx
from edge_gemma.errors import BundleError, RuntimeFailure
from edge_gemma.hearing.log_mel import N_MELS, LogMel
from edge_gemma.machine.footprint import trim_heap

STEP_FRAMES = 12  # conformer frames of 40 ms that are run at a time: 480 ms
# the graph's state between steps: its inputs, and with next_ before them its
# outputs (written by edge_gemma/convert/audio.py)
_STATE = ("conv_0", "group_norm", "keys", "values", "conv")
_INPUTS = {"mel", "frames", "valid", *_STATE}
_OUTPUTS = ["soft", *(f"next_{name}" for name in _STATE)]
_ALL_VALID = 1 << 40  # more rows than any clip has: none of a step's rows is padding

# The two convolutions in front of the conformer have 3 taps and a stride of 2: row
# r of the first needs mel rows 2r … 2r+2, and frame t of the second needs rows 2t …
# 2t+2 of the first, which are mel rows 4t … 4t+6.
_MEL_PER_FRAME = 4
_MEL_OF_FIRST_FRAME = 7
_PADDING_ROWS = 8  # zero mel rows behind the clip: more than any frame reaches beyond its end


class Encoder(Protocol):
    """One clip on its way through an encoder, as whoever feeds sound to a
    conversation sees it.
    """

    def push(self, samples: np.ndarray) -> np.ndarray:
        """``samples [n]`` float32 at 16 kHz mono, any n → the soft tokens
        ``[k, n_embd]`` float32 that became ready, k ≥ 0. Rows never change once given
        out, and do not depend on how the clip is cut into packets.

        Raises MediaError (broken samples, beyond 30 s), RuntimeFailure (closed, or
        the encoder failed).
        """
        ...

    def finish(self) -> np.ndarray:
        """The clip has ended → its last soft tokens ``[k, n_embd]``, k ≥ 0. Closes
        it. Raises RuntimeFailure.
        """
        ...

    def fork(self) -> Encoder:
        """The clip so far once more: one may be finished while the other goes on."""
        ...

    def close(self) -> None:
        """Drop the clip. A later push fails; closing twice does nothing."""
        ...


class AudioEncoder:
    """The audio tower of a bundle, loaded: weights only.

    Each clip is a :meth:`stream`, so one encoder serves many.

    ``n_threads`` is the encoder's own; beside a running decoder one is often faster
    than two. Raises UnsupportedModel (the bundle has none), BundleError,
    MissingExtra.

    >>> with AudioEncoder(Bundle.open("my-gemma-3n"), n_threads=1) as encoder:
    ...     encoder.encode(np.zeros(16000, np.float32)).shape
    (7, 256)
    """

    def __init__(self, bundle: Bundle, *, n_threads: int = 2, spin: bool = False):
        self.part = require(bundle.manifest, "audio")
        path = bundle.path(self.part.file)
        graph = open_onnx(path, n_threads=n_threads, spin=spin)
        shapes = {value.name: value.shape for value in graph.get_inputs()}
        n_embd = graph.get_outputs()[0].shape[1]
        if set(shapes) != _INPUTS or n_embd != self.part.n_embd:
            raise BundleError(
                f"{path} is not a streaming audio encoder of this "
                f"version (inputs {sorted(shapes)}); convert the model again"
            )
        self._graph: Graph | None = graph
        self._first_state = {name: _empty(shapes[name]) for name in _STATE}

    def stream(self) -> AudioStream:
        """Start one clip. Raises RuntimeFailure when the encoder was closed."""
        if self._graph is None:
            raise RuntimeFailure("the audio encoder was closed; open it again")
        return AudioStream(self, self._first_state)

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """A whole clip, 16 kHz mono float32 ``[n]`` of at most 30 s → soft tokens
        ``[k, n_embd]`` float32, 160 ms each (none for ≤ 512 samples).
        """
        stream = self.stream()
        return np.concatenate([stream.push(samples), stream.finish()])

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One step of the graph: soft tokens, then the next state in the order of
        the inputs. Raises RuntimeFailure.
        """
        if self._graph is None:
            raise RuntimeFailure("this audio stream has ended; start another one")
        return run_onnx(self._graph, _OUTPUTS, feeds)

    def close(self) -> None:
        """Free the weights. Streams of this encoder end."""
        self._graph = None
        trim_heap()

    def __enter__(self) -> AudioEncoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _empty(shape: list[int | str | None]) -> np.ndarray:
    """The state before the first step: free dimensions are 0, fixed ones hold zeros."""
    return np.zeros([n if isinstance(n, int) else 0 for n in shape], np.float32)


class AudioStream:
    """One clip on its way through the encoder (an :class:`Encoder`).

    Always steps of 12 frames (480 ms) from the clip's start: with integer
    activations a result depends on how rows are grouped, so this makes it bitwise
    the same for every packet size. Rows never change once given out.
    :meth:`AudioEncoder.stream` makes one.
    """

    def __init__(self, encoder: AudioEncoder, first_state: dict[str, np.ndarray]):
        self._encoder, self._mel = encoder, LogMel()
        self._state: dict[str, np.ndarray] | None = first_state  # None: ended
        self._pending = np.zeros((0, N_MELS), np.float32)  # mel rows from 2·_n_conv_0 on
        self._n_frames = 0  # conformer frames made

    @property
    def n_samples(self) -> int:
        """Samples pushed so far."""
        return self._mel.n_samples

    def push(self, samples: np.ndarray) -> np.ndarray:
        """16 kHz mono float32 ``[n]``, any n → the soft tokens ``[k, n_embd]`` that became ready.
        Raises MediaError (NaN, beyond 30 s), RuntimeFailure.
        """
        rows = self._mel.push(samples)
        self._pending = np.concatenate([self._pending, rows])
        soft = []
        while self._n_ready_frames() >= self._n_frames + STEP_FRAMES:
            soft.append(self._step(STEP_FRAMES, n_valid=_ALL_VALID))
        return self._joined(soft)

    def finish(self) -> np.ndarray:
        """The clip has ended → its last soft tokens ``[k, n_embd]``. Raises RuntimeFailure."""
        rows = self._mel.finish()
        padding = np.zeros((_PADDING_ROWS, N_MELS), np.float32)
        self._pending = np.concatenate([self._pending, rows, padding])
        n_conv_0 = -(-self._mel.n_rows // 2)  # rows made of sound; later ones are padding
        n_frames = -(-n_conv_0 // 2)
        soft = []
        while self._n_frames < n_frames:
            n = min(STEP_FRAMES, n_frames - self._n_frames)
            soft.append(self._step(n, n_valid=max(0, n_conv_0 - self._n_conv_0)))
        self.close()
        return self._joined(soft)

    def fork(self) -> AudioStream:
        """The clip so far once more. Every array of the state is replaced, never written to, so
        that both may share what they have.
        """
        other = copy(self)
        other._mel = copy(self._mel)
        return other

    def close(self) -> None:
        """Drop the clip's state; a later push fails."""
        self._state = None

    def _n_ready_frames(self) -> int:
        """Frames, from the clip's start, whose mel rows are there."""
        return (self._mel.n_rows - _MEL_OF_FIRST_FRAME) // _MEL_PER_FRAME + 1

    @property
    def _n_conv_0(self) -> int:
        """Rows of the first convolution made so far."""
        return 2 * self._n_frames + 1 if self._n_frames else 0

    def _step(self, n_frames: int, n_valid: int) -> np.ndarray:
        """Run ``n_frames`` more frames, of whose new first-convolution rows
        ``n_valid`` are sound and not padding → soft tokens ``[k, n_embd]``.
        """
        if self._state is None:
            raise RuntimeFailure("this audio stream has ended; start another one")
        n_conv_0 = 2 * (self._n_frames + n_frames) + 1 - self._n_conv_0  # new rows
        feeds = {
            "mel": self._pending[: 2 * n_conv_0 + 1],
            "frames": np.array([self._n_frames]),
            "valid": np.array([n_valid]),
            **self._state,
        }
        soft, *state = self._encoder.run(feeds)
        self._state = dict(zip(_STATE, state, strict=True))
        self._pending = self._pending[2 * n_conv_0 :]
        self._n_frames += n_frames
        return soft

    def _joined(self, soft: list[np.ndarray]) -> np.ndarray:
        if not soft:
            return np.zeros((0, self._encoder.part.n_embd), np.float32)
        return np.concatenate(soft)
