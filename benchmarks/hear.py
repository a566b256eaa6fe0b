"""What hearing costs: encoder steps, the wait for an answer, and an hour without growth.

    python -m edge_gemma.benchmarks.hear encoder [--precision int8]      real-time factor and memory of the full-size encoder
    python -m edge_gemma.benchmarks.hear exact                           the full-size encoder in f32 against numpy
    python -m edge_gemma.benchmarks.hear latency DECODER.gguf            last sample → first token, a 25 s utterance against a 3 s one
    python -m edge_gemma.benchmarks.hear memory DECODER.gguf             planned against measured, listening and answering
    python -m edge_gemma.benchmarks.hear soak [--minutes 60]             LibriVox speech in a loop through detection and encoder

In: full-size weights that are made where they are missing (``--work``, 1.4 GB + the encoder;
random, see audio_checkpoint.py) and a decoder GGUF from benchmarks/dev/synthetic.py. Out: a table for
people on stderr, one JSON line on stdout. What is said by random weights is noise; time and memory
are those of real ones.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from edge_gemma.bundles.folder import Bundle, BundleWriter, file_entry
from edge_gemma.bundles.manifest import AudioPart, DecoderPart, Manifest, Source
from edge_gemma.hearing.samples import BLOCK_SAMPLES, RATE_HZ
from edge_gemma.machine.footprint import Footprint, footprint
from edge_gemma.machine.peak import PeakSampler
from edge_gemma.units import MiB

INSTRUCTION = "Write down what is said in the following piece of speech."  # 12 tokens
QUEUE_S = 30.0  # audio.Microphone's
STEP = RATE_HZ * 480 // 1000  # samples of one encoder step


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def encoder_bundle(work: Path, precision: str, decoder: Path | None = None) -> Bundle:
    """A bundle in ``work`` with the full-size audio encoder, made on first use; its decoder is
    ``decoder``, or only a name.
    """
    out = work / f"hear-{precision}{'-' + decoder.stem if decoder else ''}"
    if (out / "manifest.json").is_file():
        return Bundle.open(out)
    from edge_gemma.benchmarks.dev import audio_checkpoint
    from edge_gemma.convert.audio import write_audio_encoder
    from edge_gemma.convert.checkpoint import Checkpoint

    checkpoint = work / "audio-checkpoint"
    if not (checkpoint / "config.json").is_file():
        note(f"writing the full-size audio checkpoint to {checkpoint}")
        audio_checkpoint.write(checkpoint)
    with BundleWriter(out) as writer:
        with PeakSampler(interval_s=0.01) as sampler:
            began = time.perf_counter()
            part = write_audio_encoder(Checkpoint.open(checkpoint), writer.folder, precision)
        note(
            f"converted to {precision} in {time.perf_counter() - began:.1f} s, peak PSS "
            f"{sampler.peak_pss_bytes / MiB:.0f} MiB"
        )
        return writer.commit(_manifest(writer.folder, part, decoder))


def _manifest(folder: Path, part: AudioPart, decoder: Path | None) -> Manifest:
    if decoder is None:
        (folder / "decoder.gguf").write_bytes(b"none")
        sizes = dict(
            n_layer=1,
            n_embd=part.n_embd,
            n_ff=1,
            n_head=1,
            n_head_kv=1,
            head_dim=1,
            n_vocab=8,
            n_ctx_train=1,
            sliding_window=0,
            kv_layers=("global",),
        )
        text = DecoderPart(file="decoder.gguf", header_bytes=4, header_sha256="0" * 64, **sizes)
        base = Manifest(
            name="encoder",
            family="gemma3n",
            instruct=False,
            decoder=text,
            source=Source(origin="synthetic"),
            files={},
        )
    else:
        from edge_gemma.store.importer import import_gguf

        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            imported = import_gguf(decoder, Path(temporary) / "bundle")
            base = imported.manifest
            os.link(imported.decoder_path, folder / "decoder.gguf")
        rows = np.random.default_rng(1).standard_normal((2, part.n_embd)).astype(np.float32)
        np.save(folder / "special_rows.npy", rows)
        tokens = {**base.special_tokens, "start_of_audio": 256000}
        tokens.pop("end_of_image", None)
        base = msgspec.structs.replace(
            base, special_rows=("end_of_audio", "audio_padding"), special_tokens=tokens
        )
    files = {
        path.name: file_entry(path) for path in folder.iterdir() if not path.name.startswith(".")
    }
    return msgspec.structs.replace(base, audio=part, files=files, name=f"{base.name} with ears")


def noise(seconds: float) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE_HZ))).astype(
        np.float32
    )


def encoder(work: Path, precision: str, n_threads: int, seconds: float) -> dict:
    """Steps of 480 ms through the encoder. PSS is that of the whole process, Python and onnxruntime
    included.
    """
    from edge_gemma.hearing.encoder import AudioEncoder

    bundle = encoder_bundle(work, precision)
    samples = noise(seconds)
    with PeakSampler(interval_s=0.02) as sampler:
        began = time.perf_counter()
        with AudioEncoder(bundle, n_threads=n_threads) as loaded:
            load_s = time.perf_counter() - began
            loaded.encode(samples[: 2 * STEP])
            sampler.rebase()
            stream, times = loaded.stream(), []
            for k in range(0, len(samples), STEP):
                began = time.perf_counter()
                stream.push(samples[k : k + STEP])
                times.append(time.perf_counter() - began)
            began = time.perf_counter()
            stream.finish()
            tail_s, now = time.perf_counter() - began, footprint()
    step_s = statistics.median(times[1:])
    return {
        "precision": precision,
        "n_threads": n_threads,
        "step_ms": round(1000 * step_s, 1),
        "step_p95_ms": round(1000 * float(np.percentile(times[1:], 95)), 1),
        "real_time_factor": round(step_s / 0.48, 3),
        "tail_ms": round(1000 * tail_s, 1),
        "load_s": round(load_s, 2),
        "peak_pss_mib": round(sampler.peak_pss_bytes / MiB),
        "anon_mib": round(now.anon_bytes / MiB),
        "file_mib": round(now.file_bytes / MiB),
        "weights_mib": round(bundle.manifest.audio.weights_bytes / MiB),
    }


def exact(work: Path, seconds: list[float]) -> dict:
    """The full-size encoder in float32 against numpy (audio_reference.py) on the same checkpoint:
    the largest difference of a soft token's values, which have an rms of 1.
    """
    from edge_gemma.benchmarks.dev import audio_reference
    from edge_gemma.convert.checkpoint import Checkpoint

    from edge_gemma.hearing.encoder import AudioEncoder

    bundle = encoder_bundle(work, "f32")
    checkpoint = Checkpoint.open(work / "audio-checkpoint")
    result = {}
    with AudioEncoder(bundle, n_threads=os.cpu_count() or 1) as loaded:
        for length in seconds:
            samples = noise(length)
            soft, want = loaded.encode(samples), audio_reference.encode(checkpoint, samples)
            assert soft.shape == want.shape, (soft.shape, want.shape)
            result[f"largest_difference_{length:g}s"] = float(f"{np.abs(soft - want).max():.2e}")
    return result


def latency(work: Path, decoder: Path, precision: str, rounds: int, n_threads: int | None) -> dict:
    """Last sample → first token, push to talk (the end is known), short mode, an instruction of
    about 12 tokens before the audio.

    ``live``: encoded and prefilled while it is spoken. ``after``: the same, all of it after the
    end, the instruction prefilled before. Lengths are varied by up to a step, alike for all, so
    that no case is lucky with where its end falls.
    """
    from edge_gemma import load
    from edge_gemma.conversation.live_turn import LiveTurn
    from edge_gemma.options import Sampling
    from edge_gemma.plan.records import PlanRequest

    bundle = encoder_bundle(work, precision, decoder)
    waits: dict[str, list[tuple[float, float]]] = {}  # (whole wait, of it the encoder's part)
    busy: list[
        float
    ] = []  # work over length of each live turn; the very first one, right after the load, leads
    options = Sampling(temperature=0, max_tokens=1)
    with load(bundle, n_ctx=1024, request=PlanRequest(n_threads=n_threads)) as model:
        for k in range(rounds + 1):  # the first one warms up
            jitter = 0.48 * k / (rounds + 1)
            for mode, seconds in (("live", 3), ("live", 25), ("after", 3), ("after", 25)):
                samples = noise(seconds + jitter)
                with model.chat(pad_audio=False) as chat:
                    turn = LiveTurn(chat, INSTRUCTION, max_tokens=8)
                    began = time.perf_counter()
                    last = (len(samples) - 1) // BLOCK_SAMPLES * BLOCK_SAMPLES
                    if mode == "live":
                        for start in range(0, last, BLOCK_SAMPLES):
                            turn.push(samples[start : start + BLOCK_SAMPLES])
                    ended = time.perf_counter()
                    busy += [(ended - began) / len(samples) * RATE_HZ] if mode == "live" else []
                    turn.push(samples[last:] if mode == "live" else samples)
                    turn.finish()
                    encoded = time.perf_counter()
                    for _ in turn.generate(options):
                        break
                    if k:
                        waits.setdefault(f"{mode}_{seconds}s", []).append(
                            (turn.first_token_s - ended, encoded - ended)
                        )
                    chat.cancel()
        memory, n_instruction, n_threads = (
            footprint(),
            len(model.tokenize(INSTRUCTION)),
            model.plan.settings.n_threads,
        )
    median = {name: statistics.median(wait for wait, _ in values) for name, values in waits.items()}
    spread = {
        name: (max(wait for wait, _ in values) - min(wait for wait, _ in values)) / 2
        for name, values in waits.items()
    }
    parts = {
        name: statistics.median(part for _, part in values)
        for name, values in waits.items()
        if name.startswith("live")
    }
    note(
        "\n| last sample → first token, ms | 3 s of speech | 25 s of speech | 25 s / 3 s "
        "|\n|---|---|---|---|"
    )
    for mode, words in (("live", "encoded while it is spoken"), ("after", "encoded after the end")):
        names = [f"{mode}_{s}s" for s in (3, 25)]
        cells = (f"{1000 * median[name]:.0f} ± {1000 * spread[name]:.0f}" for name in names)
        note(f"| {words} | {' | '.join(cells)} | {median[names[1]] / median[names[0]]:.2f} |")
    ratios = {s: median[f"after_{s}s"] / median[f"live_{s}s"] for s in (3, 25)}
    note(f"| ratio | {ratios[3]:.1f} | {ratios[25]:.1f} | |\n")
    return {
        **{f"{name}_ms": round(1000 * value) for name, value in median.items()},
        **{f"{name}_encoder_ms": round(1000 * value) for name, value in parts.items()},
        "live_25s_over_3s": round(median["live_25s"] / median["live_3s"], 2),
        "after_over_live_25s": round(ratios[25], 1),
        "busy_while_speaking": round(statistics.median(busy[2:]), 2),
        "busy_right_after_load": round(busy[0], 2),
        "vad_hangover_ms": hangover_ms(),
        "rounds": rounds,
        "precision": precision,
        "pss_mib": round(memory.pss_bytes / MiB),
        "instruction_tokens": n_instruction,
        "n_threads": n_threads,
    }


def hangover_ms() -> int:
    """How long after the last word speech detection says that it was the last: what a hands-free
    turn waits on top of the figures above.
    """
    from edge_gemma.hearing.utterances import SpeechDetector

    detector = SpeechDetector(probability=lambda chunk: float(np.abs(chunk).max() > 0.1))
    n = 0
    detector.push(np.full(RATE_HZ // BLOCK_SAMPLES * BLOCK_SAMPLES, 0.5, np.float32))
    while detector.speaking:
        detector.push(np.zeros(BLOCK_SAMPLES, np.float32))
        n += BLOCK_SAMPLES
    return round(1000 * n / RATE_HZ)


def memory(
    work: Path, decoder: Path, precision: str, n_threads: int | None, clips: list[Path]
) -> dict:
    """Planned against measured PSS of a hearing session, while listening and while answering: with
    the encoder resident, and with it let go while answering.

    Each in a process of its own, through speech detection, encoder, prefill and 48 tokens of answer
    for two clips of speech.
    """
    bundle = encoder_bundle(work, precision, decoder)
    result = {}
    note("\n| MiB | phase | planned | measured | |\n|---|---|---|---|---|")
    for encoders in ("resident", "one at a time"):
        with concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn")
        ) as pool:
            found = pool.submit(
                _session_memory, bundle.folder, encoders, n_threads, clips[:2]
            ).result()
        for phase, (planned, measured) in found.items():
            note(
                f"| {encoders} | {phase} | {planned / MiB:.0f} | {measured / MiB:.0f} | "
                f"{100 * (planned / measured - 1):+.1f} % |"
            )
            result[f"{encoders.split()[0]}_{phase}_mib"] = [
                round(planned / MiB),
                round(measured / MiB),
            ]
    note("")
    return result


def _session_memory(
    folder: Path, encoders: str, n_threads: int | None, clips: list[Path]
) -> dict[str, tuple[int, int]]:
    """{phase: (planned, measured) bytes}."""
    from edge_gemma.conversation.listener import Listener, ListenOptions
    from edge_gemma.engines.llama.weights import repacked_here
    from edge_gemma.hearing.sound import read_audio
    from edge_gemma.machine.probe import machine_for
    from edge_gemma.model import Model
    from edge_gemma.options import Sampling
    from edge_gemma.plan.ladder import make_plan
    from edge_gemma.plan.records import PlanRequest

    bundle = Bundle.open(folder)
    plan = make_plan(
        bundle.manifest,
        machine_for("auto"),
        PlanRequest(n_ctx=2048, n_threads=n_threads),
        repacked_here,
    ).require()
    if (
        encoders == "one at a time"
    ):  # as the ladder of concessions has it where two encoders do not fit together
        items = tuple(
            replace(item, phases=("listen",)) if item.name.startswith("audio encoder") else item
            for item in plan.items
        )
        plan = replace(plan, settings=replace(plan.settings, encoders=encoders), items=items)
    x = np.concatenate(
        [part for clip in clips for part in (read_audio(clip), np.zeros(RATE_HZ, np.float32))]
    )
    peaks: dict[str, int] = {}
    with (
        Model(bundle, plan) as model,
        model.chat() as chat,
        PeakSampler(interval_s=0.01, duty=0.2) as sampler,
    ):
        options = ListenOptions(INSTRUCTION, sampling=Sampling(temperature=0, max_tokens=48))
        for record in Listener(
            chat, (x[k : k + BLOCK_SAMPLES] for k in range(0, len(x), BLOCK_SAMPLES)), options
        ).records():
            phase = {
                "speech": "listen",
                "silence": "turning",
                "text": "decode",
                "turn": "after",
            }.get(record.kind)
            if phase and sampler.phases[-1].name != phase:
                sampler.mark(phase)
        for phase in sampler.phases:
            peaks[phase.name] = max(peaks.get(phase.name, 0), phase.peak_pss_bytes)
    return {name: (plan.phase_bytes(name), peaks[name]) for name in ("listen", "decode")}


def soak(work: Path, precision: str, minutes: float, clips: list[Path]) -> dict:
    """Clips in a loop through detection, features and encoder, in packets of 32 ms, as fast as it
    goes: memory and step time of the first and the last tenth.

    Drops are those that the microphone's queue of 30 s would have had: each packet is given the
    time it really took, and arrives when it would have been spoken.
    """
    from edge_gemma.hearing.encoder import AudioEncoder
    from edge_gemma.hearing.sound import read_audio
    from edge_gemma.hearing.utterances import SpeechDetector

    sounds = [np.concatenate([read_audio(path), np.zeros(RATE_HZ, np.float32)]) for path in clips]
    bundle = encoder_bundle(work, precision)
    position = n_rows = n_steps = utterances = played = taken = dropped = 0
    behind_s = most_behind_s = 0.0  # how late the listener would be, at the arrival of a packet
    times: list[tuple[int, float]] = []
    memory: list[Footprint] = []  # after each minute of sound
    began = time.perf_counter()
    with AudioEncoder(bundle, n_threads=os.cpu_count() or 1) as loaded:
        detector, stream = SpeechDetector(), None
        next_look = 0
        while position < minutes * 60 * RATE_HZ:
            sound = sounds[played % len(sounds)]
            played += 1
            for start in range(0, len(sound), BLOCK_SAMPLES):
                packet, arrived = sound[start : start + BLOCK_SAMPLES], time.perf_counter()
                position += len(packet)
                for event in detector.push(packet):
                    stream = stream or loaded.stream()
                    step_began = time.perf_counter()
                    rows = len(stream.push(event.samples))
                    if rows == 3:
                        times.append((position, time.perf_counter() - step_began))
                    taken += len(event.samples)
                    n_steps += rows // 3
                    n_rows += rows
                    if event.kind in ("cut", "end"):
                        n_rows += len(stream.finish())
                        utterances += event.kind == "end"
                        stream = None
                behind_s = max(
                    0.0, behind_s + time.perf_counter() - arrived - len(packet) / RATE_HZ
                )
                most_behind_s = max(most_behind_s, behind_s)
                dropped += behind_s > QUEUE_S
            if position >= next_look:
                memory.append(footprint())
                next_look += RATE_HZ * 60
    took_s = time.perf_counter() - began
    tenth = max(1, len(times) // 10)
    first, last = (
        statistics.median(t for _, t in part) for part in (times[:tenth], times[-tenth:])
    )
    settled = memory[min(2, len(memory) - 1) :]
    return {
        "minutes": round(position / RATE_HZ / 60, 1),
        "took_s": round(took_s),
        "clips_played": played,
        "utterances": utterances,
        "soft_tokens": n_rows,
        "steps": n_steps,
        "speech_minutes": round(taken / RATE_HZ / 60, 1),
        "dropped_blocks": dropped,
        "most_behind_s": round(most_behind_s, 2),
        "first_tenth_step_ms": round(1000 * first, 1),
        "last_tenth_step_ms": round(1000 * last, 1),
        "pss_third_minute_mib": round(settled[0].pss_bytes / MiB, 1),
        "pss_last_mib": round(settled[-1].pss_bytes / MiB, 1),
        "pss_max_mib": round(max(m.pss_bytes for m in settled) / MiB, 1),
        "anon_third_minute_mib": round(settled[0].anon_bytes / MiB, 1),
        "anon_last_mib": round(settled[-1].anon_bytes / MiB, 1),
        "precision": precision,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["encoder", "exact", "latency", "memory", "soak"])
    parser.add_argument(
        "decoder",
        type=Path,
        nargs="?",
        help="latency and memory: a Gemma 3n GGUF, `python -m edge_gemma.benchmarks.dev.synthetic e2b "
        "OUT.gguf --head q4_0 --embed q8_0`",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "edge-gemma-hear",
        help="where full-size weights are kept",
    )
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--clips",
        type=Path,
        default=Path(".cache/librivox"),
        help="soak and memory: a folder of sound files (the tests fetch LibriVox there)",
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    clips = sorted(options.clips.glob("*.wav"))
    if options.what in ("latency", "memory") and (
        options.decoder is None or not options.decoder.is_file()
    ):
        sys.exit(f"{options.what} needs a decoder GGUF; found {options.decoder}. See --help")
    if options.what in ("memory", "soak") and not clips:
        sys.exit(
            f"no .wav in {options.clips}; run `pytest tests/test_vad.py` once, or give --clips"
        )
    if options.what == "encoder":
        result = encoder(
            options.work, options.precision, options.threads or os.cpu_count() or 1, 20
        )
    elif options.what == "exact":
        result = exact(options.work, [3, 10])
    elif options.what == "latency":
        result = latency(
            options.work, options.decoder, options.precision, options.rounds, options.threads
        )
    elif options.what == "memory":
        result = memory(options.work, options.decoder, options.precision, options.threads, clips)
    else:
        result = soak(options.work, options.precision, options.minutes, clips)
    result |= {"what": options.what, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for name, value in result.items():
        note(f"{name:>22}  {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
