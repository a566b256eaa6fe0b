"""Speech detection: settings, cuts at pauses, and speech itself."""

import json
import shutil

import librivox
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_gemma.conversation.voice import espeak
from edge_gemma.errors import UsageError
from edge_gemma.hearing.samples import BLOCK_SAMPLES, RATE_HZ
from edge_gemma.hearing.sound import Resampler, read_audio
from edge_gemma.hearing.utterances import SpeechDetector, VadSettings


def loud(chunk):
    """Stands for silero: the sound itself says whether it is speech."""
    return float(np.abs(chunk).max())


def detect(samples, packet=1600, **changes):
    detector = SpeechDetector(VadSettings(**changes), probability=loud)
    events = [
        e for k in range(0, len(samples), packet) for e in detector.push(samples[k : k + packet])
    ]
    return events + detector.finish()


def script(*parts):
    """(seconds, loudness) … → samples, each different so that order can be checked."""
    x = np.concatenate([np.full(int(s * RATE_HZ), v, np.float32) for s, v in parts])
    return x + np.linspace(0, 1e-3, len(x), dtype=np.float32)


def test_pre_and_post_roll_surround_the_speech():
    x = script((2, 0), (1, 0.9), (2, 0))
    start, end = [e for e in detect(x) if e.kind in ("start", "end")]
    assert (
        abs(start.at - 2 * RATE_HZ) <= BLOCK_SAMPLES and abs(end.at - 3 * RATE_HZ) <= BLOCK_SAMPLES
    )
    clip = np.concatenate([e.samples for e in detect(x)])
    (first,) = np.flatnonzero(x == clip[0])
    assert abs(2 * RATE_HZ - first - 0.3 * RATE_HZ) <= 2 * BLOCK_SAMPLES
    assert abs(len(clip) - 1.5 * RATE_HZ) <= 3 * BLOCK_SAMPLES


def test_a_pause_shorter_than_the_hangover_is_part_of_the_utterance():
    x = script((1, 0), (1, 0.9), (0.5, 0), (1, 0.9), (2, 0))
    events = detect(x)
    assert [e.kind for e in events if e.kind != "more"] == ["start", "end"]
    clip = np.concatenate([e.samples for e in events])
    at = int(np.flatnonzero(x == clip[0])[0])
    assert np.array_equal(clip, x[at : at + len(clip)])  # nothing lost, nothing twice


def test_an_utterance_that_the_stream_s_end_cuts_off_ends_with_its_last_sample():
    x = script((1, 0), (1.01, 0.9))
    assert len(x) % BLOCK_SAMPLES
    events = detect(x)
    assert events[-1].kind == "end" and events[-1].at == len(x)
    assert np.concatenate([e.samples for e in events])[-1] == x[-1]


def test_a_click_is_no_speech():
    assert detect(script((1, 0), (0.03, 0.9), (1, 0))) == []  # at most two chunks


