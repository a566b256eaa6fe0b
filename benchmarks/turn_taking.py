"""How soon an end of speech is found, and how often somebody who only pauses is cut off.

In: sentences with a place where a speaker might pause, espeak-ng's voices, pauses of known length;
perhaps a text model. Out: a section with a row per rule. What was said until a pause is taken from
the sentence, as a recogniser without mistakes would have it. The detector runs once over each
sound; the rules then decide on its probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from edge_gemma.benchmarks.room import BLOCK, RATE_HZ, said
from edge_gemma.benchmarks.sections import Progress, Section, silent
from edge_gemma.hearing.pauses import PauseRule
from edge_gemma.hearing.utterances import SpeechDetector, SpeechProbability, VadSettings, silero

# where the bar stands somebody might think; half of the beginnings could be a whole request
SENTENCES = (
    "Set a timer for|ten minutes",
    "Remind me tomorrow|to call the dentist",
    "What is the capital of|Australia",
    "I would like to know|how long it takes to boil an egg",
    "Turn on the light|in the kitchen",
    "Please add milk and|six eggs to my shopping list",
    "How do I get from the station|to the museum",
    "Tell me a story about|a fox and a lighthouse",
    "When does the next train|leave for Lisbon",
    "What was the name of|the man who painted this",
    "Play something quiet|for the evening",
    "Is it going to rain|this afternoon",
    "Can you explain to me why|the sky is blue",
    "Wake me up at|half past six",
    "My sister is allergic to nuts, so|which cake can I bake",
    "Translate good morning|into Portuguese",
    "I forgot whether|I locked the door",
    "If it is cold tomorrow,|remind me to take a coat",
    "The recipe says to use|two hundred grams of flour",
    "Write a short letter to|my landlord about the heating",
)
VOICES = ("en", "en+f3", "en-us+m7")
PAUSES_S = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
NOISE_DBFS = -60.0
TurnOver = Callable[[str], float]


@dataclass(frozen=True)
class Spoken:
    """A sentence with one pause, as the detector heard it."""

    first: str
    whole: str
    pause_s: float
    n_words_behind: int
    probabilities: list[float]  # of speech, per block
    begin_behind: int  # samples: where the words behind the pause begin
    end: int  # samples: where the last word ends


def spoken(
    sentences: Sequence[str], voices: Sequence[str], pauses_s: Sequence[float], progress: Progress
) -> list[Spoken]:
    """Raises UsageError (no espeak-ng), MissingExtra."""
    found = []
    for number, sentence in enumerate(sentences):
        progress(f"sentence {number + 1} of {len(sentences)}")
        first, behind = sentence.split("|")
        for voice in voices:
            parts = said(first.rstrip(",") + ",", voice), said(behind + ".", voice)
            for pause_s in pauses_s:
                found.append(_heard(first, behind, parts, pause_s, number))
    return found


def _heard(
    first: str, behind: str, parts: tuple[np.ndarray, np.ndarray], pause_s: float, seed: int
) -> Spoken:
    silence = np.zeros(RATE_HZ // 2, np.float32)
    pause = np.zeros(int(pause_s * RATE_HZ), np.float32)
    after = np.zeros(2 * RATE_HZ, np.float32)
    sound = np.concatenate([silence, parts[0], pause, parts[1], after])
    noise = np.random.default_rng(seed).standard_normal(len(sound)) * 10 ** (NOISE_DBFS / 20)
    sound = (sound + noise).astype(np.float32)
    probability = silero()
    begin = len(silence) + len(parts[0]) + len(pause)
    return Spoken(
        first,
        f"{first} {behind}",
        pause_s,
        len(behind.split()),
        [probability(sound[at : at + BLOCK]) for at in range(0, len(sound) - BLOCK + 1, BLOCK)],
        begin,
        begin + len(parts[1]),
    )


def _read(one: Spoken) -> SpeechProbability:
    left = iter(one.probabilities)
    return lambda block: next(left)


def _fresh(one: Spoken, settings: VadSettings) -> SpeechDetector:
    return SpeechDetector(settings, _read(one))


def in_a_row(sounds: Sequence[Spoken], settings: VadSettings) -> list[Ended]:
    """One speaker's sentences, one after the other: what the rule learns of the first ones counts
    for the others.
    """
    speaker = SpeechDetector(settings, lambda block: 0.0)
    found = []
    for one in sounds:
        speaker = speaker.restarted(_read(one))
        found.append(ended(one, speaker))
    return found


@dataclass(frozen=True)
class Ended:
    """``cut``: the utterance ended in the pause; ``wait_s`` from the last word to its end."""

    cut: bool
    wait_s: float


def ended(one: Spoken, detector: SpeechDetector, turn_over: TurnOver | None = None) -> Ended:
    """What a ``detector`` that reads the sound's probabilities makes of it."""
    block, ends = np.zeros(BLOCK, np.float32), []
    for number in range(len(one.probabilities)):
        ends += [number for event in detector.push(block) if event.kind == "end"]
        if turn_over is not None and detector.pausing and detector.over is None:
            text = one.first if number * BLOCK < one.begin_behind else one.whole
            detector.over = turn_over(text)
    last = (ends[-1] + 1) * BLOCK if ends else len(one.probabilities) * BLOCK
    cut = any((number + 1) * BLOCK < one.begin_behind + BLOCK for number in ends)
    return Ended(cut, (last - one.end) / RATE_HZ)


