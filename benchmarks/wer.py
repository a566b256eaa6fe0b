"""Word error rate of a bundle on a folder of recordings with transcripts.

    python -m edge_gemma.benchmarks.wer BUNDLE DATASET [--language English] [--limit N]

In: a bundle that hears, and a folder of sound files. A transcript is ``NAME.txt`` beside
``NAME.wav``, or a line ``NAME text`` in a ``*.trans.txt`` (LibriSpeech), or ``text (NAME)`` in a
file called ``transcription``. Out: one line per file on stderr, a summary as JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from edge_gemma.errors import EdgeGemmaError, UsageError

SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


def words(text: str) -> list[str]:
    """Lower case, no punctuation but apostrophes inside words.

    >>> words("Don't stop – he said: 3,5!")
    ["don't", 'stop', 'he', 'said', '3', '5']
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text)


def errors(reference: list[str], heard: list[str]) -> int:
    """Fewest substitutions, insertions and deletions that turn one into the other.

    >>> errors("the cat sat".split(), "a cat sat down".split())
    2
    """
    row = list(range(len(heard) + 1))
    for i, word in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def dataset(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, transcript) of every sound file that has one. Raises UsageError when there is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; expected one with sound files and transcripts")
    known: dict[str, str] = {}
    for path in folder.rglob("*.trans.txt"):
        known |= {
            name: text
            for name, _, text in (line.partition(" ") for line in path.read_text().splitlines())
        }
    for path in folder.rglob("transcription"):
        for line in path.read_text().splitlines():
            text, _, name = line.rpartition("(")
            known[name.rstrip(") ")] = re.sub(r"</?s>", "", text)
    found = False
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SOUNDS):
        beside = path.with_suffix(".txt")
        text = beside.read_text() if beside.is_file() else known.get(path.stem)
        if text is not None:
            found = True
            yield path, text
    if not found:
        raise UsageError(
            f"{folder} holds no sound file with a transcript: NAME.txt beside it, a "
            "*.trans.txt, or a file called transcription"
        )


def measure(
    hear: Callable[[Iterable[np.ndarray]], str],
    pairs: Iterable[tuple[Path, str]],
    progress=lambda line: None,
) -> dict:
    """``hear(blocks) -> text`` over the pairs → totals. A file that cannot be read is counted, not
    skipped silently.
    """
    from edge_gemma.conversation.listener import file_blocks

    n_words = n_errors = n_files = n_failed = 0
    for path, text in pairs:
        reference = words(text)
        n_files += 1
        try:
            heard = words(hear(file_blocks(path)))
        except EdgeGemmaError as error:
            n_failed += 1
            heard = []
            progress(f"{path.name}: {error}")
        wrong = errors(reference, heard)
        n_words, n_errors = n_words + len(reference), n_errors + wrong
        progress(f"{path.name}: {wrong} of {len(reference)} words wrong: {' '.join(heard)}")
    return {
        "wer": round(n_errors / n_words, 4) if n_words else None,
        "words": n_words,
        "errors": n_errors,
        "files": n_files,
        "failed": n_failed,
    }


def run(
    bundle: str,
    folder: Path,
    *,
    language: str | None = None,
    limit: int | None = None,
    pad_audio: bool = True,
    progress=lambda line: None,
) -> dict:
    """Load the bundle and measure it, greedily."""
    from itertools import islice

    from edge_gemma import load
    from edge_gemma.conversation.listener import (
        TRANSCRIBE,
        TRANSCRIBE_ANY,
        ListenOptions,
        transcribe,
    )
    from edge_gemma.options import Sampling

    pairs = list(islice(dataset(folder), limit))
    instruction = TRANSCRIBE.format(language=language) if language else TRANSCRIBE_ANY
    options = ListenOptions(pad_audio=pad_audio, sampling=Sampling(temperature=0, max_tokens=448))
    with load(bundle) as model, model.chat(pad_audio=pad_audio) as chat:
        return measure(
            lambda blocks: " ".join(s.text for s in transcribe(chat, blocks, instruction, options)),
            pairs,
            progress,
        ) | {"bundle": bundle}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--language")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--short", action="store_true", help="no padding rows")
    options = parser.parse_args()
    try:
        result = run(
            options.bundle,
            options.dataset,
            language=options.language,
            limit=options.limit,
            pad_audio=not options.short,
            progress=lambda line: print(line, file=sys.stderr),
        )
    except EdgeGemmaError as error:
        print(f"wer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
