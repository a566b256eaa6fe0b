"""A conversation that goes on and on, with cuts of microphone and loudspeaker.
Nothing may grow, stay or get lost. ``edge-gemma bench loop`` does it for hours.

``EDGE_GEMMA_LOOP_MINUTES`` of sound for the slow one, 20 unless it is set.
"""

import os
import shutil

import librivox
import numpy as np
import pytest

from edge_gemma.benchmarks import talk_loop
from edge_gemma.errors import UsageError
from edge_gemma.hearing.sound import read_audio

MINUTES = float(os.environ.get("EDGE_GEMMA_LOOP_MINUTES", "20"))
MiB = 1 << 20


def tone(text):
    """A voice for where there is no espeak-ng."""
    at = np.arange(400 * len(text)) / 16000
    return (0.1 * np.sin(2 * np.pi * 220 * at)).astype(np.float32), 16000


def sound_loop(loop):
    """What holds for a loop of any length."""
    kinds = loop.kinds
    assert not loop.failures or all("loudspeaker" in text for text in loop.failures)
    assert kinds["lost"] == kinds["back"] == loop.cuts
    assert kinds["speech"] == kinds["silence"]  # every utterance that began was ended
    answered = kinds["turn"] + kinds["interrupted"] + kinds["failed"]
    assert answered >= kinds["silence"] > 0
    assert not loop.threads_left
    settled = loop.settled()
    assert {each.files for each in settled[:1]} == {each.files for each in settled[-1:]}


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
@pytest.mark.compat(
    kind="talk", what="A conversation for hours", happens="no memory, thread or file is kept"
)
def test_a_short_loop_keeps_nothing(hearing_model):
    clips = talk_loop.recordings(None)[:6]
    loop = talk_loop.talk_loop(hearing_model, clips, minutes=1.5, synthesize=tone, look_every=0.25)
    sound_loop(loop)
    assert len(loop.looks) >= 4 and loop.spoken_s > 10
    # a word's first sound may be softer than what detection wants; no word is
    alone = [lost.seconds for lost in loop.lost if lost.why == "alone"]
    assert max(alone, default=0) < 0.3, loop.lost
    row = talk_loop.row(loop)
    assert row["threads_left"] == row["files_more"] == 0


def test_a_loop_that_is_stopped_tells_what_was(hearing_model):
    def stop(text):
        if "2 turns" in text:
            raise KeyboardInterrupt

    clips = [talk_loop.said("What time is it?")]
    loop = talk_loop.talk_loop(
        hearing_model, clips, minutes=5, synthesize=tone, look_every=0.05, progress=stop
    )
    assert loop.stopped and loop.kinds["turn"] == 2 and not loop.threads_left
    assert talk_loop.row(loop)["minutes"] < 1


def test_growth_is_told_from_a_warm_up():
    def looks(*mib):
        from edge_gemma.machine.footprint import Footprint

        return [
            talk_loop.Look(minute, Footprint(0, 0, n * MiB, 0), 1, 1)
            for minute, n in enumerate(mib)
        ]

    warm = talk_loop.Loop(12, looks=looks(50, 80, 99, 100, 100, 100, 100, 100, 100, 100, 100, 100))
    assert warm.growth_bytes() == 0 and abs(warm.bytes_per_hour()) < 1
    grows = talk_loop.Loop(12, looks=looks(*range(100, 112)))
    assert grows.growth_bytes() == 6 * MiB
    assert grows.bytes_per_hour() == pytest.approx(60 * MiB)
    assert talk_loop.Loop(1, looks=looks(1, 2)).growth_bytes() == 0


def test_recordings_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="no recordings"):
        talk_loop.recordings(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_conversation_for_as_long_as_is_wanted(hearing_model):
    try:
        clips = [read_audio(clip.path) for clip in librivox.clips()]
    except Exception as error:
        pytest.skip(f"no LibriVox speech here ({error})")
    loop = talk_loop.talk_loop(hearing_model, clips, minutes=MINUTES)
    sound_loop(loop)
    print(talk_loop.row(loop))
    assert loop.growth_bytes() < 4 * MiB
