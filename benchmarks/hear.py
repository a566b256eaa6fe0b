"""What hearing costs: encoder steps, the wait for an answer, and an hour without growth.

    python -m edge_gemma.benchmarks.hear encoder [--precision int8]      real-time factor and memory of the full-size encoder
    python -m edge_gemma.benchmarks.hear latency DECODER.gguf            last sample → first token, a 25 s utterance against a 3 s one
    python -m edge_gemma.benchmarks.hear soak [--minutes 60]             LibriVox speech in a loop through detection and encoder

In: full-size weights that are made where they are missing (``--work``, 1.4 GB + the encoder; random, see audio_checkpoint.py) and a
decoder GGUF from benchmarks/synthetic.py. Out: a table for people on stderr, one JSON line on stdout. What is said by random weights is noise;
time and memory are those of real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from ..bundle import AudioEncoder as Part
from ..bundle import Bundle, BundleWriter, Decoder, Manifest, Source, file_entry
from ..features import RATE_HZ
from ..memory import PeakSampler, rollup
from ..units import MiB

STEP = RATE_HZ * 480 // 1000  # samples of one encoder step
PACKET = 512


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def encoder_bundle(work: Path, precision: str, decoder: Path | None = None) -> Bundle:
    """A bundle in ``work`` with the full-size audio encoder, made on first use; its decoder is ``decoder``, or only a name."""
    out = work / f"hear-{precision}{'-' + decoder.stem if decoder else ''}"
    if (out / "manifest.json").is_file():
        return Bundle.open(out)
    from ..convert.audio import write_audio_encoder
    from ..convert.checkpoint import Checkpoint
    from . import audio_checkpoint

    checkpoint = work / "audio-checkpoint"
    if not (checkpoint / "config.json").is_file():
        note(f"writing the full-size audio checkpoint to {checkpoint}")
        audio_checkpoint.write(checkpoint)
    with BundleWriter(out) as writer:
        with PeakSampler(interval_s=0.01) as sampler:
            began = time.perf_counter()
            part = write_audio_encoder(Checkpoint.open(checkpoint), writer.folder, precision)
        note(f"converted to {precision} in {time.perf_counter() - began:.1f} s, peak PSS {sampler.peak_pss_bytes / MiB:.0f} MiB")
        return writer.commit(_manifest(writer.folder, part, decoder))


def _manifest(folder: Path, part: Part, decoder: Path | None) -> Manifest:
    if decoder is None:
        (folder / "decoder.gguf").write_bytes(b"none")
        sizes = dict(n_layer=1, n_embd=part.n_embd, n_ff=1, n_head=1, n_head_kv=1, head_dim=1, n_vocab=8, n_ctx_train=1, sliding_window=0, kv_layers=("global",))
        text = Decoder(file="decoder.gguf", header_bytes=4, header_sha256="0" * 64, **sizes)
        base = Manifest(name="encoder", family="gemma3n", instruct=False, decoder=text, source=Source(origin="synthetic"), files={})
    else:
        from ..importer import import_gguf

        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            imported = import_gguf(decoder, Path(temporary) / "bundle")
            base = imported.manifest
            os.link(imported.decoder_path, folder / "decoder.gguf")
        rows = np.random.default_rng(1).standard_normal((2, part.n_embd)).astype(np.float32)
        np.save(folder / "special_rows.npy", rows)
        tokens = {**base.special_tokens, "start_of_audio": 256000}
        tokens.pop("end_of_image", None)
        base = msgspec.structs.replace(base, special_rows=("end_of_audio", "audio_padding"), special_tokens=tokens)
    files = {path.name: file_entry(path) for path in folder.iterdir() if not path.name.startswith(".")}
    return msgspec.structs.replace(base, audio=part, files=files, name=f"{base.name} with ears")


def noise(seconds: float) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE_HZ))).astype(np.float32)


def encoder(work: Path, precision: str, n_threads: int, seconds: float) -> dict:
    """Steps of 480 ms through the encoder. PSS is that of the whole process, Python and onnxruntime included."""
    from ..encode import AudioEncoder

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
            tail_s, now = time.perf_counter() - began, rollup()
    step_s = statistics.median(times[1:])
    return {
        "precision": precision, "n_threads": n_threads, "step_ms": round(1000 * step_s, 1), "step_p95_ms": round(1000 * float(np.percentile(times[1:], 95)), 1),
        "real_time_factor": round(step_s / 0.48, 3), "tail_ms": round(1000 * tail_s, 1), "load_s": round(load_s, 2),
        "peak_pss_mib": round(sampler.peak_pss_bytes / MiB), "anon_mib": round(now.anon_bytes / MiB), "file_mib": round(now.file_bytes / MiB),
        "weights_mib": round(bundle.manifest.audio.weights_bytes / MiB),
    }  # fmt: skip


def latency(work: Path, decoder: Path, precision: str, rounds: int, n_threads: int | None) -> dict:
    """Last sample → first token, push to talk (the end is known), short mode, an instruction of about 12 tokens before the audio.

    ``live``: encoded and prefilled while it is spoken. ``after``: the same, all of it after the end, the instruction prefilled before.
    Lengths are varied by up to a step, alike for all, so that no case is lucky with where its end falls.
    """
    from .. import load
    from ..listen import LiveTurn
    from ..plan import Request
    from ..sample import Options

    bundle = encoder_bundle(work, precision, decoder)
    waits: dict[str, list[float]] = {}
    busy: list[float] = []
    options = Options(temperature=0, max_tokens=1)
    with load(bundle, n_ctx=1024, request=Request(n_threads=n_threads)) as model:
        instruction = "Write down what is said in the following piece of speech."
        for k in range(rounds + 1):  # the first one warms up
            jitter = 0.48 * k / (rounds + 1)
            for mode, seconds in (("live", 3), ("live", 25), ("after", 3), ("after", 25)):
                samples = noise(seconds + jitter)
                with model.chat(pad_audio=False) as chat:
                    turn = LiveTurn(chat, instruction, max_tokens=8)
                    began = time.perf_counter()
                    last = (len(samples) - 1) // PACKET * PACKET
                    if mode == "live":
                        for start in range(0, last, PACKET):
                            turn.push(samples[start : start + PACKET])
                        busy.append((time.perf_counter() - began) / seconds)
                    ended = time.perf_counter()
                    turn.push(samples[last:] if mode == "live" else samples)
                    turn.finish()
                    for _ in turn.generate(options):
                        break
                    if k:
                        waits.setdefault(f"{mode}_{seconds}s", []).append(turn.first_token_s - ended)
                    chat.cancel()
        footprint = rollup()
    median = {name: statistics.median(values) for name, values in waits.items()}
    return {
        **{f"{name}_ms": round(1000 * value) for name, value in median.items()},
        "live_25s_over_3s": round(median["live_25s"] / median["live_3s"], 2), "after_over_live_25s": round(median["after_25s"] / median["live_25s"], 1),
        "busy_while_speaking": round(statistics.median(busy), 2), "rounds": rounds, "precision": precision, "pss_mib": round(footprint.pss_bytes / MiB),
        "instruction_tokens": len(model_tokens), "n_threads": model.plan.settings.n_threads,
    } if (model_tokens := _tokens(bundle, instruction)) else {}  # fmt: skip


def _tokens(bundle: Bundle, text: str) -> list[int]:
    from ..decode import Decoder as Loaded
    from ..decode import Settings

    decoder = Loaded(bundle.decoder_path, Settings(n_ctx=64, repack=False))
    try:
        return decoder.tokenize(text)
    finally:
        decoder.close()


def soak(work: Path, precision: str, minutes: float, clips: list[Path]) -> dict:
    """Clips in a loop through detection, features and encoder, in packets of 32 ms, as fast as it goes: memory and step time of the first and the last tenth."""
    from ..audio import read_audio
    from ..encode import AudioEncoder
    from ..vad import SpeechDetector

    sounds = [read_audio(path) for path in clips]
    bundle = encoder_bundle(work, precision)
    position = n_steps = n_rows = utterances = taken = 0
    times: list[tuple[int, float]] = []
    memory: list[int] = []
    with AudioEncoder(bundle, n_threads=os.cpu_count() or 1) as loaded:
        detector, stream = SpeechDetector(), None
        next_look, k = 0, 0
        while position < minutes * 60 * RATE_HZ:
            sound = np.concatenate([sounds[k % len(sounds)], np.zeros(RATE_HZ, np.float32)])
            k += 1
            for start in range(0, len(sound), PACKET):
                packet = sound[start : start + PACKET]
                position += len(packet)
                for event in detector.push(packet):
                    stream = loaded.stream() if event.kind == "start" or stream is None else stream
                    began = time.perf_counter()
                    rows = len(stream.push(event.samples))
                    if rows == 3:
                        times.append((position, time.perf_counter() - began))
                    taken += len(event.samples)
                    n_rows += rows
                    n_steps += rows > 0
                    if event.kind in ("cut", "end"):
                        n_rows += len(stream.finish())
                        utterances += event.kind == "end"
                        stream = None
            if position >= next_look:
                memory.append(rollup().pss_bytes)
                next_look += RATE_HZ * 60
    tenth = max(1, len(times) // 10)
    first, last = (statistics.median(t for _, t in part) for part in (times[:tenth], times[-tenth:]))
    settled = memory[min(2, len(memory) - 1) :]
    return {
        "minutes": round(position / RATE_HZ / 60, 1), "utterances": utterances, "clips_played": k, "soft_tokens": n_rows, "speech_minutes": round(taken / RATE_HZ / 60, 1),
        "first_step_ms": round(1000 * first, 1), "last_step_ms": round(1000 * last, 1), "pss_first_mib": round(settled[0] / MiB, 1),
        "pss_last_mib": round(settled[-1] / MiB, 1), "pss_max_mib": round(max(settled) / MiB, 1), "precision": precision,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encoder", "latency", "soak"])
    parser.add_argument("decoder", type=Path, nargs="?", help="latency: a Gemma 3n GGUF, `python -m edge_gemma.benchmarks.synthetic e2b OUT.gguf --head q4_0 --embed q8_0`")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edge-gemma-hear", help="where full-size weights are kept")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clips", type=Path, default=Path(".cache/librivox"), help="soak: a folder of sound files (the tests fetch LibriVox there)")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "encoder":
        result = encoder(options.work, options.precision, options.threads or os.cpu_count() or 1, 20)
    elif options.what == "latency":
        if options.decoder is None or not options.decoder.is_file():
            sys.exit(f"latency needs a decoder GGUF; found {options.decoder}. See --help")
        result = latency(options.work, options.decoder, options.precision, options.rounds, options.threads)
    else:
        clips = sorted(options.clips.glob("*.wav"))
        if not clips:
            sys.exit(f"no .wav in {options.clips}; run `pytest tests/test_vad.py` once, or give --clips")
        result = soak(options.work, options.precision, options.minutes, clips)
    result |= {"what": options.what, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for name, value in result.items():
        note(f"{name:>22}  {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
