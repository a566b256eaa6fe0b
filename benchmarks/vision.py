"""Vision encoders of real size with random weights: time per image and memory, next to torch's
export, timm and llama.cpp's mtmd.

    python -m edge_gemma.benchmarks.vision write siglip FOLDER                     a checkpoint of that tower alone
    python -m edge_gemma.benchmarks.vision run FOLDER [--precisions f32,f16,int8] [--mtmd TEXT.gguf [--mtmd-types f32,f16,q8_0]]
                                               [--torch-python PYTHON] [--rounds 3] [--work DIR]
                                               [--json]
    python -m edge_gemma.benchmarks.vision prepare FOLDER …                        makes the files that `run` with the same options times
    python -m edge_gemma.benchmarks.vision activations FOLDER [--precisions …]     what each input size takes beyond the weights
    python -m edge_gemma.benchmarks.vision kinds FOLDER                            what int8 saves and costs, layer kind by layer kind
    python -m edge_gemma.benchmarks.vision bundle FOLDER DECODER.gguf OUT          that tower before a decoder of the same width
    python -m edge_gemma.benchmarks.vision conversation BUNDLE [--images 20]       turns with one picture each: planned and measured memory

``FOLDER`` is a checkpoint with a vision tower (written here, or a real one). Each contender is a
process of its own; rounds are interleaved, one image per contender and round (the first warms up),
medians are shown. The last column is the distance of the soft tokens from torch's. Peak PSS is
sampled from the process's start to its last image, its own libraries included. ``--torch-python``
names an interpreter with torch, transformers, timm, onnx and onnxscript: it runs the reference
modules and exports them for onnxruntime. ``--mtmd`` names a text GGUF of the family, whose
vocabulary llama.cpp asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from edge_gemma.benchmarks.dev.vision_checkpoint import SIZES, write_checkpoint
from edge_gemma.benchmarks.dev.vision_mtmd import TYPES as MTMD_TYPES
from edge_gemma.benchmarks.dev.vision_mtmd import of_width, soft_tokens, write_mmproj
from edge_gemma.benchmarks.machine import describe_machine

from edge_gemma.errors import EdgeGemmaError, RuntimeFailure, UsageError
from edge_gemma.machine.peak import PeakSampler
from edge_gemma.units import MiB

_PROBE = 997  # every so many-th value of the soft tokens is compared; likewise in vision_torch.py


# ---- contenders: each prints "ready", then answers every line with one image


def _worker(kind: str, *arguments: str) -> None:
    encode = {"ours": _ours, "onnx": _onnx, "mtmd": _mtmd}[kind](*arguments)
    next(encode)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        rows = next(encode)
        print(
            json.dumps(
                {
                    "seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                    "probe": np.asarray(rows, np.float64).reshape(-1)[::_PROBE].tolist(),
                }
            ),
            flush=True,
        )


def _pixels(size: int) -> np.ndarray:  # [size, size, 3] uint8
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:size, 0:size]
    values = np.stack(
        [255 * x / size, 255 * y / size, 127 + 127 * np.sin((x + y) / 37)], -1
    ) + rng.normal(0, 8, (size, size, 3))
    return values.clip(0, 255).astype(np.uint8)


def _normalized(kind: str) -> np.ndarray:  # [1, 3, size, size] float32, as the graphs take it
    mean, std = (0.5, 0.5) if kind == "siglip" else (0.0, 1.0)
    return (
        np.ascontiguousarray(_pixels(SIZES[kind]).transpose(2, 0, 1)[None], np.float32)
        / np.float32(255)
        - np.float32(mean)
    ) / np.float32(std)


def _ours(folder: str, kind: str, threads: str) -> Iterator:
    from edge_gemma.engines.onnx.runtime import open_onnx, run_onnx

    session = open_onnx(
        Path(folder) / "vision_encoder.onnx",
        n_threads=int(threads),
        spin=True,
        in_place=True,
        sides={"side": SIZES[kind]},
    )
    yield None
    while True:
        yield run_onnx(session, ["soft_tokens"], {"pixels": _normalized(kind)})[0]


def _onnx(path: str, kind: str, threads: str) -> Iterator:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    yield None
    while True:
        yield session.run(None, {session.get_inputs()[0].name: _normalized(kind)})[0]


def _mtmd(path: str, kind: str, threads: str, text: str) -> Iterator:
    return soft_tokens(path, text, lambda: _pixels(SIZES[kind]), int(threads))


class Contender:
    """One process and what was measured of it."""

    def __init__(self, name: str, argv: list[str]):
        self.name = name
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._sampler = PeakSampler(self.process.pid, interval_s=0.01)
        self._sampler.__enter__()
        self.answers: list[dict] = []
        self._expect("ready")

    def _expect(self, prefix: str) -> str:
        for line in self.process.stdout:
            if line.startswith(prefix):
                return line
        raise ChildProcessError(f"{self.name} ended with status {self.process.wait()}")

    def encode(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.answers.append(json.loads(self._expect("{")))

    def close(self) -> dict:
        self._sampler.__exit__(None, None, None)
        self.process.stdin.close()
        self.process.wait()
        counted = self.answers[1:] or self.answers  # the first warms up
        return {
            "contender": self.name,
            "seconds": round(median(a["seconds"] for a in counted), 3),
            "cpu_seconds": round(median(a["cpu_seconds"] for a in counted), 3),
            "peak_pss_mib": self._sampler.peak_pss_bytes // MiB,
            "peak_anon_mib": max(phase.peak_anon_bytes for phase in self._sampler.phases) // MiB,
            "probe": self.answers[-1]["probe"],
        }


@dataclass(frozen=True)
class Choice:
    """What is compared, and where its files are."""

    folder: Path
    precisions: tuple[str, ...]
    mtmd_text: str | None
    mtmd_types: tuple[str, ...]
    torch_python: str | None
    threads: int


def prepare(choice: Choice, work: Path) -> list[tuple[str, list[str]]]:
    """Converts, exports and writes what the contenders need into ``work``, as far as it is not
    there. Returns (name, command) of each contender.
    """
    from edge_gemma.convert.checkpoint import Checkpoint
    from edge_gemma.convert.mobilenet import TIMM
    from edge_gemma.convert.vision import write_vision_encoder

    checkpoint = Checkpoint.open(choice.folder)
    kind = "mobilenetv5" if TIMM + "conv_stem.conv.weight" in checkpoint.names() else "siglip"
    n_embd = checkpoint.config["text_config"]["hidden_size"]
    module, threads = (
        [sys.executable, "-m", "edge_gemma.benchmarks.vision", "worker"],
        str(choice.threads),
    )
    commands = []

    def made(name: str, make: Callable[[Path], object]) -> Path:
        path = work / name
        if not path.exists():
            print(f"making {name} …", file=sys.stderr)
            with tempfile.TemporaryDirectory(
                dir=work
            ) as partial:  # under its own name, because an exported graph names its data file
                make(Path(partial) / name)
                for file in sorted(
                    Path(partial).iterdir(), key=lambda file: file.name == name
                ):  # the name that is asked for comes last
                    file.rename(work / file.name)
        return path

    def convert(precision: str, folder: Path) -> None:
        folder.mkdir()
        write_vision_encoder(checkpoint, folder, precision)

    for precision in choice.precisions:
        folder = made(f"{kind}-{precision}", partial(convert, precision))
        commands.append((f"edge-gemma {precision}", [*module, "ours", str(folder), kind, threads]))
    if choice.torch_python:
        script = str(Path(__file__).with_name("dev") / "vision_torch.py")
        export = made(
            f"{kind}-torch.onnx",
            lambda out: subprocess.run(
                [choice.torch_python, script, "export", str(choice.folder), kind, str(out)],
                check=True,
                stdout=sys.stderr,
            ),
        )
        commands.append(
            ("onnxruntime on torch's export", [*module, "onnx", str(export), kind, threads])
        )
        commands.append(
            (
                "timm / transformers in torch",
                [choice.torch_python, script, "worker", str(choice.folder), kind, threads],
            )
        )
    if choice.mtmd_text:
        text = made(f"{kind}-text.gguf", lambda out: of_width(Path(choice.mtmd_text), n_embd, out))
        for dtype in choice.mtmd_types:
            mmproj = made(
                f"{kind}-mmproj-{dtype}.gguf",
                lambda out, dtype=dtype: write_mmproj(checkpoint, out, dtype),
            )
            commands.append(
                (
                    f"llama.cpp mtmd {dtype}",
                    [*module, "mtmd", str(mmproj), kind, threads, str(text)],
                )
            )
    return commands


def run(commands: list[tuple[str, list[str]]], rounds: int) -> list[dict]:
    contenders = [Contender(name, argv) for name, argv in commands]
    for number in range(rounds + 1):
        for contender in list(contenders):
            try:
                contender.encode()
                print(
                    f"round {number}: {contender.name} {contender.answers[-1]['seconds']:.2f} s",
                    file=sys.stderr,
                )
            except ChildProcessError as error:
                contenders.remove(contender)  # llama.cpp aborts on some files; the others go on
                print(f"round {number}: {error}; left out", file=sys.stderr)
    if not contenders:
        raise RuntimeFailure("no contender encoded a picture; why each ended is said above")
    rows = [contender.close() for contender in contenders]
    probes = {row["contender"]: np.array(row.pop("probe")) for row in rows}
    reference = next(
        (probe for name, probe in probes.items() if name.endswith("in torch")),
        probes[rows[0]["contender"]],
    )
    for row in rows:
        probe = probes[row["contender"]]  # a contender may hand out fewer rows
        row["relative_rms"] = (
            float(np.sqrt(((probe - reference) ** 2).mean() / reference.var()))
            if probe.shape == reference.shape
            else None
        )
    return rows


def activations(folder: Path, precisions: list[str]) -> None:
    """Anonymous memory at the peak of one image, beyond an opened session, for each input size."""
    from edge_gemma.convert.checkpoint import Checkpoint
    from edge_gemma.convert.vision import write_vision_encoder

    checkpoint = Checkpoint.open(folder)
    for precision in precisions:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            part = write_vision_encoder(checkpoint, Path(scratch), precision)
            for size in part.image_sizes:
                script = (
                    "import sys; from edge_gemma.benchmarks.vision import _activation; "
                    "_activation(sys.argv[1], int(sys.argv[2]))"
                )
                done = subprocess.run(
                    [sys.executable, "-c", script, scratch, str(size)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                print(
                    f"{part.kind} {precision} {size} px: {int(done.stdout) / MiB:.0f} MiB "
                    f"measured, {part.activation_bytes[str(size)] / MiB:.0f} MiB in the "
                    "manifest"
                )


def _activation(folder: str, size: int) -> None:
    from edge_gemma.engines.onnx.runtime import open_onnx
    from edge_gemma.machine.footprint import footprint, trim_heap

    session = open_onnx(
        Path(folder) / "vision_encoder.onnx",
        n_threads=2,
        spin=True,
        in_place=True,
        sides={"side": size},
    )
    pixels, before = np.zeros((1, 3, size, size), np.float32), footprint(exact=False).anon_bytes
    with PeakSampler(interval_s=0.003) as sampler:
        for _ in range(
            8
            # which blocks are alive together, and how the heap falls to pieces, differs from run to
            # run
        ):
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


def kinds(folder: Path) -> list[dict]:
    """int8 for one kind of layer at a time, the rest float32: MiB saved, error of the soft tokens
    (relative rms), seconds of one image.
    """
    from edge_gemma.convert.checkpoint import Checkpoint
    from edge_gemma.convert.vision import write_vision_encoder

    checkpoint, exact, rows = Checkpoint.open(folder), None, []
    kind = "mobilenetv5" if any(".timm_model." in name for name in checkpoint.names()) else "siglip"
    for name, precision, only in (
        ("none", "f32", None),
        *((name, "int8", only) for name, only in KINDS[kind].items()),
        ("all", "int8", ""),
        ("as converted", "int8", None),
    ):
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            part = write_vision_encoder(checkpoint, Path(scratch), precision, only=only)
            encode = _ours(scratch, part.kind, "2")
            next(encode)
            next(encode)  # warms up
            began = time.perf_counter()
            soft = next(encode)
            seconds = time.perf_counter() - began
        if exact is None:
            exact, f32_bytes = soft, part.weights_bytes
        error = float(np.sqrt(((soft - exact) ** 2).mean() / exact.var()))
        rows.append(
            {
                "int8 in": name,
                "saved_mib": (f32_bytes - part.weights_bytes) // MiB,
                "relative_rms": round(error, 5),
                "seconds": round(seconds, 2),
            }
        )
        print(
            f"{name:28}{rows[-1]['saved_mib']:6d} MiB saved{error:10.4f} relative "
            f"rms{seconds:8.2f} s",
            flush=True,
        )
    return rows


def make_bundle(folder: Path, decoder: Path, out: Path, precision: str) -> None:
    """The tower of ``folder`` and the decoder of a GGUF as one bundle, for measuring both together."""
    import msgspec
    from edge_gemma.convert.special_rows import hard_rows
    from edge_gemma.convert.checkpoint import Checkpoint
    from edge_gemma.convert.vision import write_vision_encoder

    from edge_gemma.bundles.folder import BundleWriter, file_entry
    from edge_gemma.store.importer import import_gguf

    checkpoint, embedder = Checkpoint.open(folder), "model.embed_vision."
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary, BundleWriter(out) as writer:
        imported = import_gguf(decoder, Path(temporary) / "text")
        base = imported.manifest
        imported.decoder_path.rename(writer.folder / base.decoder.file)
        part = write_vision_encoder(checkpoint, writer.folder, precision)
        if part.n_embd != base.decoder.n_embd:
            raise UsageError(
                f"the tower gives rows {part.n_embd} wide, {decoder.name} takes "
                f"{base.decoder.n_embd}; write it with --n-embd {base.decoder.n_embd}"
            )
        tokens = {
            "start_of_image": 255999,
            "end_of_image": 256000,
        } | base.special_tokens  # a random decoder's vocabulary need not name them
        rows = ()
        if embedder + "hard_embedding_norm.weight" in checkpoint.names():
            rows = ("end_of_image",)
            np.save(
                writer.folder / "special_rows.npy",
                hard_rows(checkpoint, embedder, [0]).astype(np.float32),
            )
        files = {
            path.name: file_entry(path)
            for path in writer.folder.iterdir()
            if not path.name.startswith(".")
        }
        writer.commit(
            msgspec.structs.replace(
                base,
                name=f"{base.name} with eyes",
                vision=part,
                special_rows=rows,
                special_tokens=tokens,
                files=files,
            )
        )


def conversation(
    bundle: str, n_images: int, n_ctx: int | None, size: int, threads: int | None, scratch: str
) -> dict:
    """``n_images`` turns with one new picture and a question each. The oldest turns make room; the
    peak is held against the plan.
    """
    import edge_gemma

    os.environ["XDG_CACHE_HOME"] = (
        scratch  # soft tokens that an earlier run left behind would spare this one its encoder
    )
    options = edge_gemma.Sampling(max_tokens=8, temperature=0)
    with (
        PeakSampler() as sampler,
        edge_gemma.load(
            bundle, n_ctx=n_ctx, request=edge_gemma.PlanRequest(n_threads=threads)
        ) as model,
        model.chat() as chat,
    ):
        sampler.rebase()
        dropped = 0
        for number in range(n_images):
            pixels = np.roll(_pixels(size), 40 * number, axis=1)
            for chunk in chat.send(
                [edge_gemma.Picture(pixels), f"Picture {number + 1}: what is new?"], options
            ):
                dropped += chunk.usage.dropped_turns if chunk.usage else 0
        plan = model.plan
    return {
        "images": n_images,
        "n_ctx": plan.settings.n_ctx,
        "turns_dropped": dropped,
        "planned_bytes": plan.total_bytes,
        "measured_peak_pss_bytes": sampler.peak_pss_bytes,
        "inside": sampler.peak_pss_bytes <= plan.total_bytes,
    }


def main(argv: list[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["worker"]:
        return _worker(*arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m edge_gemma.benchmarks.vision", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("kind", choices=list(SIZES))
    write.add_argument("folder", type=Path)
    write.add_argument("--n-embd", type=int)
    ready = commands.add_parser("prepare")
    bench = commands.add_parser("run")
    for each in (ready, bench):
        each.add_argument("folder", type=Path)
        each.add_argument(
            "--work",
            type=Path,
            help="where the contenders' files are made, once (default: FOLDER itself)",
        )
        each.add_argument("--precisions", default="f32,f16,int8")
        each.add_argument("--mtmd", metavar="TEXT.gguf")
        each.add_argument(
            "--mtmd-types", default="f16", help=f"of the mmproj file: {', '.join(MTMD_TYPES)}"
        )
        each.add_argument("--torch-python", metavar="PYTHON")
        each.add_argument("--threads", type=int, default=2)
    bench.add_argument("--rounds", type=int, default=3)
    bench.add_argument("--json", action="store_true")
    extra = commands.add_parser("activations")
    extra.add_argument("folder", type=Path)
    extra.add_argument("--precisions", default="f32,f16,int8")
    each_kind = commands.add_parser("kinds")
    each_kind.add_argument("folder", type=Path)
    whole = commands.add_parser("bundle")
    whole.add_argument("folder", type=Path)
    whole.add_argument("decoder", type=Path)
    whole.add_argument("out", type=Path)
    whole.add_argument("--precision", default="f16", choices=["f32", "f16", "int8"])
    talk = commands.add_parser("conversation")
    talk.add_argument("bundle")
    talk.add_argument("--images", type=int, default=20)
    talk.add_argument("--ctx", type=int)
    talk.add_argument("--threads", type=int)
    talk.add_argument("--size", type=int, default=768, help="side of the pictures in pixels")
    options = parser.parse_args(arguments)
    if options.command == "activations":
        return activations(options.folder, options.precisions.split(","))
    if options.command == "conversation":
        with tempfile.TemporaryDirectory() as scratch:
            return print(
                json.dumps(
                    conversation(
                        options.bundle,
                        options.images,
                        options.ctx,
                        options.size,
                        options.threads,
                        scratch,
                    )
                )
            )
    if options.command == "kinds":
        kinds(options.folder)
        return
    if options.command == "bundle":
        return make_bundle(options.folder, options.decoder, options.out, options.precision)
    if options.command == "write":
        return write_checkpoint(options.kind, options.folder, options.n_embd)
    words = [
        tuple(filter(None, value.split(","))) for value in (options.precisions, options.mtmd_types)
    ]
    work = options.work or options.folder
    work.mkdir(parents=True, exist_ok=True)
    commands = prepare(
        Choice(
            options.folder, words[0], options.mtmd, words[1], options.torch_python, options.threads
        ),
        work,
    )
    if options.command == "prepare":
        return
    rows = run(commands, options.rounds)
    if options.json:
        return print(
            json.dumps(
                {
                    "machine": describe_machine(),
                    "threads": options.threads,
                    "rounds": options.rounds,
                    "rows": rows,
                }
            )
        )
    print(
        describe_machine()["text"],
        f", onnxruntime {describe_machine()['onnxruntime']}; {options.threads} threads",
        sep="",
    )
    print(
        f"{'':32}{'s / image':>10}{'cpu s':>8}{'peak PSS':>12}{'anonymous':>12}{'rms difference':>16}"
    )
    for row in rows:
        memory = f"{row['peak_pss_mib']:8d} MiB{row['peak_anon_mib']:8d} MiB"
        print(
            f"{row['contender']:32}{row['seconds']:10.2f}{row['cpu_seconds']:8.1f}{memory}{'–' if row['relative_rms'] is None else format(row['relative_rms'], '.1e'):>16}"
        )


if __name__ == "__main__":
    try:
        main()
    except EdgeGemmaError as error:
        sys.exit(f"vision: {error}")