@settings(max_examples=40)
@given(
    parts=st.lists(
        st.tuples(st.floats(0.03, 6), st.sampled_from([0.0, 0.4, 0.9])), min_size=1, max_size=12
    ),
    packet=st.integers(100, 50_000),
)
@example(
    parts=[(1.46875, 0.9), (1.46875, 0.4), (1.0, 0.0)], packet=100
)  # the pause begins where looking for one begins
def test_every_sample_at_most_once_in_order_and_no_speech_lost(parts, packet):
    x = script(*parts)
    events = detect(x, packet, max_s=6.0)
    taken = np.concatenate([e.samples for e in events]) if events else np.zeros(0, np.float32)
    assert (np.diff(_positions(x, events)) > 0).all()
    assert all(n <= 6.0 * RATE_HZ for n in _piece_lengths(events))
    # what was clearly speech, from the first start on, is in some piece; where nothing started
    # there were only clicks
    first = events[0].at if events else 0
    assert (taken > 0.8).sum() >= (
        x[first : len(x) // BLOCK_SAMPLES * BLOCK_SAMPLES] > 0.8
    ).sum() - _clicks(x)


def _piece_lengths(events):
    """Samples of each piece: from a start, or from behind a cut, to the next cut or end."""
    lengths = [0]
    for event in events:
        lengths[-1] += len(event.samples)
        if event.kind in ("cut", "end"):
            lengths.append(0)
    return lengths


def _positions(x, events):
    """Where each event's samples lie in x: found by content, checked to be one run."""
    positions, search = [], 0
    for e in events:
        if not len(e.samples):
            continue
        hits = np.flatnonzero(x[search:] == e.samples[0])
        at = next(
            int(search + h)
            for h in hits
            if np.array_equal(x[search + h : search + h + len(e.samples)], e.samples)
        )
        positions += [at, at + len(e.samples) - 1] if len(e.samples) > 1 else [at]
        search = at + len(e.samples)
    return positions


def _clicks(x):
    """Samples in runs of speech too short to start an utterance, and the blocks at their edges."""
    voiced = x > 0.8
    edges = np.flatnonzero(np.diff(np.concatenate([[0], voiced, [0]])))
    return sum(min(b - a, 5 * BLOCK_SAMPLES) for a, b in zip(edges[::2], edges[1::2], strict=True))


def test_a_long_utterance_is_cut_in_a_pause():
    x = script((28, 0.9), (0.15, 0.0), (20, 0.9), (1, 0))
    events = [e for e in detect(x) if e.kind != "more"]
    assert [e.kind for e in events] == ["start", "cut", "end"]
    assert 28 * RATE_HZ <= events[1].at <= 28.15 * RATE_HZ


def test_silence_behind_a_cut_is_the_next_utterance_s_pre_roll():
    """Also without a post-roll: the cut lies within a pause, whose other blocks are held."""
    x = script((4, 0.9), (0.3, 0.0), (1, 0.9), (1, 0))
    detector = SpeechDetector(VadSettings(max_s=6.0, end_s=0.1, post_roll_s=0.0), loud)
    events = [e for e in detector.push(x) + detector.finish() if e.kind != "more"]
    assert [e.kind for e in events] == ["start", "cut", "end", "start", "end"]
    assert not len(events[2].samples)
    begin = int(np.flatnonzero(x == events[3].samples[0])[0])
    assert begin == events[1].at  # no block of the pause is lost between the two


def test_without_a_pause_the_softest_place_is_cut():
    x = script((28.5, 0.9), (0.2, 0.6), (20, 0.9), (1, 0))
    events = [e for e in detect(x) if e.kind != "more"]
    assert [e.kind for e in events] == ["start", "cut", "end"]
    assert 28.5 * RATE_HZ - BLOCK_SAMPLES <= events[1].at <= 28.7 * RATE_HZ + BLOCK_SAMPLES
    assert sum(len(e.samples) for e in detect(x)) >= 48.7 * RATE_HZ


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"threshold": 2}, r"threshold is 2; expected 0 … 1"),
        ({"end_s": -1}, r"end_s is -1; expected 0 … 5"),
        ({"max_s": 40}, r"max_s is 40; expected 5 … 30"),
        ({"threshold": 0.2}, "end_threshold 0.35 is above threshold 0.2"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(UsageError, match=message):
        VadSettings(**changes)


def test_silero_hears_nothing_in_noise_and_silence():
    rng = np.random.default_rng(3)
    for x in (np.zeros(32000, np.float32), 0.01 * rng.standard_normal(32000).astype(np.float32)):
        detector = SpeechDetector()
        assert detector.push(x) + detector.finish() == []


def synthesized(text, voice):
    """A sentence of espeak-ng at 16 kHz with noise of a quiet room around it, and where its sound
    begins and ends.
    """
    samples, rate_hz = espeak(voice)(text)
    spoken = Resampler(rate_hz).push(samples, last=True)
    audible = np.flatnonzero(np.abs(spoken) > 0.02)
    lead = RATE_HZ
    x = np.concatenate([np.zeros(lead), spoken, np.zeros(RATE_HZ)])
    x += 0.0005 * np.random.default_rng(1).standard_normal(len(x))
    return x.astype(np.float32), lead + int(audible[0]), lead + int(audible[-1])


@pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is not installed (make system)"
)
@pytest.mark.parametrize("voice", ["en", "en+f3", "de"])
@pytest.mark.parametrize(
    "text", ["The quick brown fox jumps over the lazy dog.", "Seven, eight, nine and ten."]
)
def test_the_whole_of_a_spoken_sentence_is_covered(voice, text):
    x, first, last = synthesized(text, voice)
    events = detected(x)
    start, end = (e for e in events if e.kind in ("start", "end"))
    assert abs(start.at - first) < 0.2 * RATE_HZ and abs(end.at - last) < 0.2 * RATE_HZ
    taken_from, taken_to = span(x, events)
    assert taken_from <= first and taken_to >= last


def detected(x):
    """What silero finds in packets of 50 ms."""
    detector = SpeechDetector()
    events = [e for k in range(0, len(x), 800) for e in detector.push(x[k : k + 800])]
    return events + detector.finish()


def span(x, events):
    """From where to where the events' samples lie in x."""
    taken = np.concatenate([e.samples for e in events])
    starts = np.flatnonzero(x == taken[0])
    (first,) = [k for k in starts if np.array_equal(x[k : k + len(taken)], taken)]
    return first, first + len(taken)


@pytest.mark.slow  # the clips are fetched from a package index the first time
def test_every_spoken_word_of_human_speech_is_covered():
    clips = librivox.clips()
    assert len(clips) == 5
    for clip in clips:
        x = read_audio(clip.path)
        events = detected(x)
        assert [e.kind for e in events if e.kind != "more"] == ["start", "end"]
        taken_from, taken_to = span(x, events)
        timings = json.loads(clip.path.with_suffix(".json").read_text())["w"]
        words = [word for word in timings if word["t"][0] not in "<[("]
        assert taken_from / RATE_HZ <= words[0]["b"] + 0.01
        assert taken_to / RATE_HZ >= words[-1]["b"] + words[-1]["d"] - 0.06


def _found(sound):
    detector, samples = SpeechDetector(), []
    events = []
    for at in range(0, len(sound), 512):
        events += detector.push(sound[at : at + 512].astype(np.float32))
    events += detector.finish()
    samples = [event.samples for event in events]
    return events, np.concatenate([np.zeros(0, np.float32), *samples])


def test_a_cough_and_music_are_no_utterance():
    rng = np.random.default_rng(0)
    burst = rng.standard_normal(4000) * np.exp(-np.arange(4000) / 800)  # a quarter of a second
    cough = np.concatenate([np.zeros(8000), 0.5 * burst / np.abs(burst).max(), np.zeros(16000)])
    t = np.arange(8 * 16000) / 16000
    strokes = np.exp(-3 * (2 * t % 1))  # two a second
    chord = sum(np.sin(2 * np.pi * hz * t) for hz in (261.6, 329.6, 392.0, 523.3))
    for sound in (cough, 0.1 * strokes * chord):
        events, _ = _found(sound)
        assert events == []


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_speech_in_the_first_sample_is_heard_from_there():
    from edge_gemma.benchmarks.room import said

    speech = said("Stop please")
    events, samples = _found(np.concatenate([speech, np.zeros(16000, np.float32)]))
    assert (events[0].kind, events[0].at) == ("start", 0)
    assert np.array_equal(samples[: len(speech)], speech)
