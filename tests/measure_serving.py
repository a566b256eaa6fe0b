"""What serving adds: speech over Wyoming against speech in the same process, tokens over HTTP
against tokens in the same process.

    python tests/measure_serving.py speech BUNDLE --rounds 7
    python tests/measure_serving.py tokens BUNDLE --rounds 7
    python tests/measure_serving.py lanes BUNDLE --rounds 5 --threads 1
    python tests/measure_serving.py rows BUNDLE --rounds 60 --threads 1

In: a bundle (one that hears, for speech). Out: a table, and a line of JSON. Both ways take turns,
so that what else the machine does meets both. ``lanes``: as many answers one after the other, and
four at a time, through a Service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from serving import serving as serving_process

from edge_gemma.conversation.transcription import TRANSCRIBE, ListenOptions, live_turn
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.hearing.utterances import SpeechDetector, VadSettings
from edge_gemma.model import Model, load
from edge_gemma.options import Sampling
from edge_gemma.plan.records import PlanRequest
from edge_gemma.serve.wyoming_asr import SILENCE_S, Trimmed
from edge_gemma.spans import Tokens

CHUNK = 1024  # samples: what Home Assistant sends at a time
N_TOKENS = 48


def voiced(seconds: float) -> np.ndarray:
    """What speech detection takes for speech, with silence before: ``[n]`` float32."""
    t = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 2 * t)) / RATE_HZ
    sound = sum(np.sin(n * phase) / n for n in range(1, 20)) * (0.6 + 0.4 * np.sin(8 * np.pi * t))
    silence = np.zeros(RATE_HZ // 2)
    samples = np.concatenate([silence, 0.3 * sound / np.abs(sound).max()])
    whole = len(samples) // CHUNK * CHUNK
    return (samples[:whole] * 32767).astype("<i2").astype(np.float32) / 32768


def paced(samples: np.ndarray, push: Callable[[np.ndarray], None]) -> float:
    """Chunk by chunk, none before it was spoken → when the last one was."""
    started = time.perf_counter()
    for start in range(0, len(samples), CHUNK):
        until = started + (start + CHUNK) / RATE_HZ
        time.sleep(max(0.0, until - time.perf_counter()))
        push(samples[start : start + CHUNK])
    return started + len(samples) / RATE_HZ


def in_process(model: Model, samples: np.ndarray) -> tuple[float, str]:
    """Seconds from the last chunk to the first piece of text, as ``listen`` does it."""
    sampling = Sampling(max_tokens=8, temperature=0)
    detector = SpeechDetector(VadSettings(end_s=SILENCE_S["default"]))
    with model.chat() as chat:
        turn = None

        def push(block: np.ndarray) -> None:
            nonlocal turn
            for event in detector.push(block):
                turn = turn or live_turn(
                    chat, TRANSCRIBE.format(language="English"), ListenOptions(sampling=sampling)
                )
                turn.push(event.samples)

        last_s = paced(samples, push)
        first_s, written, text = 0.0, Trimmed(), ""
        for event in detector.finish():
            assert turn is not None
            turn.push(event.samples)
        assert turn is not None, "speech detection heard no speech"
        turn.finish()
        for chunk in turn.generate(sampling):
            if piece := written.push(chunk.text):
                first_s, text = first_s or time.perf_counter(), text + piece
    return first_s - last_s, text


def over_wyoming(port: int, samples: np.ndarray) -> tuple[float, str]:
    """The same by the protocol's own client."""
    return asyncio.run(_over_wyoming(port, samples))


async def _over_wyoming(port: int, samples: np.ndarray) -> tuple[float, str]:
    from wyoming.asr import Transcribe, Transcript
    from wyoming.audio import AudioChunk, AudioStart, AudioStop
    from wyoming.client import AsyncTcpClient

    pcm = (samples * 32768).astype("<i2")
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event(Transcribe(language="en").event())
        await client.write_event(AudioStart(RATE_HZ, 2, 1).event())
        started = time.perf_counter()
        for start in range(0, len(pcm), CHUNK):
            until = started + (start + CHUNK) / RATE_HZ
            await asyncio.sleep(max(0.0, until - time.perf_counter()))
            block = pcm[start : start + CHUNK].tobytes()
            await client.write_event(AudioChunk(RATE_HZ, 2, 1, block).event())
        last_s, first_s = started + len(pcm) / RATE_HZ, 0.0
        await client.write_event(AudioStop().event())
        while (event := await client.read_event()) is not None:
            if event.type == "transcript-chunk":
                first_s = first_s or time.perf_counter()
            if event.type == "transcript":
                return first_s - last_s, Transcript.from_event(event).text
            if event.type == "error":
                raise SystemExit(f"serving: {event.data}")
    raise SystemExit("serving: the server left")


