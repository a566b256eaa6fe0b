"""A conversation that goes on and on: human speech, a microphone that is cut at random, answers
spoken into a room. Nothing may grow.

``EDGE_GEMMA_LOOP_MINUTES`` of sound, 10 unless it is set; it runs as fast as it can.
"""

import gc
import os
import threading

import librivox
import numpy as np
import pytest
from test_listen import GREEDY, blocks, live

from edge_gemma.conversation.listener import Listener
from edge_gemma.conversation.transcription import ListenOptions
from edge_gemma.conversation.voice import Voice
from edge_gemma.errors import DeviceLost
from edge_gemma.hearing.echo import EchoCanceller, noise_filter
from edge_gemma.hearing.sound import read_audio
from edge_gemma.machine.footprint import footprint

MINUTES = float(os.environ.get("EDGE_GEMMA_LOOP_MINUTES", "10"))


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_conversation_for_as_long_as_is_wanted(hearing_model, monkeypatch):
    try:
        clips = [read_audio(clip.path) for clip in librivox.clips()]
    except Exception as error:
        pytest.skip(f"no LibriVox speech here ({error})")
    rng = np.random.default_rng(14)
    canceller, played, memory = EchoCanceller(), [], []
    n_cuts = 0

    def play(samples, rate_hz):
        canceller.played(samples[: rate_hz // 4], rate_hz)
        played.append(len(samples))
        return True

    def synthesize(text):
        return (0.1 * np.ones(80 * len(text))).astype(np.float32), 16000

    def script():
        nonlocal n_cuts
        n, next_look = 0, 0
        while n < MINUTES * 60 * 16000:
            clip = clips[rng.integers(len(clips))]
            clip = np.concatenate([clip, np.zeros(16000, np.float32)])
            cut = int(rng.integers(len(clip))) if rng.random() < 0.2 else None
            for block in blocks(clip[:cut]):
                yield block
                n += len(block)
            if cut is not None:
                n_cuts += 1
                yield DeviceLost("cut")
            if n >= next_look:
                gc.collect()
                memory.append(footprint().pss_bytes)
                next_look += 60 * 16000

    source, _ = live(script(), monkeypatch)
    kinds: dict[str, int] = {}
    with hearing_model.chat() as chat:
        listener = Listener(
            chat,
            source,
            ListenOptions(sampling=GREEDY),
            make_voice=lambda: Voice(synthesize, play),
            echo=canceller,
            filters=[noise_filter(1, 3)],
        )
        source.at_end = lambda: None if listener.answering else listener.stop()
        for record in listener.records():
            kinds[record.kind] = kinds.get(record.kind, 0) + 1
            assert record.kind != "failed", record.text
    assert kinds["lost"] == kinds["back"] == n_cuts > 0
    assert kinds["speech"] == kinds["silence"]  # every utterance that began was answered
    assert kinds["turn"] + kinds.get("interrupted", 0) == kinds["silence"] and played
    assert not [t.name for t in threading.enumerate() if t.name.startswith("edge-gemma")]
    print(kinds, [round(n / 2**20) for n in memory])
    settled = memory[min(3, len(memory) - 1) :]  # the first minutes fill buffers
    assert max(settled) - settled[0] < 16 * 2**20
