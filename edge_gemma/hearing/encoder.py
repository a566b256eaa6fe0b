"""Features → soft tokens. The only room that imports onnxruntime; its errors become ours here."""

from __future__ import annotations

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import require
from edge_gemma.engines.onnx.runtime import open_onnx, run_onnx
from edge_gemma.errors import BundleError, RuntimeFailure
from edge_gemma.hearing.log_mel import N_MELS, LogMel
from edge_gemma.machine.footprint import trim_heap

STEP_FRAMES = 12  # conformer frames of 40 ms that are run at a time: 480 ms
_STATE = (
    "conv_0",
    "group_norm",
    "keys",
    "values",
    "conv",
)  # inputs; outputs are next_…; see edge_gemma/convert/audio.py


class AudioEncoder:
    """The audio tower of a bundle, loaded: weights only.

    Each clip is a :meth:`stream` of its own, so one encoder serves many.

    ``n_threads`` is the encoder's own; beside a running decoder one is often faster than two.

    >>> with AudioEncoder(Bundle.open("my-gemma-3n"), n_threads=1) as encoder:
    ...     encoder.encode(np.zeros(16000, np.float32)).shape
    (7, 256)
    """

    def __init__(self, bundle: Bundle, *, n_threads: int = 2, spin: bool = False):
        self.part = require(bundle.manifest, "audio")
        self._session = open_onnx(bundle.path(self.part.file), n_threads=n_threads, spin=spin)
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        if (
            set(shapes) != {"mel", "frames", "valid", *_STATE}
            or self._session.get_outputs()[0].shape[1] != self.part.n_embd
        ):
            raise BundleError(
                f"{bundle.path(self.part.file)} is not a streaming audio encoder of this "
                f"version (inputs {sorted(shapes)}); convert the model again"
            )
        self._first_state = {
            name: np.zeros([n if isinstance(n, int) else 0 for n in shapes[name]], np.float32)
            for name in _STATE
        }

    def stream(self) -> AudioStream:
        """Start one clip. Raises RuntimeFailure when the encoder was closed."""
        if self._session is None:
            raise RuntimeFailure("the audio encoder was closed; open it again")
        return AudioStream(self)

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """A whole clip, 16 kHz mono float32 ``[n]`` of at most 30 s → soft tokens ``[k, n_embd]``
        float32, 160 ms each (none for ≤ 512 samples).
        """
        stream = self.stream()
        return np.concatenate([stream.push(samples), stream.finish()])

    def close(self) -> None:
        """Let go of the weights. Streams of this encoder end."""
        self._session = None
        trim_heap()

    def __enter__(self) -> AudioEncoder:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class AudioStream:
    """One clip on its way through the encoder (the ``Encoder`` protocol: push, finish, close).

    Always steps of 12 frames (480 ms) from the clip's start: with integer activations a result
    depends on how rows are grouped, so this makes it bitwise the same for every packet size. Rows
    never change once given out.
    """

    def __init__(self, encoder: AudioEncoder):
        self._encoder, self._mel = encoder, LogMel()
        self._state = encoder._first_state
        self._pending = np.zeros((0, N_MELS), np.float32)  # mel rows from 2·conv_0 rows made on
        self._frames = 0  # conformer frames made

    @property
    def n_samples(self) -> int:
        return self._mel.n_samples

    def push(self, samples: np.ndarray) -> np.ndarray:
        """16 kHz mono float32 ``[n]``, any n → the soft tokens ``[k, n_embd]`` that became ready.
        Raises MediaError (NaN, beyond 30 s).
        """
        self._pending = np.concatenate([self._pending, self._mel.push(samples)])
        soft = []
        while (
            self._mel.n_rows - 7
        ) // 4 + 1 - self._frames >= STEP_FRAMES:  # frame t needs mel rows 4t … 4t+6
            soft.append(self._step(STEP_FRAMES, valid=1 << 40))
        return self._rows(soft)

    def finish(self) -> np.ndarray:
        """The clip has ended → its last soft tokens ``[k, n_embd]``."""
        rows = self._mel.finish()
        n_conv_0 = -(
            -self._mel.n_rows // 2
        )  # rows of the first block that exist; later ones are zero padding
        n_frames = -(-n_conv_0 // 2)
        self._pending = np.concatenate([self._pending, rows, np.zeros((8, N_MELS), np.float32)])
        soft = []
        while (n := min(STEP_FRAMES, n_frames - self._frames)) > 0:
            soft.append(self._step(n, valid=max(0, n_conv_0 - self._conv_0_rows())))
        self.close()
        return self._rows(soft)

    def close(self) -> None:
        """Drop the clip's state; a later push fails."""
        self._state = None

    def _conv_0_rows(self) -> int:
        return 2 * self._frames + 1 if self._frames else 0

    def _step(self, n: int, valid: int) -> np.ndarray:
        if self._state is None or self._encoder._session is None:
            raise RuntimeFailure("this audio stream has ended; start another one")
        rows = (
            2 * (self._frames + n) + 1 - self._conv_0_rows()
        )  # new conv_0 rows; row r needs mel rows 2r … 2r+2
        feeds = {
            "mel": self._pending[: 2 * rows + 1],
            "frames": np.array([self._frames]),
            "valid": np.array([valid]),
            **self._state,
        }
        soft, *state = run_onnx(
            self._encoder._session, ["soft", *(f"next_{name}" for name in _STATE)], feeds
        )
        self._state = dict(zip(_STATE, state, strict=True))
        self._pending = self._pending[2 * rows :]
        self._frames += n
        return soft

    def _rows(self, soft: list[np.ndarray]) -> np.ndarray:
        return (
            np.concatenate(soft) if soft else np.zeros((0, self._encoder.part.n_embd), np.float32)
        )
