"""Vision encoders next to torch's export, timm and transformers, and llama.cpp's mtmd; and what
their conversion costs.

    python -m edge_gemma.benchmarks.dev.vision run FOLDER [--precisions f32,f16,int8]
                                          [--mtmd TEXT.gguf [--mtmd-types f32,f16,q8_0]]
                                          [--torch-python PYTHON] [--rounds 3] [--json]
    python -m edge_gemma.benchmarks.dev.vision activations FOLDER   what each input size takes
    python -m edge_gemma.benchmarks.dev.vision kinds FOLDER         what int8 saves and costs

``FOLDER`` is a checkpoint with a vision tower (a real one, or `dev.models siglip FOLDER`). Each
system is a process of its own; processes are interleaved, medians are shown. The last column is the
distance of the soft tokens from torch's, or from the first row's. ``--torch-python`` names an
interpreter with torch, transformers, timm, onnx and onnxscript: it runs the reference modules and
exports them for onnxruntime. ``--mtmd`` names a text GGUF of the family, whose vocabulary llama.cpp
asks for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from edge_gemma.benchmarks import inputs
from edge_gemma.benchmarks.dev import mtmd
from edge_gemma.benchmarks.dev.shapes import TOWER_PX
from edge_gemma.benchmarks.machine import describe_machine
from edge_gemma.benchmarks.regress import to_json
from edge_gemma.benchmarks.sections import Section
from edge_gemma.benchmarks.seeing import pictures
from edge_gemma.benchmarks.systems import System, Task, VisionEncoderAlone
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.mobilenet import TIMM
from edge_gemma.convert.vision import write_vision_encoder
from edge_gemma.engines.onnx.runtime import open_onnx
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.machine.footprint import footprint, trim_heap
from edge_gemma.machine.peak import PeakSampler
from edge_gemma.units import MiB

HERE = "edge_gemma.benchmarks.dev.vision"
TORCH = Path(__file__).with_name("torch_vision.py")
PICTURES_OF_A_PEAK = 8  # which blocks are alive together differs from picture to picture


# --- systems ---


class TorchExport(System):
    """onnxruntime as it comes, on torch's own export. ``path``: that file."""

    def load(self) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.task.n_threads
        self.session = onnxruntime.InferenceSession(
            self.task.path, options, providers=["CPUExecutionProvider"]
        )

    def encode_picture(self, pixels: np.ndarray) -> np.ndarray:
        planes = inputs.normalized(pixels, Path(self.task.path).name)
        rows: np.ndarray = self.session.run(None, {self.session.get_inputs()[0].name: planes})[0]
        return rows


class TorchModule(System):
    """The reference module in an interpreter with torch. ``path``: the checkpoint; settings
    ``python`` and ``kind``. Its memory is that process's.
    """

    def load(self) -> None:
        settings = dict(self.task.settings)
        kind, threads = str(settings["kind"]), str(self.task.n_threads)
        argv = [str(settings["python"]), str(TORCH), "worker", self.task.path, kind, threads]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        while line := self._out().readline():
            if line.startswith(b"ready"):
                return
        raise SystemExit(f"torch ended with status {self.process.wait()}")

    def _out(self) -> Any:
        assert self.process.stdout is not None
        return self.process.stdout

    def facts(self) -> dict[str, Any]:
        return {"watch_pid": self.process.pid}

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def encode_picture(self, pixels: np.ndarray) -> np.ndarray:
        assert self.process.stdin is not None
        self.process.stdin.write(pixels.tobytes())
        self.process.stdin.flush()
        shape = json.loads(self._out().readline())
        data = self._out().read(4 * int(np.prod(shape)))
        return np.frombuffer(data, np.float32).reshape(shape)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self._out().close()


# --- what they read ---


@dataclass(frozen=True)
class Choice:
    """What is compared, and where its files are."""

    folder: Path
    work: Path
    precisions: tuple[str, ...] = ("f32", "f16", "int8")
    mtmd_text: Path | None = None
    mtmd_types: tuple[str, ...] = ("f16",)
    torch_python: str | None = None
    n_threads: int = 2

    @property
    def kind(self) -> str:
        return tower_kind(Checkpoint.open(self.folder))

    @property
    def image_px(self) -> int:
        config = Checkpoint.open(self.folder).config["vision_config"]
        return int(config.get("image_size", TOWER_PX[self.kind]))


