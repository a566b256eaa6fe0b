"""Conversion measured: one pass against the two-step route, in one run, on the same checkpoint.

    python -m edge_gemma.benchmarks.dev.conversion CHECKPOINT --recipes q4_0,q4_k_m [--work FOLDER] [--json FILE]
    python -m edge_gemma.benchmarks.dev.conversion CHECKPOINT --recipes "" --speed q4_0,edge,edge+tied     # what an output head of its own brings

In: a checkpoint folder (`synthetic_checkpoint` writes a full-size one). Out: per recipe the wall
time, peak PSS and bytes written of `edge-gemma convert`, and of the other way: an F16 GGUF first,
then ``llama_model_quantize`` on it. Both routes write the decoder only, use all cores, and start
with the checkpoint out of the page cache. The F16 GGUF is written by our own converter, so the
comparison leaves out what torch would add; with ``--script 'PYTHON convert_hf_to_gguf.py'``
llama.cpp's own script writes it (its source lies in llama-cpp-python's sdist; PYTHON needs torch
and transformers).

``--speed`` compares what recipes make through the runtime's loader; ``NAME+tied`` is recipe NAME
with its head left in the token embedding. The bundles for it are kept in ``--work`` with ``--keep``
and found there again, so that ``--rounds 0 --keep`` can convert on a busy machine first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from edge_gemma.benchmarks.machine import describe_machine
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.convert.quality import measure_speed
from edge_gemma.convert.recipe import read_recipe
from msgspec.structs import replace

from edge_gemma.bundles.folder import Bundle
from edge_gemma.machine.peak import PeakSampler
from edge_gemma.units import MiB, format_bytes


def speed(
    checkpoint: Path,
    recipes: list[str],
    work: Path,
    *,
    rounds: int = 3,
    n_tokens: int = 64,
    keep: bool = False,
) -> dict[str, dict]:
    """Medians of interleaved rounds: prefill and decode tok/s and PSS in use of each recipe's
    decoder, through the runtime's loader.
    """
    work.mkdir(parents=True, exist_ok=True)
    bundles = {name: _bundle(checkpoint, name, work / f"speed-{name}") for name in recipes}
    figures: dict[str, list[dict]] = {name: [] for name in recipes}
    for _ in range(rounds):
        for name, bundle in bundles.items():
            figures[name].append(measure_speed(bundle, n_prompt=128, n_tokens=n_tokens))
    keys = (
        ("prefill_tok_s", "decode_tok_s", "pss_bytes", "anon_bytes", "file_bytes") if rounds else ()
    )
    result = {
        name: {key: median(each[key] for each in figures[name]) for key in keys}
        | {"bundle_bytes": bundles[name].total_bytes()}
        for name in recipes
    }
    for bundle in bundles.values() if not keep else ():
        shutil.rmtree(bundle.folder)
    return result


def _bundle(checkpoint: Path, name: str, folder: Path) -> Bundle:
    """Converted to ``name``, or found there from an earlier run on the same checkpoint."""
    recipe = read_recipe(name.removesuffix("+tied"))
    if name.endswith("+tied"):
        recipe = replace(
            recipe, name=name, untied=False, lookup=None, ple=recipe.ple or recipe.lookup
        )
    if folder.is_dir():
        bundle = Bundle.open(folder)
        if (bundle.manifest.recipe["name"], bundle.manifest.name) == (
            recipe.name,
            checkpoint.resolve().name,
        ):
            return bundle
    return convert(
        checkpoint,
        folder,
        Conversion(quant=recipe, audio="none", vision="none", verify=False, overwrite=True),
    ).bundle


def run(
    checkpoint: Path, recipes: list[str], work: Path, *, two_step: bool = True, script: str = ""
) -> dict:
    """The figures of all routes; ``work`` is used for the outputs and emptied again."""
    work.mkdir(parents=True, exist_ok=True)
    outcome = {
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "cores": len(os.sched_getaffinity(0)),
        "one_pass": {},
        "two_step": {},
    }
    for name in recipes:
        out = work / f"one-{name}"
        figures = _measure(_convert(checkpoint, out, name), checkpoint)
        figures["bundle_bytes"] = (
            Bundle.open(out).total_bytes() + (out / "manifest.json").stat().st_size
        )
        figures["written_ratio"] = figures["written_bytes"] / figures["bundle_bytes"]
        outcome["one_pass"][name] = figures
        shutil.rmtree(out)
    if two_step:
        f16 = work / "two-f16"
        if script:
            f16.mkdir(exist_ok=True)
            first = _measure(
                [
                    *shlex.split(script),
                    str(checkpoint),
                    "--outfile",
                    str(f16 / "decoder.gguf"),
                    "--outtype",
                    "f16",
                ],
                checkpoint,
            )
        else:
            first = _measure(_convert(checkpoint, f16, "f16"), checkpoint)
        outcome["f16_by"] = script or "edge-gemma convert"
        for name in recipes:
            target = work / f"two-{name}.gguf"
            second = _measure(
                [
                    sys.executable,
                    "-m",
                    "edge_gemma.benchmarks.dev.conversion",
                    "--quantize",
                    str(f16 / "decoder.gguf"),
                    str(target),
                    str(read_recipe(name).file_type),
                ],
                checkpoint,
            )
            outcome["two_step"][name] = {
                "f16_seconds": first["seconds"],
                "quantize_seconds": second["seconds"],
                "seconds": first["seconds"] + second["seconds"],
                "peak_pss_bytes": max(first["peak_pss_bytes"], second["peak_pss_bytes"]),
                "written_bytes": first["written_bytes"] + second["written_bytes"],
            }
            outcome["one_pass"][name]["of_two_step"] = (
                outcome["one_pass"][name]["seconds"] / outcome["two_step"][name]["seconds"]
            )
            target.unlink()
        shutil.rmtree(f16)
    return outcome


def _convert(checkpoint: Path, out: Path, recipe: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from edge_gemma.cli import main; main()",
        "convert",
        str(checkpoint),
        str(out),
        "--quant",
        recipe,
        "--audio-encoder",
        "none",
        "--vision-encoder",
        "none",
        "--no-verify",
        "--json",
    ]


def _measure(command: list[str], checkpoint: Path) -> dict:
    _forget(checkpoint)
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    written = 0
    with PeakSampler(child.pid) as sampler:
        while child.poll() is None:
            written = max(written, _written(child.pid))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {child.returncode}")
    return {
        "seconds": seconds,
        "peak_pss_bytes": sampler.peak_pss_bytes,
        "peak_rss_bytes": sampler.peak_rss_bytes,
        "written_bytes": written,
    }


def _written(pid: int) -> int:
    """Bytes the process asked to write so far (/proc/PID/io, wchar: pages that are still in the
    cache count).
    """
    try:
        fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return int(fields["wchar"])
    except (OSError, ValueError, KeyError):
        return 0


def _forget(checkpoint: Path) -> None:
    """Ask the kernel to drop the checkpoint from its page cache: both routes read it from the disk."""
    os.sync()
    for path in checkpoint.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _quantize(source: str, target: str, file_type: str) -> None:
    from edge_gemma.engines.llama import library as llama

    low = llama.library()
    params = low.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(file_type), len(os.sched_getaffinity(0))
    if low.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit("llama_model_quantize failed")


def table(outcome: dict) -> str:
    lines = [
        "| recipe | one pass | peak PSS | written / bundle | two steps (F16 + quantize) | "
        "peak PSS | written | time of two-step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in outcome["one_pass"].items():
        two = outcome["two_step"].get(name)
        cells = [
            name,
            f"{one['seconds']:.0f} s",
            f"{one['peak_pss_bytes'] / MiB:.0f} MiB",
            f"{one['written_ratio']:.4f} of {format_bytes(one['bundle_bytes'])}",
        ]
        if two:
            cells += [
                f"{two['f16_seconds']:.0f} + {two['quantize_seconds']:.0f} s",
                f"{two['peak_pss_bytes'] / MiB:.0f} MiB",
                format_bytes(two["written_bytes"]),
                f"{one['of_two_step']:.2f}×",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table(speeds: dict[str, dict]) -> str:
    lines = [
        "| recipe | bundle | decode tok/s | prefill tok/s | PSS in use (anonymous) |",
        "|---|---|---|---|---|",
    ]
    for name, f in speeds.items():
        memory = f"{f['pss_bytes'] / MiB:.0f} MiB ({f['anon_bytes'] / MiB:.0f})"
        lines.append(
            f"| {name} | {format_bytes(f['bundle_bytes'])} | {f['decode_tok_s']:.1f} | "
            f"{f['prefill_tok_s']:.0f} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--quantize"]:
        return _quantize(*sys.argv[2:5])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipes", default="q4_0,q4_k_m")
    parser.add_argument("--work", type=Path, default=Path("/tmp/edge-gemma-conversion"))
    parser.add_argument(
        "--script",
        default="",
        help="how llama.cpp's own script is run, like 'python llama.cpp/convert_hf_to_gguf.py': "
        "it writes the F16 GGUF then",
    )
    parser.add_argument("--one-pass-only", action="store_true")
    parser.add_argument(
        "--speed",
        default="",
        help="recipes whose speed and memory to compare as well, like q4_0,edge,edge+tied",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the speed comparison; 0 converts only"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the bundles of the speed comparison in --work"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(describe_machine()["text"])
    recipes = [name for name in arguments.recipes.split(",") if name]
    outcome = {}
    if recipes:
        outcome = run(
            arguments.checkpoint,
            recipes,
            arguments.work,
            two_step=not arguments.one_pass_only,
            script=arguments.script,
        )
        print(table(outcome))
    if arguments.speed:
        outcome["speed"] = speed(
            arguments.checkpoint,
            arguments.speed.split(","),
            arguments.work,
            rounds=arguments.rounds,
            keep=arguments.keep,
        )
        if arguments.rounds:
            print(speed_table(outcome["speed"]))
    line = json.dumps(outcome)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
