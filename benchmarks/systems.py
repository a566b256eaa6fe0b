"""What is measured: a :class:`Task`, and the ways to run one behind a single small interface.

In: a task. Out: a :class:`System` that loads a model, reads a prompt and yields once for each new
token; or one that encodes pictures. This project and the library it uses are here; what a user
would pick instead is in ``rivals.py``. What it does not know: time, memory, phases, processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from edge_gemma.model import Model


@dataclass(frozen=True)
class Task:
    """One run. ``path`` is a bundle for ``edge-gemma`` and a GGUF (or what that system reads) for
    others. Sizes in tokens.
    """

    system: str
    path: str
    n_ctx: int = 2048
    n_threads: int = 0  # 0: as the system chooses
    n_prompt: int = 512
    n_predict: int = 64
    rounds: int = 1
    budget_bytes: int = 0
    device: str = "auto"
    mode: str = "generate"  # what is done with the loaded model: one of worker.MODES
    audio_s: float = 0.0  # seconds of sound to hear before the prompt
    image_px: int = 0  # an image of that size to see before the prompt
    pad_audio: bool = False
    clips: tuple[str, ...] = ()  # recordings to listen to
    minutes: float = 0.0  # so much sound out of the clips
    settings: tuple[tuple[str, object], ...] = ()  # more arguments of the system's loader, by name

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        fields = json.loads(text)
        fields["settings"] = tuple((name, value) for name, value in fields["settings"])
        fields["clips"] = tuple(fields["clips"])
        return cls(**fields)


class System:
    """One way to run a model. ``generate`` yields once for each new token."""

    def __init__(self, task: Task):
        self.task = task

    def load(self) -> None:
        raise NotImplementedError

    def tokenize(self, text: str) -> list[int]:
        raise NotImplementedError

    def generate(self, ids: list[int], n_predict: int) -> Iterator[int]:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        return {}

    def perceive(self) -> Iterator[str]:
        """Hear and see what the task says; yields ``listen`` or ``look`` as each begins."""
        raise SystemExit(f"{self.task.system} neither hears nor sees here")

    def encode_picture(self, pixels: np.ndarray) -> np.ndarray:
        """``pixels [side, side, 3]`` uint8 → soft tokens ``[n, n_embd]`` float32."""
        raise SystemExit(f"{self.task.system} encodes no pictures here")

    def cpu_seconds(self) -> float:
        """CPU time so far of the process that computes."""
        return time.process_time()

    def close(self) -> None:
        """Let go of the model."""


class LlamaCpp(System):
    """``llama_cpp.Llama`` as it comes: the library's own defaults but for context, threads and
    quiet; without AMX, on which it may die.
    """

    def load(self) -> None:
        import ctypes

        import llama_cpp

        from edge_gemma.engines.llama.library import leave_amx_out

        leave_amx_out()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        options: dict[str, Any] = {"n_ctx": self.task.n_ctx, "verbose": False}
        if n := self.task.n_threads:
            options |= {"n_threads": n, "n_threads_batch": n}
        options |= dict(self.task.settings)
        self.model = llama_cpp.Llama(self.task.path, **options)

    def tokenize(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=True)

    def generate(self, ids: list[int], n_predict: int) -> Iterator[int]:
        for _ in self.model.create_completion(
            ids, max_tokens=n_predict, temperature=0, stream=True
        ):
            yield 1

    def facts(self) -> dict[str, Any]:
        import llama_cpp

        return {"version": f"llama-cpp-python {llama_cpp.__version__}"}

    def close(self) -> None:
        self.model.close()


class EdgeGemma(System):
    """This project, through its front door."""

    model: Model

    def load(self) -> None:
        import edge_gemma

        task = self.task
        settings: dict[str, Any] = dict(task.settings)
        request = edge_gemma.PlanRequest(n_threads=task.n_threads or None, **settings)
        self.model = edge_gemma.load(
            task.path,
            budget=task.budget_bytes or None,
            device=task.device,
            n_ctx=task.n_ctx or None,
            request=request,
        )

    def tokenize(self, text: str) -> list[int]:
        from edge_gemma import Tokens

        spans = self.model.spans(text)
        return [id for span in spans if isinstance(span, Tokens) for id in span.ids]

    def generate(self, ids: list[int], n_predict: int) -> Iterator[int]:
        from edge_gemma import Sampling, Tokens

        for chunk in self.model.generate(
            [Tokens(tuple(ids))], Sampling(temperature=0, max_tokens=n_predict)
        ):
            for _ in chunk.token_ids:
                yield 1

    def perceive(self) -> Iterator[str]:
        from edge_gemma.benchmarks import inputs

        if self.task.audio_s:
            yield "listen"
            self.model.encode_audio(inputs.sound(self.task.audio_s))
        if self.task.image_px:
            yield "look"
            self.model.encode_image(inputs.picture(self.task.image_px))

    def facts(self) -> dict[str, Any]:
        plan = self.model.plan
        return {
            "planned_peak_bytes": plan.total_bytes,
            "planned_load_peak_bytes": plan.load_peak_bytes,
            "items": [[item.name, item.bytes, item.kind, list(item.phases)] for item in plan.items],
            "settings": asdict(plan.settings),
            "concessions": list(plan.concessions),
        }

    def close(self) -> None:
        self.model.close()


class AudioEncoderAlone(System):
    """The audio encoder of a bundle, without its decoder. ``path``: the bundle."""

    def load(self) -> None:
        from edge_gemma.bundles.folder import Bundle
        from edge_gemma.hearing.encoder import AudioEncoder

        self.bundle = Bundle.open(self.task.path)
        self.encoder = AudioEncoder(self.bundle, n_threads=self.task.n_threads or 1)

    def facts(self) -> dict[str, Any]:
        part = self.bundle.manifest.audio
        assert part is not None
        return {"precision": part.precision, "weights_bytes": part.weights_bytes}

    def close(self) -> None:
        self.encoder.close()


class VisionEncoderAlone(System):
    """A vision encoder without a decoder. ``path``: a folder with ``vision_encoder.onnx``."""

    def load(self) -> None:
        from edge_gemma.engines.onnx.runtime import open_onnx

        self.session = open_onnx(
            Path(self.task.path) / "vision_encoder.onnx",
            n_threads=self.task.n_threads or 1,
            spin=True,
            in_place=True,
            sides={"side": self.task.image_px},
        )

    def encode_picture(self, pixels: np.ndarray) -> np.ndarray:
        from edge_gemma.benchmarks import inputs
        from edge_gemma.engines.onnx.runtime import run_onnx

        planes = inputs.normalized(pixels, Path(self.task.path).name)
        rows: np.ndarray = run_onnx(self.session, ["soft_tokens"], {"pixels": planes})[0]
        return rows


OWN: dict[str, type[System]] = {
    "edge-gemma": EdgeGemma,
    "llama_cpp.Llama": LlamaCpp,
    "edge-gemma audio encoder": AudioEncoderAlone,
    "edge-gemma vision encoder": VisionEncoderAlone,
}