def tower_kind(checkpoint: Checkpoint) -> str:
    stem = TIMM + "conv_stem.conv.weight"
    return "mobilenetv5" if stem in checkpoint.names() else "siglip"


def prepare(choice: Choice) -> tuple[list[Path], list[Task]]:
    """Converts, exports and writes what the systems read into ``work``, as far as it is not there:
    our folders, and the tasks of the others.
    """
    choice.work.mkdir(parents=True, exist_ok=True)
    ours = [_our_encoder(choice, precision) for precision in choice.precisions]
    others = []
    if choice.torch_python:
        settings = (("python", choice.torch_python), ("kind", choice.kind))
        others.append(Task(f"{HERE}:TorchExport", str(_export(choice, choice.torch_python))))
        others.append(Task(f"{HERE}:TorchModule", str(choice.folder), settings=settings))
    if choice.mtmd_text:
        n_embd = Checkpoint.open(choice.folder).config["text_config"]["hidden_size"]
        source = choice.mtmd_text
        text = _made(
            choice.work / f"{choice.kind}-text.gguf",
            lambda out: mtmd.of_width(source, n_embd, out),
        )
        for dtype in choice.mtmd_types:
            path = _mmproj(choice, dtype)
            others.append(Task(f"{mtmd.__name__}:Mtmd", str(path), settings=(("text", str(text)),)))
    return ours, others