def turn_taking(
    *,
    turn_over: TurnOver | None = None,
    sentences: Sequence[str] = SENTENCES,
    voices: Sequence[str] = VOICES,
    pauses_s: Sequence[float] = PAUSES_S,
    progress: Progress = silent,
) -> list[Section]:
    """Fixed pauses, the rule without text, and with ``turn_over(text) -> probability`` the rule
    with it, on sentences by themselves; and speakers who always pause as long, from whom the rule
    learns. Raises UsageError (no espeak-ng), MissingExtra.
    """
    section = Section("talk pauses")
    sounds = spoken(sentences, voices, pauses_s, progress)
    rules: list[tuple[str, VadSettings, TurnOver | None]] = [
        (f"fixed {end_s:g} s", VadSettings(end_s=end_s), None) for end_s in (0.32, 0.6, 0.9, 1.2)
    ]
    adaptive = VadSettings(rule=PauseRule())
    rules.append(("adaptive, no text", adaptive, None))
    if turn_over is not None:
        known = {text: turn_over(text) for one in sounds for text in (one.first, one.whole)}
        rules.append(("adaptive, by what was said", adaptive, known.__getitem__))
    for name, settings, over in rules:
        found = [ended(one, _fresh(one, settings), over) for one in sounds]
        waits = sorted(each.wait_s for each in found)
        row = {
            "rule": name,
            "spoken": len(found),
            "wait_s": median(waits),
            "wait_most_s": waits[-1],
        }
        for pause_s in pauses_s:
            cut = [e.cut for e, one in zip(found, sounds, strict=True) if one.pause_s == pause_s]
            row[f"cut_{pause_s:g}"] = sum(cut) / len(cut)
        words = sum(one.n_words_behind for one in sounds)
        lost = sum(one.n_words_behind for e, one in zip(found, sounds, strict=True) if e.cut)
        section.rows.append({**row, "words_cut": lost / words})
    section.note(
        f"{len(sentences)} sentences, {len(voices)} espeak-ng voices, one pause of known length in "
        f"each, noise at {NOISE_DBFS:.0f} dBFS; what was said is taken from the text"
    )
    return [section, _speakers(sounds, pauses_s)]


def _speakers(sounds: Sequence[Spoken], pauses_s: Sequence[float]) -> Section:
    section = Section("talk speakers")
    for pause_s in pauses_s:
        row: dict[str, object] = {"pause_s": pause_s}
        for name, settings in (
            ("fixed", VadSettings()),
            ("learned", VadSettings(rule=PauseRule())),
        ):
            said_so = [one for one in sounds if one.pause_s == pause_s]
            found = in_a_row(said_so, settings)
            lost = [one.n_words_behind for one, e in zip(said_so, found, strict=True) if e.cut]
            row["spoken"] = len(found)
            row[f"{name}_wait_s"] = median(each.wait_s for each in found)
            row[f"{name}_words_cut"] = sum(lost) / sum(one.n_words_behind for one in said_so)
        section.rows.append(row)
    section.note("fixed: 0.6 s. The first sentences, which the rule learns from, are counted, too")
    return section
