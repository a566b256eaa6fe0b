"""What is measured: a :class:`Task`, and the ways to run one behind a single small interface.

In: a task. Out: a :class:`System` that loads a model, reads a prompt and yields once for each new
token. Here stand this project and the library it uses; what a user would pick instead is in
``rivals.py``. What it does not know: time, memory, phases, processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass


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
    mode: str = "generate"  # or, for edge-gemma: speech, text (see `answer_latency`)
    audio_s: float = 0.0  # seconds of sound to hear before the prompt
    image_px: int = 0  # an image of that size to see before the prompt
    pad_audio: bool = False
    settings: tuple[tuple[str, object], ...] = ()  # more arguments of the system's loader, by name

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        fields = json.loads(text)
        fields["settings"] = tuple((name, value) for name, value in fields["settings"])
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

    def facts(self) -> dict:
        return {}

    def perceive(self) -> Iterator[str]:
        """Hear and see what the task says; yields ``listen`` or ``look`` as each begins."""
        raise SystemExit(f"{self.task.system} neither hears nor sees here")

    def close(self) -> None:
        pass


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
        threads = (
            {"n_threads": self.task.n_threads, "n_threads_batch": self.task.n_threads}
            if self.task.n_threads
            else {}
        )
        self.model = llama_cpp.Llama(
            self.task.path,
            n_ctx=self.task.n_ctx,
            verbose=False,
            **threads,
            **dict(self.task.settings),
        )

    def tokenize(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), add_bos=True)

    def generate(self, ids: list[int], n_predict: int) -> Iterator[int]:
        for _ in self.model.create_completion(
            ids, max_tokens=n_predict, temperature=0, stream=True
        ):
            yield 1

    def facts(self) -> dict:
        import llama_cpp

        return {"version": f"llama-cpp-python {llama_cpp.__version__}"}

    def close(self) -> None:
        self.model.close()


class EdgeGemma(System):
    """This project, through its front door."""

    def load(self) -> None:
        import edge_gemma

        task = self.task
        request = edge_gemma.PlanRequest(n_threads=task.n_threads or None, **dict(task.settings))
        self.model = edge_gemma.load(
            task.path,
            budget=task.budget_bytes or None,
            device=task.device,
            n_ctx=task.n_ctx or None,
            request=request,
        )

    def tokenize(self, text: str) -> list[int]:
        return [id for span in self.model.spans(text) for id in span.ids]

    def generate(self, ids: list[int], n_predict: int) -> Iterator[int]:
        from edge_gemma import Sampling, Tokens

        for chunk in self.model.generate(
            [Tokens(ids)], Sampling(temperature=0, max_tokens=n_predict)
        ):
            for _ in chunk.token_ids:
                yield 1

    def perceive(self) -> Iterator[str]:
        import numpy as np

        if self.task.audio_s:
            yield "listen"
            self.model.encode_audio(sound(self.task.audio_s))
        if self.task.image_px:
            yield "look"
            image = np.random.default_rng(0).integers(
                0, 255, (self.task.image_px, self.task.image_px, 3), dtype=np.uint8
            )
            self.model.encode_image(image)

    def facts(self) -> dict:
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


OWN: dict[str, type[System]] = {"edge-gemma": EdgeGemma, "llama_cpp.Llama": LlamaCpp}


def sound(seconds: float):
    """A hum with noise, at 16 kHz. # [n] float32"""
    import numpy as np

    t = np.arange(int(seconds * 16000)) / 16000
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (0.1 * np.sin(2 * np.pi * 220 * t) + 0.02 * noise).astype(np.float32)