def _made(path: Path, make: Callable[[Path], object]) -> Path:
    """Made in a folder beside it under its own name, because an exported graph names its data file;
    the name that is asked for appears last.
    """
    if path.exists():
        return path
    print(f"making {path}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent) as partial:
        make(Path(partial) / path.name)
        for file in sorted(Path(partial).iterdir(), key=lambda file: file.name == path.name):
            file.rename(path.parent / file.name)
    return path


def _our_encoder(choice: Choice, precision: str) -> Path:
    def make(out: Path) -> None:
        out.mkdir()
        write_vision_encoder(Checkpoint.open(choice.folder), out, precision)

    return _made(choice.work / f"{choice.kind}-{precision}", make)


def _mmproj(choice: Choice, dtype: str) -> Path:
    def make(out: Path) -> None:
        mtmd.write_mmproj(Checkpoint.open(choice.folder), out, dtype)

    return _made(choice.work / f"{choice.kind}-mmproj-{dtype}.gguf", make)


def _export(choice: Choice, python: str) -> Path:
    def make(out: Path) -> None:
        argv = [python, str(TORCH), "export", str(choice.folder), choice.kind, str(out)]
        subprocess.run(argv, check=True, stdout=sys.stderr)

    return _made(choice.work / f"{choice.kind}-torch.onnx", make)


def run(choice: Choice, rounds: int) -> Section:
    """One picture through all of them. Raises RuntimeFailure."""
    ours, others = prepare(choice)
    return pictures(
        ours,
        others,
        image_px=choice.image_px,
        n_threads=choice.n_threads,
        rounds=rounds,
        reference="TorchModule",
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )


# --- what conversion costs ---


def activations(folder: Path, precisions: tuple[str, ...]) -> None:
    """Anonymous memory at the peak of one image, beyond an opened session, for each input size."""
    checkpoint = Checkpoint.open(folder)
    code = f"import sys; from {HERE} import activation; activation(sys.argv[1], int(sys.argv[2]))"
    for precision in precisions:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            part = write_vision_encoder(checkpoint, Path(scratch), precision)
            for size in part.image_sizes:
                argv = [sys.executable, "-c", code, scratch, str(size)]
                done = subprocess.run(argv, check=True, capture_output=True, text=True)
                print(
                    f"{part.kind} {precision} {size} px: {int(done.stdout) / MiB:.0f} MiB "
                    f"measured, {part.activation_bytes[str(size)] / MiB:.0f} MiB in the manifest"
                )


def activation(folder: str, size: int) -> None:
    """Prints the bytes; in a process of its own."""
    graph = Path(folder) / "vision_encoder.onnx"
    session = open_onnx(graph, n_threads=2, spin=True, in_place=True, sides={"side": size})
    pixels, before = np.zeros((1, 3, size, size), np.float32), footprint(exact=False).anon_bytes
    with PeakSampler(interval_s=0.003) as sampler:
        for _ in range(PICTURES_OF_A_PEAK):
            session.run(None, {"pixels": pixels})
            trim_heap()
    print(max(phase.peak_anon_bytes for phase in sampler.phases) - before)


# layer kinds by tensor name
KINDS = {
    "siglip": {
        "attention q, k": r"[qk]_proj",
        "attention v, out": r"(v|out)_proj",
        "MLP in": "fc1",
        "MLP out": "fc2",
    },
    "mobilenetv5": {
        "attention q, k": r"attn\.(query|key)",
        "attention v, out": r"attn\.(value|output)",
        "1×1 wider, stages 1–2": r"blocks\.[01]\..*(pw_exp|conv_exp)",
        "1×1 narrower, stages 1–2": r"blocks\.[01]\..*(pw_proj|conv_pwl)",
        "1×1 wider, stages 3–4": r"blocks\.[23]\..*pw_exp",
        "1×1 narrower, stages 3–4": r"blocks\.[23]\..*pw_proj",
        "fusion": r"msfa\.ffn",
    },
}


def kinds(folder: Path) -> None:
    """int8 for one kind of layer at a time, the rest float32: MiB saved, error of the soft tokens
    (relative rms), seconds of one image.
    """
    checkpoint = Checkpoint.open(folder)
    kind = tower_kind(checkpoint)
    variants: list[tuple[str, str, str | None]] = [("none", "f32", None)]
    variants += [(name, "int8", pattern) for name, pattern in KINDS[kind].items()]
    variants += [("all", "int8", ""), ("as converted", "int8", None)]
    exact, f32_bytes = np.zeros(0), 0
    for name, precision, only in variants:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            target = Path(scratch) / kind
            target.mkdir()
            part = write_vision_encoder(checkpoint, target, precision, only=only)
            soft, seconds = _encode(target, part.image_sizes[0])
        if name == "none":
            exact, f32_bytes = soft, part.weights_bytes
        error = float(np.sqrt(((soft - exact) ** 2).mean() / exact.var()))
        saved = (f32_bytes - part.weights_bytes) // MiB
        print(f"{name:28}{saved:6d} MiB saved{error:10.4f} relative rms{seconds:8.2f} s")


def _encode(folder: Path, image_px: int) -> tuple[np.ndarray, float]:
    """Soft tokens of the picture, and the seconds of the second one."""
    task = Task("edge-gemma vision encoder", str(folder), n_threads=2, image_px=image_px)
    encoder = VisionEncoderAlone(task)
    encoder.load()
    pixels = inputs.picture(image_px)
    encoder.encode_picture(pixels)
    began = time.perf_counter()
    rows = encoder.encode_picture(pixels)
    return rows, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "activations", "kinds"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, help="where files are made (default: FOLDER)")
    parser.add_argument("--precisions", default="f32,f16,int8")
    parser.add_argument("--mtmd", type=Path, metavar="TEXT.gguf")
    parser.add_argument("--mtmd-types", default="f16", help=f"of {', '.join(mtmd.TYPES)}")
    parser.add_argument("--torch-python", metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    precisions = tuple(filter(None, options.precisions.split(",")))
    if options.command == "activations":
        return activations(options.folder, precisions)
    if options.command == "kinds":
        return kinds(options.folder)
    choice = Choice(
        options.folder,
        options.work or options.folder,
        precisions,
        options.mtmd,
        tuple(filter(None, options.mtmd_types.split(","))),
        options.torch_python,
        options.threads,
    )
    section, machine = run(choice, options.rounds), describe_machine()
    if options.json:
        print(json.dumps(to_json([section], machine)))
    else:
        print(f"{machine['text']}, onnxruntime {machine['onnxruntime']}\n\n{section.markdown()}")


if __name__ == "__main__":
    try:
        main()
    except EdgeGemmaError as error:
        sys.exit(f"vision: {error}")
