"""Worker modes that hold a conversation: a typed turn, a spoken one, a whole spoken or shown
conversation.

In: a loaded :class:`~edge_gemma.benchmarks.systems.EdgeGemma`. Out: one record for each round. What
a user would wait for is timed on the product's own classes (``Session``, ``LiveTurn``,
``Listener``, ``Chat``): no turn is written a second time here.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edge_gemma.benchmarks.inputs import PACKET, STEP_S, detector, packets, picture, sound
from edge_gemma.benchmarks.systems import EdgeGemma, System
from edge_gemma.benchmarks.worker import Round, prompt_ids, say
from edge_gemma.conversation.stream import Chunk
from edge_gemma.options import Sampling
from edge_gemma.spans import Tokens

INSTRUCTION = "Write down what is said in the following piece of speech."  # 12 tokens
TYPED_TOKENS = 32
ANSWER_TOKENS = 48
# phases of a spoken conversation by the kind of record that begins them
LISTENER_PHASES = {
    "speech": "listen",
    "silence": "turning",
    "text": "decode",
    "turn": "between turns",
}


def disk_read_bytes() -> int:
    """What this process made the disk read so far; 0 where the kernel does not say (proc(5))."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def ours_of(system: System) -> EdgeGemma:
    if not isinstance(system, EdgeGemma):
        raise SystemExit(f"{system.task.system} holds no conversation here; edge-gemma does")
    return system


def _first_token_at(chunks: Iterable[Chunk]) -> float:
    """The moment of the first token; the rest is read to its end."""
    first = 0.0
    for chunk in chunks:
        if chunk.token_ids and not first:
            first = time.perf_counter()
    return first


def typed_rounds(system: System) -> list[Round]:
    """A conversation of ``n_prompt`` tokens is in the cache; timed is a new turn of 32."""
    ours, task = ours_of(system), system.task
    sampling = Sampling(temperature=0, max_tokens=task.n_predict)
    rounds = []
    for turn in range(task.rounds):
        ids = prompt_ids(system, task.n_prompt + TYPED_TOKENS + 1 + task.rounds)
        del ids[1 + turn]  # another text each round
        ids = ids[: task.n_prompt + TYPED_TOKENS]
        with ours.model.session() as session:
            say(phase="prefill")
            if task.n_prompt:
                session.append([Tokens(tuple(ids[:-TYPED_TOKENS]))])
            start = time.perf_counter()
            session.append([Tokens(tuple(ids[-TYPED_TOKENS:]))])
            say(phase="decode")
            first = _first_token_at(session.generate(sampling))
        rounds.append({"ttft_s": first - start, "rtf": None})
    return rounds


def spoken_rounds(system: System) -> list[Round]:
    """From the last packet of speech to the first token, by a :class:`LiveTurn`.

    Packets are handed over as fast as they are dealt with, so nothing waits; ``rtf`` tells whether
    real time would have. Encoded after its end: all of the sound is in the last packet. The length
    differs by up to an encoder step from round to round, so that no case is lucky with where its
    end falls.
    """
    from edge_gemma.conversation.live_turn import LiveTurn

    ours, task = ours_of(system), system.task
    sampling = Sampling(temperature=0, max_tokens=task.n_predict)
    rounds = []
    for number in range(task.rounds):
        samples = sound(task.audio_s + STEP_S * number / task.rounds)
        last = 0 if task.mode.endswith("after its end") else (len(samples) - 1) // PACKET * PACKET
        with ours.model.chat(pad_audio=task.pad_audio) as chat:
            read = disk_read_bytes()
            opening = time.perf_counter()
            turn = LiveTurn(chat, INSTRUCTION, pad_audio=task.pad_audio, max_tokens=task.n_predict)
            say(phase="listen")
            begin = time.perf_counter()
            for at in range(0, last, PACKET):
                turn.push(samples[at : at + PACKET])
            end_of_speech = time.perf_counter()
            turn.push(samples[last:])
            turn.finish()
            encoded = time.perf_counter()
            say(phase="decode")
            first = _first_token_at(turn.generate(sampling))
            done = time.perf_counter()
        rounds.append(
            {
                "begin_s": begin - opening,
                "turn_s": done - opening,
                "read_bytes": disk_read_bytes() - read,
                "ttft_s": first - end_of_speech,
                "encoder_s": encoded - end_of_speech,
                "rtf": (end_of_speech - begin) / task.audio_s if last else None,
            }
        )
    return rounds


def listened_rounds(system: System) -> list[Round]:
    """The task's clips through a :class:`Listener`: detection, encoder, prefill and an answer of 48
    tokens to each.
    """
    from edge_gemma.conversation.listener import Listener
    from edge_gemma.conversation.transcription import ListenOptions

    ours = ours_of(system)
    sampling = Sampling(temperature=0, max_tokens=ANSWER_TOKENS)
    turns, phase = 0, ""
    with ours.model.chat() as chat:
        options = ListenOptions(INSTRUCTION, sampling=sampling)
        clips = system.task.clips
        listener = Listener(chat, packets(clips), options, detector=detector(clips))
        for record in listener.records():
            turns += record.kind == "turn"
            begun = LISTENER_PHASES.get(record.kind, phase)
            if begun != phase:
                phase = begun
                say(phase=phase)
    return [{"turns": turns}]


def picture_turns(system: System) -> list[Round]:
    """``rounds`` turns with one new picture and a question each. The oldest turns make room."""
    import edge_gemma

    ours, task = ours_of(system), system.task
    sampling = Sampling(temperature=0, max_tokens=task.n_predict)
    pixels, dropped = picture(task.image_px), 0
    # soft tokens that an earlier run left behind would spare this one its encoder
    with tempfile.TemporaryDirectory() as fresh:
        os.environ["XDG_CACHE_HOME"] = fresh
        with ours.model.chat() as chat:
            for number in range(task.rounds):
                shown = edge_gemma.Image(np.roll(pixels, 40 * number, axis=1))
                for chunk in chat.send([shown, f"Picture {number + 1}: what is new?"], sampling):
                    dropped += chunk.usage.dropped_turns if chunk.usage else 0
    return [{"turns_dropped": dropped}]
