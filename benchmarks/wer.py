"""Word error rate of a bundle on a folder of recordings with transcripts.

In: a bundle that hears, and a folder of sound files. A transcript is ``NAME.txt`` beside
``NAME.wav``, or a line ``NAME text`` in a ``*.trans.txt`` (LibriSpeech), or ``text (NAME)`` in a
file called ``transcription``. Out: a line for each file, totals. The alignment is jiwer's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.benchmarks.sections import Progress, silent
from edge_gemma.errors import EdgeGemmaError, MissingExtra, UsageError

SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


def words(text: str) -> list[str]:
    """Lower case, no punctuation but apostrophes inside words.

    >>> words("Don't stop – he said: 3,5!")
    ["don't", 'stop', 'he', 'said', '3', '5']
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text)


def errors(reference: list[str], heard: list[str]) -> int:
    """Fewest substitutions, insertions and deletions that turn one into the other. Raises
    MissingExtra.

    >>> errors("the cat sat".split(), "a cat sat down".split())
    2
    """
    try:
        import jiwer
    except ImportError:
        raise MissingExtra("Word error rates", "bench") from None
    if not reference or not heard:  # jiwer refuses an empty reference
        return len(reference) + len(heard)
    found = jiwer.process_words(" ".join(reference), " ".join(heard))
    return int(found.substitutions + found.insertions + found.deletions)


def dataset(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, transcript) of every sound file that has one. Raises UsageError when there is none."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; expected one with sound files and transcripts")
    known = _transcripts(folder)
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


def _transcripts(folder: Path) -> dict[str, str]:
    """Texts by file name, out of LibriSpeech's and the transcription files."""
    known: dict[str, str] = {}
    for path in folder.rglob("*.trans.txt"):
        for line in path.read_text().splitlines():
            name, _, text = line.partition(" ")
            known[name] = text
    for path in folder.rglob("transcription"):
        for line in path.read_text().splitlines():
            text, _, name = line.rpartition("(")
            known[name.rstrip(") ")] = re.sub(r"</?s>", "", text)
    return known


def measure(
    hear: Callable[[Iterable[np.ndarray]], str],
    pairs: Iterable[tuple[Path, str]],
    progress: Progress = silent,
) -> dict[str, Any]:
    """``hear(blocks) -> text`` over the pairs → totals. A file that cannot be read is counted, not
    skipped silently.
    """
    from edge_gemma.conversation.transcription import blocks_of

    n_words = n_errors = n_files = n_failed = 0
    for path, text in pairs:
        reference = words(text)
        n_files += 1
        try:
            heard = words(hear(blocks_of(path)))
        except MissingExtra:
            raise
        except EdgeGemmaError as error:
            n_failed += 1
            heard = []
            progress(f"{path.name}: {error}")
        wrong = errors(reference, heard)
        n_words += len(reference)
        n_errors += wrong
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
    progress: Progress = silent,
) -> dict[str, Any]:
    """Load the bundle and measure it, greedily."""
    from edge_gemma import load
    from edge_gemma.conversation.transcription import (
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

        def hear(blocks: Iterable[np.ndarray]) -> str:
            segments = transcribe(chat, blocks, instruction, options)
            return " ".join(segment.text for segment in segments)

        return measure(hear, pairs, progress) | {"bundle": bundle}
