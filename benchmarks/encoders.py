"""Worker modes that run an encoder alone: steps of sound, an hour of it, pictures.

In: a loaded system. Out: one record for each round.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import numpy as np

from edge_gemma.benchmarks.inputs import STEP_S, detector, packets, picture, sound
from edge_gemma.benchmarks.systems import AudioEncoderAlone, System
from edge_gemma.benchmarks.worker import Round, say
from edge_gemma.hearing.encoder import AudioEncoder, AudioStream
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.hearing.utterances import SpeechDetector
from edge_gemma.machine.footprint import Footprint, footprint

STEP = int(STEP_S * RATE_HZ)  # 7680 samples
ROWS_OF_STEP = 3  # soft tokens of 480 ms
QUEUE_S = 30.0  # what the microphone's queue holds
PROBE = 997  # every so many-th value of the soft tokens is compared


def _encoder(system: System) -> AudioEncoder:
    assert isinstance(system, AudioEncoderAlone), system.task.system
    return system.encoder


def step_rounds(system: System) -> list[Round]:
    """``audio_s`` seconds in steps of 480 ms, then the tail."""
    encoder, samples = _encoder(system), sound(system.task.audio_s)
    say(phase="warm-up")
    encoder.encode(samples[: 2 * STEP])
    rounds = []
    for _ in range(system.task.rounds):
        say(phase="listen")
        stream, steps = encoder.stream(), []
        for at in range(0, len(samples), STEP):
            begin = time.perf_counter()
            stream.push(samples[at : at + STEP])
            steps.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        stream.finish()
        tail_s = time.perf_counter() - begin
        step_s = statistics.median(steps)
        rounds.append(
            {
                "step_s": step_s,
                "step_p95_s": float(np.percentile(steps, 95)),
                "rtf": step_s / STEP_S,
                "tail_s": tail_s,
            }
        )
    return rounds


# --- an hour of speech ---


@dataclass
class _Soak:
    """Detection and encoder, packet by packet, and what it took."""

    encoder: AudioEncoder
    detector: SpeechDetector
    stream: AudioStream | None = None
    position: int = 0  # samples heard
    utterances: int = 0
    n_rows: int = 0
    blocks_lost: int = 0
    behind_s: float = 0.0  # how late a listener would be at the arrival of the next packet
    most_behind_s: float = 0.0
    steps: list[float] = field(default_factory=list)

    def hear(self, packet: np.ndarray) -> None:
        arrived = time.perf_counter()
        self.position += len(packet)
        for event in self.detector.push(packet):
            self._encode(event.samples)
            if event.kind in ("cut", "end"):
                self._close(ended=event.kind == "end")
        took_s = time.perf_counter() - arrived
        self.behind_s = max(0.0, self.behind_s + took_s - len(packet) / RATE_HZ)
        self.most_behind_s = max(self.most_behind_s, self.behind_s)
        self.blocks_lost += self.behind_s > QUEUE_S

    def _encode(self, samples: np.ndarray) -> None:
        self.stream = self.stream or self.encoder.stream()
        begin = time.perf_counter()
        n_rows = len(self.stream.push(samples))
        if n_rows == ROWS_OF_STEP:
            self.steps.append(time.perf_counter() - begin)
        self.n_rows += n_rows

    def _close(self, ended: bool) -> None:
        assert self.stream is not None
        self.n_rows += len(self.stream.finish())
        self.stream = None
        self.utterances += ended

    def result(self, memory: list[Footprint]) -> Round:
        tenth = max(1, len(self.steps) // 10)
        settled = [each.pss_bytes for each in memory[min(2, len(memory) - 1) :]]
        return {
            "minutes": self.position / RATE_HZ / 60,
            "utterances": self.utterances,
            "soft_tokens": self.n_rows,
            "blocks_lost": self.blocks_lost,
            "most_behind_s": self.most_behind_s,
            "first_step_s": statistics.median(self.steps[:tenth]) if self.steps else None,
            "last_step_s": statistics.median(self.steps[-tenth:]) if self.steps else None,
            "pss_third_minute_bytes": settled[0],
            "pss_last_bytes": settled[-1],
            "pss_most_bytes": max(settled),
        }


def soak_rounds(system: System) -> list[Round]:
    """The clips in a loop, ``minutes`` of sound as fast as it goes: memory after each minute, step
    times of the first and the last tenth.

    Blocks lost are those that the microphone's queue of 30 s would have lost: each packet is given
    the time it really took, and arrives when it would have been spoken.
    """
    task = system.task
    soak = _Soak(_encoder(system), detector(task.clips))
    memory: list[Footprint] = []
    next_look = 0
    say(phase="listen")
    while soak.position < task.minutes * 60 * RATE_HZ:
        for packet in packets(task.clips):
            soak.hear(packet)
            if soak.position >= next_look:
                memory.append(footprint())
                next_look += 60 * RATE_HZ
    return [soak.result([*memory, footprint()])]


# --- pictures ---


def picture_rounds(system: System) -> list[Round]:
    """One picture a round; the first warms up and is not counted where there are several."""
    task = system.task
    pixels = picture(task.image_px)
    say(phase="look")
    rounds = []
    for _ in range(task.rounds):
        wall, cpu = time.perf_counter(), system.cpu_seconds()
        rows = system.encode_picture(pixels)
        rounds.append(
            {
                "picture_s": time.perf_counter() - wall,
                "cpu_s": system.cpu_seconds() - cpu,
                "probe": np.asarray(rows, np.float64).reshape(-1)[::PROBE].tolist(),
            }
        )
    return rounds[1:] or rounds