class Serving:
    """A server on loopback in a thread of this process; its Service has the model while it runs."""

    def __init__(self, model: Model):
        self._model, self._stop = model, asyncio.Event()
        self.wyoming_port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Serving:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        from edge_gemma.serve.bodies import Server
        from edge_gemma.serve.guard import Limits
        from edge_gemma.serve.service import Service
        from edge_gemma.serve.wyoming import Wyoming
        from edge_gemma.serve.wyoming_door import WyomingAddress, serving
        from edge_gemma.serve.wyoming_info import Senses

        self._loop = asyncio.get_running_loop()
        hears = self._model.bundle.manifest.audio is not None
        service = Service(self._model, n_urgent=1 if hears else 0)
        name = self._model.bundle.manifest.name
        wyoming = Wyoming(Server(service, Limits(output_tokens=8), name), Senses(hears))
        address = WyomingAddress(port=0)
        with ExitStack() as sockets:
            spoken = sockets.enter_context(address.open())
            async with serving(wyoming, address, spoken):
                self.wyoming_port = spoken.getsockname()[1]
                self._ready.set()
                await self._stop.wait()
                await service.close()


def tokens_in_process(model: Model, prompt: str) -> float:
    """Seconds a token, behind the first."""
    sampling = Sampling(max_tokens=N_TOKENS, temperature=0)
    times = []
    with model.session() as session:
        session.append(model.spans(prompt), prefill=False)
        for chunk in session.generate(sampling):
            if chunk.token_ids:
                times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


def tokens_over_http(url: str, name: str, prompt: str) -> float:
    import httpx

    body = {"model": name, "prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0}
    times = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and '"finish_reason":null' in line.replace(" ", ""):
                times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


def lanes(model: Model, prompts: list[str], together: bool) -> float:
    """Seconds a token, over all of them."""
    from edge_gemma.serve.answer import GenerationRequest
    from edge_gemma.serve.service import Service

    sampling = Sampling(max_tokens=N_TOKENS, temperature=0)  # who ends early counts for less

    async def answered(service: Service, prompt: str) -> int:
        async with service.submit(GenerationRequest(prompt=prompt, sampling=sampling)) as answer:
            return sum([len(chunk.token_ids) async for chunk in answer])

    async def run() -> float:
        service = Service(model)
        started = time.perf_counter()
        if together:
            counts = await asyncio.gather(*(answered(service, prompt) for prompt in prompts))
        else:
            counts = [await answered(service, prompt) for prompt in prompts]
        took_s = time.perf_counter() - started
        await service.close()
        return took_s / sum(counts)

    return asyncio.run(run())


def rows(model: Model, n_rounds: int) -> None:
    """Milliseconds of CPU for one pass of 1 … n_seq_max answers with their sampling; the best of
    the rounds. With one thread.
    """
    context, decoder = model.sequences.context, model.decoder
    n_most = context.settings.n_seq_max
    samplers = [decoder.sampler(model.sampling()) for _ in range(n_most)]
    lengths = [64] * n_most
    for sequence in range(n_most):
        context.decode(sequence, 0, Tokens(tuple(range(300, 364))))
    best = dict.fromkeys(range(1, n_most + 1), float("inf"))
    for number in range(n_rounds):
        for n in best:
            started = time.thread_time()
            context.decode_step([(s, lengths[s], (1000 + number,)) for s in range(n)])
            for sequence in range(n):
                samplers[sequence].sample(context.logits(sequence))
                lengths[sequence] += 1
            best[n] = min(best[n], time.thread_time() - started)
    print(json.dumps({f"{n} answers, ms": round(value * 1e3, 1) for n, value in best.items()}))
    for sampler in samplers:
        sampler.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="serving")
    parser.add_argument("what", choices=("speech", "tokens", "lanes", "rows"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of speech")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    n_lanes = {"lanes": 4, "rows": 4, "tokens": 1}.get(given.what, 2)
    request = PlanRequest(n_threads=given.threads, n_seq_max=n_lanes)
    direct: list[float] = []
    served: list[float] = []
    with ExitStack() as stack:
        model = stack.enter_context(load(given.bundle, n_ctx=1024, request=request))
        if given.what == "rows":
            rows(model, given.rounds)
            return
        if given.what == "tokens":  # a client has no part in the server's interpreter
            # the same threads, and nothing that the other way has not
            options = ("--threads", str(given.threads), "--no-drafts", "--no-prompt-cache")
            http = stack.enter_context(serving_process(given.bundle, *options))
        samples = voiced(given.seconds)
        for number in range(given.rounds + 1):
            prompt = f"{number} A board in the kitchen listens and"
            if given.what == "speech":
                one, text = in_process(model, samples)
                with Serving(model) as server:
                    other, same = over_wyoming(server.wyoming_port, samples)
                assert text == same, (text, same)
            elif given.what == "lanes":
                prompts = [f"{prompt} {n}" for n in range(n_lanes)]
                one, other = (lanes(model, prompts, together) for together in (False, True))
            else:
                one = tokens_in_process(model, prompt)
                other = tokens_over_http(http.url, http.name, prompt)
            print(
                f"{number}: {one * 1e3:.1f} ms in process, {other * 1e3:.1f} ms served", flush=True
            )
            if number:  # the first round warms up
                direct.append(one)
                served.append(other)
    ratios = [b / a for a, b in zip(direct, served, strict=True)]
    added = [b - a for a, b in zip(direct, served, strict=True)]
    figures = {
        "what": given.what,
        "rounds": given.rounds,
        "in_process_ms": round(statistics.median(direct) * 1e3, 2),
        "served_ms": round(statistics.median(served) * 1e3, 2),
        "ratio": round(statistics.median(ratios), 3),
        "added_ms": round(statistics.median(added) * 1e3, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
