"""Conversion measured: one pass against the two-step route, in one run, on the same checkpoint.

    python -m edge_gemma.benchmarks.dev.conversion CHECKPOINT [--recipes q4_0,q4_k_m]
                                          [--script 'PYTHON convert_hf_to_gguf.py']
                                          [--work FOLDER] [--json FILE]

In: a checkpoint folder (`dev.models e2b` writes a full-size one). Out: per recipe the wall time,
peak PSS and bytes written of `edge-gemma convert`, and of the other way: an F16 GGUF first, then
``llama_model_quantize`` on it. Both routes write the decoder only, use all cores, and start with
the checkpoint out of the page cache. The F16 GGUF is written by our own converter, so the
comparison leaves out what torch would add; with ``--script`` llama.cpp's own script writes it (its
source lies in llama-cpp-python's sdist; PYTHON needs torch and transformers).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_gemma.benchmarks import caps
from edge_gemma.benchmarks.machine import describe_machine
from edge_gemma.benchmarks.sections import markdown_table
from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.recipe import read_recipe
from edge_gemma.errors import RuntimeFailure
from edge_gemma.machine.peak import PeakSampler
from edge_gemma.units import MiB, format_bytes

MODULE = "edge_gemma.benchmarks.dev.conversion"
WRITTEN = "wchar: "  # the line of /proc/self/io that says how much a process wrote
CONVERT = """
from edge_gemma.cli import main
try:
    main()
finally:
    print(open("/proc/self/io").read())
"""


@dataclass(frozen=True)
class Cost:
    """What one command took."""

    seconds: float
    peak_pss_bytes: int
    peak_rss_bytes: int
    written_bytes: int

    def then(self, second: Cost) -> Cost:
        return Cost(
            self.seconds + second.seconds,
            max(self.peak_pss_bytes, second.peak_pss_bytes),
            max(self.peak_rss_bytes, second.peak_rss_bytes),
            self.written_bytes + second.written_bytes,
        )


def cost(command: Sequence[str], checkpoint: Path, out: Path) -> Cost:
    """Run a command to its end, the checkpoint out of the page cache. What it wrote is what it says
    itself, else the size of ``out``. Raises RuntimeFailure.
    """
    samplers: list[PeakSampler] = []
    said: list[int] = []

    def on_start(pid: int) -> None:
        samplers.append(PeakSampler(pid))
        samplers[0].__enter__()

    def on_line(line: str) -> None:
        if line.startswith(WRITTEN):
            said.append(int(line.removeprefix(WRITTEN)))

    weights = list(checkpoint.glob("*.safetensors"))
    try:
        outcome = caps.run(command, cold_files=weights, on_start=on_start, on_line=on_line)
    finally:
        for sampler in samplers:
            sampler.__exit__()
    if not outcome.ok:
        raise RuntimeFailure(f"{shlex.join(command)}: {outcome.describe()}")
    (sampler,) = samplers
    return Cost(
        outcome.seconds,
        sampler.peak_pss_bytes,
        sampler.peak_rss_bytes,
        said[0] if said else out.stat().st_size,
    )


def run(checkpoint: Path, recipes: Sequence[str], work: Path, script: str = "") -> dict[str, Any]:
    """The figures of both routes; ``work`` is used for the outputs and emptied again."""
    work.mkdir(parents=True, exist_ok=True)
    outcome: dict[str, Any] = {
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "f16_by": script or "edge-gemma convert",
        "recipes": {},
    }
    f16 = work / "f16"
    f16_gguf = f16 / "decoder.gguf"
    if script:
        f16.mkdir(exist_ok=True)
        argv = [*shlex.split(script), str(checkpoint), "--outfile", str(f16_gguf)]
        first = cost([*argv, "--outtype", "f16"], checkpoint, f16_gguf)
    else:
        first = cost(_convert(checkpoint, f16, "f16"), checkpoint, f16)
    for name in recipes:
        out = work / f"one-{name}"
        one = cost(_convert(checkpoint, out, name), checkpoint, out)
        bundle_bytes = Bundle.open(out).total_bytes() + (out / "manifest.json").stat().st_size
        shutil.rmtree(out)
        target = work / f"two-{name}.gguf"
        file_type = str(read_recipe(name).file_type)
        argv = [sys.executable, "-m", MODULE, "--quantize", str(f16_gguf), str(target), file_type]
        second = cost(argv, checkpoint, target)
        target.unlink()
        outcome["recipes"][name] = {
            "one_pass": asdict(one),
            "bundle_bytes": bundle_bytes,
            "f16_seconds": first.seconds,
            "quantize_seconds": second.seconds,
            "two_step": asdict(first.then(second)),
        }
    shutil.rmtree(f16)
    return outcome


def _convert(checkpoint: Path, out: Path, recipe: str) -> list[str]:
    command = [sys.executable, "-c", CONVERT, "convert", str(checkpoint), str(out)]
    towers = ["--audio-encoder", "none", "--vision-encoder", "none"]
    return [*command, "--quant", recipe, *towers, "--no-verify", "--json"]


def quantize(source: str, target: str, file_type: str) -> None:
    from edge_gemma.engines.llama.library import library

    low = library()
    params = low.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(file_type), len(os.sched_getaffinity(0))
    if low.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit("llama_model_quantize failed")


def table(outcome: dict[str, Any]) -> str:
    rows = [
        [
            "recipe",
            "one pass",
            "peak PSS",
            "written / bundle",
            "two steps (F16 + quantize)",
            "peak PSS",
            "written",
            "time of two-step",
        ]
    ]
    for name, found in outcome["recipes"].items():
        one, two = Cost(**found["one_pass"]), Cost(**found["two_step"])
        share = one.written_bytes / found["bundle_bytes"]
        rows.append(
            [
                name,
                f"{one.seconds:.0f} s",
                f"{one.peak_pss_bytes / MiB:.0f} MiB",
                f"{share:.4f} of {format_bytes(found['bundle_bytes'])}",
                f"{found['f16_seconds']:.0f} + {found['quantize_seconds']:.0f} s",
                f"{two.peak_pss_bytes / MiB:.0f} MiB",
                format_bytes(two.written_bytes),
                f"{one.seconds / two.seconds:.2f}×",
            ]
        )
    return markdown_table(rows)


def main() -> None:
    if sys.argv[1:2] == ["--quantize"]:
        return quantize(*sys.argv[2:5])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipes", default="q4_0,q4_k_m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/edge-gemma-conversion"))
    parser.add_argument("--script", default="", help="how llama.cpp's own script is run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipes = [name for name in options.recipes.split(",") if name]
    outcome = run(options.checkpoint, recipes, options.work, options.script)
    print(f"{describe_machine()['text']}\n\n{table(outcome)}")
    if options.json:
        options.json.write_text(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main()
