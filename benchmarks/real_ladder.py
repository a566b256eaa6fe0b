"""The ladder on real weights:

Gemma 3 270M from bf16 to every recipe, with and without an importance matrix.

    python -m edge_gemma.benchmarks.real_ladder OUT [--tokens 20440] [--recipes q4_0,q4_0+imatrix,…]
    python -m edge_gemma.benchmarks.real_ladder OUT --rounds 0 --keep      # the quality alone: long, on any machine
    python -m edge_gemma.benchmarks.real_ladder OUT --speed-only           # then the speeds of the same bundles, on a calm one

In: nothing but the ``sample`` extra and the Python that runs it. Out: OUT/table.md, table.json,
ladder.png. The weights are the sample's, dequantized to a bf16 checkpoint; quality is measured on
CPython's ``pydoc_data.topics``, the importance matrix on docstrings of the standard library, so it
is never judged on text it has seen.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import warnings
from pathlib import Path

from edge_gemma.benchmarks.dev.real_checkpoint import sample_gguf, write_checkpoint
from edge_gemma.benchmarks.machine import describe_machine
from edge_gemma.convert.imatrix import calibrate
from edge_gemma.convert.ladder import Rung, run, table, time_kept
from edge_gemma.convert.pipeline import Conversion, convert

RECIPES = "q8_0,q6_k,q5_k_m,q4_k_m,q4_k_m+imatrix,q4_0,q4_0+imatrix,iq4_xs,iq4_xs+imatrix,q3_k_m,edge+imatrix,edge_fast+imatrix"
CALIBRATION_MODULES = (
    "json argparse collections.abc asyncio logging email http.client ipaddress statistics "
    "subprocess textwrap threading typing unittest unittest.mock urllib.request zipfile "
    "tarfile "
    "difflib functools itertools random shutil socket ssl string tempfile traceback csv "
    "datetime decimal fractions enum dataclasses contextlib concurrent.futures configparser "
    "heapq "
    "bisect calendar cmd code codecs copy getpass gettext glob gzip hashlib inspect locale "
    "mailbox mimetypes multiprocessing numbers operator optparse os pathlib pickle platform "
    "plistlib pprint queue re sched secrets selectors shelve shlex signal smtplib "
    "socketserver struct time timeit tokenize trace turtle uuid weakref xml.dom "
    "xml.etree.ElementTree"
).split()


def evaluation_text() -> str:
    """The Python reference's topics, about 110,000 tokens."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def calibration_text() -> str:
    """Docstrings of the standard library, about 80,000 tokens; none of them is in the topics."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in CALIBRATION_MODULES:
            module = importlib.import_module(name)
            members = [
                value
                for value in vars(module).values()
                if (inspect.isclass(value) or inspect.isfunction(value))
                and value.__module__ == name
            ]
            for text in (module.__doc__, *map(inspect.getdoc, members)):
                if text and len(text) > 200:
                    found[text] = True
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument(
        "--tokens", type=int, default=20_440, help="evaluate on so many (40 chunks of 511)"
    )
    parser.add_argument("--calibration-tokens", type=int, default=40_880)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="for calibrating and quality; llama.cpp's threads wait in a loop, so one is faster "
        "on a busy machine",
    )
    parser.add_argument("--keep", action="store_true", help="keep the bundles")
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep the table and bundles of an earlier run and add the recipes it lacks",
    )
    parser.add_argument(
        "--speed-only",
        action="store_true",
        help="time the bundles that were kept, and add that to the table",
    )
    arguments = parser.parse_args()
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    steps = lambda done, total: (
        say(f"  {done} of {total}") if done % 10 == 0 or done == total else None
    )  # noqa: E731
    if arguments.speed_only:
        rungs = time_kept(
            arguments.out / "ladder",
            rounds=arguments.rounds,
            n_threads=arguments.threads,
            keep=arguments.keep,
            steps=steps,
        )
    else:
        rungs = _quality(arguments, say, steps)
    _print(rungs)


def _quality(arguments, say, steps) -> list[Rung]:
    work = arguments.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "gemma-3-270m"
    if not (checkpoint / "tokenizer.model").exists():
        say("dequantize the sample")
        write_checkpoint(sample_gguf(), checkpoint)
    (work / "topics.txt").write_text(evaluation_text())
    (work / "docstrings.txt").write_text(calibration_text())
    matrix = work / "docstrings.imatrix.gguf"
    if not matrix.exists():
        say("calibrate")
        bundle = convert(
            checkpoint, work / "q8_0", Conversion(quant="q8_0", verify=False, overwrite=True)
        ).bundle  # activations hardly differ from bf16's, and it is faster
        calibrate(
            bundle,
            work / "docstrings.txt",
            matrix,
            max_tokens=arguments.calibration_tokens,
            n_threads=arguments.threads,
        )
    return run(
        checkpoint,
        arguments.out / "ladder",
        work / "topics.txt",
        arguments.recipes.split(","),
        imatrix=matrix,
        max_tokens=arguments.tokens,
        rounds=arguments.rounds,
        keep=arguments.keep,
        n_threads=arguments.threads,
        overwrite=not arguments.add,
        add=arguments.add,
        stage=say,
        steps=steps,
    )


def _print(rungs: list[Rung]) -> None:
    print(describe_machine()["text"])
    print(table(rungs))
    by_name = {rung.recipe: rung for rung in rungs}
    if stock := by_name.get("q4_k_m"):
        for rung in rungs:
            if rung.recipe.startswith("edge") and stock.decode_tok_s:
                memory = (rung.pss_bytes - stock.pss_bytes) / (1 << 20)
                print(
                    f"{rung.recipe}: {rung.decode_tok_s / stock.decode_tok_s:.2f}× decode, "
                    f"{rung.prefill_tok_s / stock.prefill_tok_s:.2f}× prefill, {memory:+.0f} "
                    f"MiB, KLD {rung.receipt.kld_mean:.4f}, against q4_k_m"
                )
    for name in ("q4_0", "iq4_xs", "q4_k_m"):
        if name in by_name and f"{name}+imatrix" in by_name:
            print(
                f"{name}: KLD {by_name[name].receipt.kld_mean:.4f} → "
                f"{by_name[f'{name}+imatrix'].receipt.kld_mean:.4f} with the importance "
                "matrix"
            )
    print(json.dumps([rung.record() for rung in rungs]))


if __name__ == "__main__":
    main()
