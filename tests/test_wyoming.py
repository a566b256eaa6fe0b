"""Wyoming, by the protocol's own client library; and as Home Assistant uses it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import command
from serving import serving as serving_process
from test_serve import make_speech

import edge_gemma
from edge_gemma.conversation.transcription import transcribe
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.hearing.sound import read_audio
from edge_gemma.hearing.utterances import VadSettings
from edge_gemma.options import Sampling
from edge_gemma.serve.bodies import Server
from edge_gemma.serve.guard import Limits

pytest.importorskip("wyoming")
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient, AsyncTcpClient, AsyncUnixClient
from wyoming.event import Event
from wyoming.handle import Handled
from wyoming.info import Describe, Info, SelectProgram
from wyoming.ping import Ping
from wyoming.tts import (
    Synthesize,
    SynthesizeChunk,
    SynthesizeStart,
    SynthesizeStop,
    SynthesizeVoice,
)
from wyoming.wake import Detect, Detection

from edge_gemma.serve.service import Service
from edge_gemma.serve.wyoming import Wyoming, _parsed
from edge_gemma.serve.wyoming_door import WyomingAddress, serving
from edge_gemma.serve.wyoming_frames import BadFrame, format_of, read_event
from edge_gemma.serve.wyoming_info import Senses, installed_voices, installed_wake_words

LIMITS = Limits(output_tokens=8, wait_s=5.0)
HEARS = Senses(True)
needs_espeak = pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng")


@pytest.fixture(scope="module")
def hearing(hearing_bundle):
    """The reference Gemma 3n that hears, with two sequences."""
    request = edge_gemma.PlanRequest(n_threads=1, n_seq_max=2)
    with edge_gemma.load(hearing_bundle, n_ctx=1024, request=request) as model:
        yield model


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """What speech detection takes for speech, twice with a pause: ``[n]`` at 16 kHz."""
    return read_audio(make_speech(tmp_path_factory.mktemp("speech") / "speech.wav"))


@contextlib.asynccontextmanager
async def opened(model, senses=HEARS, limits=LIMITS, path=None, system=None):
    """A server on a free port (or a path) → how to connect, and the service."""
    n_urgent = 1 if model.plan.settings.n_seq_max > 1 else 0
    service = Service(model, n_urgent=n_urgent)
    uri = f"unix://{path}" if path else "tcp://127.0.0.1:0"
    address = WyomingAddress.parse(uri)
    wyoming = Wyoming(Server(service, limits, "gemma"), senses, system=system)
    with address.open() as bound:
        async with serving(wyoming, address, bound):
            port = address.bound(bound).port

            def client() -> AsyncClient:
                return AsyncUnixClient(path) if path else AsyncTcpClient("127.0.0.1", port)

            yield client, service, port
        assert await service.close(timeout_s=5)


def run(talk, model, *given, **options):
    """``talk(client, service, port)`` against a server."""

    async def run():
        async with opened(model, **options) as door:
            return await asyncio.wait_for(talk(*door, *given), 60)

    return asyncio.run(run())


def pcm(samples):
    return (np.clip(samples, -1, 0.9999) * 32768).astype("<i2").tobytes()


async def say(client, samples, n=1024, stop=True, **asked):
    await client.write_event(Transcribe(**asked).event())
    await client.write_event(AudioStart(16000, 2, 1).event())
    for start in range(0, len(samples), n):
        block = pcm(samples[start : start + n])
        await client.write_event(AudioChunk(16000, 2, 1, block).event())
    if stop:
        await client.write_event(AudioStop().event())


async def until(client, kind):
    """Events up to one of this type."""
    events = []
    while True:
        event = await client.read_event()
        assert event is not None, [each.type for each in events]
        events.append(event)
        if event.type == kind:
            return events


async def failed(client):
    """The error that ends the connection."""
    events = await until(client, "error")
    assert await client.read_event() is None
    return events[-1].data


def direct(model, samples, language="English"):
    """What the library writes down of it."""
    instruction = f"Transcribe the following speech segment in {language}:"
    sampling = Sampling(max_tokens=8, temperature=0)
    options = edge_gemma.ListenOptions(
        sampling=sampling, vad=VadSettings(end_s=0.7), pad_audio=False
    )
    with model.chat() as chat:
        blocks = [samples[i : i + 1024] for i in range(0, len(samples), 1024)]
        blocks = [np.frombuffer(pcm(b), "<i2").astype(np.float32) / 32768 for b in blocks]
        found = [segment.text for segment in transcribe(chat, blocks, instruction, options)]
    assert len(found) == 2
    return found


# --- Home Assistant's flows, event for event ---


@pytest.mark.compat(
    kind="client",
    what="Home Assistant's wyoming integration",
    happens="its info is accepted",
)
def test_home_assistant_is_told_what_it_asks_for(hearing):
    async def talk(client, service, port):
        async with client() as c:
            await c.write_event(Describe().event())
            return Info.from_event(await asyncio.wait_for(c.read_event(), 5))

    voices = {"en": "English", "de": "German"}
    info = run(talk, hearing, senses=Senses(True, voices=voices, wake_words={"alexa": "alexa"}))
    # what its platforms read when they are set up
    assert info.asr[0].installed and info.asr[0].name == "edge-gemma"
    languages = {
        code for model in info.asr[0].models if model.installed for code in model.languages
    }
    assert {"en", "de", "fr"} <= languages
    assert info.asr[0].supports_transcript_streaming and info.asr[0].requires_external_vad
    assert info.handle[0].models[0].languages and info.handle[0].supports_handled_streaming
    assert not info.handle[0].supports_home_control and info.intent == []
    assert [voice.languages for voice in info.tts[0].voices] == [["en"], ["de"]]
    assert info.tts[0].supports_synthesize_streaming
    assert info.wake[0].models[0].phrase == "alexa"
    for program in (*info.asr, *info.handle, *info.tts, *info.wake):
        assert program.attribution.name and program.description and program.version
    deaf = run(talk, hearing, senses=Senses(False))
    assert (deaf.asr, deaf.tts, deaf.wake) == ([], [], []) and deaf.handle


@pytest.mark.compat(
    kind="client",
    what="Home Assistant's speech to text over Wyoming",
    happens="whole and streamed",
)
def test_home_assistant_has_speech_written_down(hearing, speech):
    async def talk(client, service, port):
        async with client() as c:
            await say(c, speech, language="en")
            return await until(c, "transcript-stop"), service.health()

    events, health = run(talk, hearing)
    kinds = [event.type for event in events]
    assert kinds[0] == "transcript-start" and kinds[-2:] == ["transcript", "transcript-stop"]
    assert set(kinds[1:-2]) == {"transcript-chunk"}
    expected = direct(hearing, speech)
    transcript = Transcript.from_event(events[-2])
    assert transcript.text == " ".join(text for text in expected if text)
    assert transcript.language == "en"
    assert "".join(event.data["text"] for event in events[1:-2]) == transcript.text
    # the same queue and counters as for HTTP
    assert health.n_answered == 2 and health.prompt_tokens > 0


@pytest.mark.compat(
    kind="client",
    what="Home Assistant's conversation over Wyoming",
    happens="answered in turns",
)
def test_home_assistant_talks(hearing):
    async def ask(client, text, name):
        async with client() as c:
            said = Transcript(text, context={"conversation_id": name}, language="en")
            await c.write_event(said.event())
            return await until(c, "handled-stop")

    async def talk(client, service, port):
        first = await ask(client, "Hello", "a")
        n = service.health().prompt_tokens
        second = await ask(client, "And then?", "a")
        n_second = service.health().prompt_tokens - n
        other = await ask(client, "And then?", "b")
        return first, second, other, n, n_second

    first, second, other, n, n_second = run(talk, hearing, system="Be brief.")
    kinds = [event.type for event in first]
    assert kinds[0] == "handled-start" and kinds[-2:] == ["handled", "handled-stop"]
    handled = Handled.from_event(first[-2])
    assert "".join(event.data["text"] for event in first[1:-2]) == handled.text
    assert handled.context == {"conversation_id": "a"}
    assert n_second > n  # the first turn is part of the second's prompt
    with hearing.chat(system="Be brief.") as chat:
        sampling = hearing.sampling(max_tokens=8)
        assert list(chat.send("Hello", sampling))  # sampled: only that it is answered
    assert Handled.from_event(other[-2]).context == {"conversation_id": "b"}


@needs_espeak
@pytest.mark.compat(
    kind="client",
    what="Home Assistant's text to speech over Wyoming",
    happens="whole and streamed",
)
def test_home_assistant_has_text_read_aloud(tiny_model):
    async def talk(client, service, port):
        async with client() as c:
            voice = SynthesizeVoice(language="en")
            await c.write_event(Synthesize("Hello there. And more.", SynthesizeVoice("en")).event())
            whole = await until(c, "audio-stop")
        async with client() as c:  # pieces, and the whole once more for older servers
            await c.write_event(SynthesizeStart(voice=voice).event())
            for piece in ("Hello the", "re. And", " more."):
                await c.write_event(SynthesizeChunk(piece).event())
            await c.write_event(Synthesize("Hello there. And more.", voice).event())
            await c.write_event(SynthesizeStop().event())
            return whole, await until(c, "synthesize-stopped")

    whole, streamed = run(talk, tiny_model, senses=Senses(False, voices=installed_voices()))

    def sound(events):
        starts = [event for event in events if event.type == "audio-start"]
        assert len(starts) == 1 and events[0] is starts[0]
        start = AudioStart.from_event(starts[0])
        assert (start.width, start.channels) == (2, 1)
        chunks = [AudioChunk.from_event(e).audio for e in events if e.type == "audio-chunk"]
        return start.rate, b"".join(chunks)

    rate_hz, data = sound(whole)
    assert len(data) / 2 / rate_hz > 0.5 and np.frombuffer(data, "<i2").any()
    assert sound(streamed) == (rate_hz, data)
    assert [event.type for event in streamed[-2:]] == ["audio-stop", "synthesize-stopped"]


def test_a_wake_word_is_waited_for(tiny_model, speech):
    words = installed_wake_words()
    if not words:
        pytest.skip("pymicro-wakeword")

    async def talk(client, service, port):
        async with client() as c:
            await c.write_event(Detect(names=["okay_nabu"]).event())
            await c.write_event(AudioStart(16000, 2, 1).event())
            await c.write_event(AudioChunk(16000, 2, 1, pcm(speech[:32000])).event())
            await c.write_event(AudioStop().event())
            quiet = (await until(c, "not-detected"))[-1]
            await c.write_event(Detect(names=["nobody"]).event())
            await c.write_event(AudioStart(16000, 2, 1).event())
            return quiet, await failed(c)

    quiet, error = run(talk, tiny_model, senses=Senses(False, wake_words=words))
    assert quiet.data == {} and "okay_nabu" in error["text"]


@needs_espeak
def test_a_wake_word_is_heard(tiny_model):
    """Said by espeak-ng, which nobody would take for a person; one of the words is heard."""
    words = installed_wake_words()
    if not words:
        pytest.skip("pymicro-wakeword")
    from edge_gemma.conversation.voice import espeak
    from edge_gemma.hearing.sound import Resampler

    silence = np.zeros(16000, np.float32)
    said = []
    for text in ("Alexa", "Hey Jarvis", "Okay Nabu", "Hey Mycroft"):
        for voice in ("en-us", "en"):
            samples, rate_hz = espeak(voice, 140)(text)
            said += [Resampler(rate_hz).push(samples, last=True), silence]

    async def talk(client, service, port):
        async with client() as c:
            await c.write_event(Detect().event())
            await c.write_event(AudioStart(16000, 2, 1).event())
            sound = np.concatenate([silence, *said])
            for start in range(0, len(sound), 1600):
                block = pcm(sound[start : start + 1600])
                await c.write_event(AudioChunk(16000, 2, 1, block).event())
            await c.write_event(AudioStop().event())
            await c.write_event(Ping("done").event())
            return await until(c, "pong")

    events = run(talk, tiny_model, senses=Senses(False, wake_words=words))
    found = [Detection.from_event(event) for event in events if event.type == "detection"]
    assert {each.name for each in found} <= set(words)
    assert all(each.timestamp > 0 for each in found)
    if not found:
        assert [event.type for event in events] == ["not-detected", "pong"]


# --- streams ---


def test_the_end_of_speech_ends_the_transcript_where_it_is_asked_for(hearing, speech):
    """The client goes on sending, as a microphone does."""

    async def talk(client, service, port, **asked):
        async with client() as c:
            await say(c, speech, stop=False, language="en", **asked)
            events = await until(c, "transcript-stop")
            await c.write_event(AudioChunk(16000, 2, 1, pcm(speech)).event())
            await c.write_event(AudioStop().event())
            await c.write_event(Ping("still here").event())
            more = await until(c, "pong")
        return Transcript.from_event(events[-2]).text, [event.type for event in more]

    async def asked(*door):
        return await talk(*door, vad_sensitivity="default")

    first = direct(hearing, speech)[0]
    assert run(asked, hearing) == (first, ["pong"])
    assert run(talk, hearing, senses=Senses(True, endpoint=True)) == (first, ["pong"])


@pytest.mark.parametrize(
    "rate, width, channels", [(48000, 2, 2), (16000, 4, 1), (16000, 3, 1), (8000, 1, 1)]
)
def test_any_sound_is_made_16_khz(hearing, speech, rate, width, channels):
    import soxr

    samples = soxr.resample(speech, 16000, rate)
    frames = np.repeat(samples[:, None], channels, axis=1)
    if width == 1:
        data = (frames * 127 + 128).astype(np.uint8).tobytes()
    else:
        scaled = (frames * 2**31 * 0.999).astype("<i4")
        data = scaled.view(np.uint8).reshape(-1, 4)[:, 4 - width :].tobytes()

    async def talk(client, service, port):
        async with client() as c:
            await c.write_event(Transcribe(language="en").event())
            await c.write_event(AudioStart(rate, width, channels).event())
            for start in range(0, len(data), 5003):  # never whole frames
                block = data[start : start + 5003]
                await c.write_event(AudioChunk(rate, width, channels, block).event())
            await c.write_event(AudioStop().event())
            return await until(c, "transcript"), service.health()

    events, health = run(talk, hearing)
    assert health.n_answered == 2 and Transcript.from_event(events[-1]).text


def test_several_streams_on_one_connection_and_on_several(hearing, speech):
    async def one(client, n_streams):
        async with client() as c:
            texts = []
            for _ in range(n_streams):
                await say(c, speech, language="en")
                events = await until(c, "transcript-stop")
                texts.append(Transcript.from_event(events[-2]).text)
            return texts

    async def talk(client, service, port):
        return await asyncio.gather(one(client, 2), one(client, 1))

    texts = run(talk, hearing)
    assert {text for each in texts for text in each} == {
        " ".join(filter(None, direct(hearing, speech)))
    }


def test_silence_is_an_empty_transcript(hearing):
    async def talk(client, service, port):
        async with client() as c:
            await say(c, np.zeros(16000, np.float32))
            return await until(c, "transcript-stop")

    events = run(talk, hearing)
    assert [event.type for event in events] == ["transcript-start", "transcript", "transcript-stop"]
    assert events[1].data["text"] == ""


def test_a_unix_socket(hearing, tmp_path):
    path = tmp_path / "wyoming.sock"

    async def talk(client, service, port):
        async with client() as c:
            await c.write_event(Ping("a").event())
            with pytest.raises(RuntimeFailure, match="another program"):
                WyomingAddress.parse(f"unix://{path}").open()
            return (await c.read_event()).type

    assert run(talk, hearing, path=str(path)) == "pong"
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with WyomingAddress.parse(f"unix://{path}").open() as taken_over:  # its server has gone
        assert taken_over.getsockname() == str(path)


# --- what should not come ---


def test_a_bundle_that_cannot_hear_says_so(tiny_model, speech):
    async def talk(client, service, port):
        async with client() as c:
            await c.write_event(Transcribe().event())
            await c.write_event(AudioStart(16000, 2, 1).event())
            return await failed(c)

    error = run(talk, tiny_model, senses=Senses(False))
    assert error["code"] == "refused" and "cannot hear" in error["text"]


def test_a_client_that_leaves_stops_what_runs_for_it(hearing, speech):
    async def gone(service):
        while service.health().n_running or service.health().n_waiting:
            await asyncio.sleep(0.005)

    async def talk(client, service, port):
        async with client() as c:  # in the middle of an utterance
            await say(c, speech[:40000], stop=False)
            while not service.health().n_running:
                await asyncio.sleep(0.005)
        await gone(service)
        n = service.health().n_cancelled
        async with client() as c:  # in the middle of an answer
            await c.write_event(Transcript("Hello").event())
            await until(c, "handled-start")
        await gone(service)
        return n, service.health()

    n, health = run(talk, hearing, limits=Limits(wait_s=5.0))
    assert n == 1 and health.n_cancelled == 2 and health.completion_tokens < 100


def test_a_client_that_falls_silent_in_the_middle_is_let_go(hearing, speech):
    async def talk(client, service, port):
        async with client() as c:
            await say(c, speech[:40000], stop=False)
            error = await failed(c)
        while service.health().n_running:
            await asyncio.sleep(0.005)
        return error

    assert run(talk, hearing, limits=Limits(wait_s=0.3))["code"] == "timeout"


AUDIO = b'{"type": "audio-start", "data": {"rate": %d, "width": %d, "channels": %d}}\n'
BROKEN = {
    "no JSON": b"hello\n",
    "a list": b"[1]\n",
    "no type": b'{"data": {}}\n',
    "data that is no object": b'{"type": "ping", "data": [1]}\n',
    "nested": b"[" * 60000 + b"\n",
    "a long line": b'{"type": "' + b"x" * 70000 + b'"}\n',
    "half a line": b'{"type": "pi',
    "half of the data": b'{"type": "ping", "data_length": 10}\n{}',
    "huge data": b'{"type": "ping", "data_length": 99999999999}\n',
    "huge sound": b'{"type": "audio-chunk", "payload_length": 4294967296}\n',
    "a negative length": b'{"type": "ping", "data_length": -5}\n',
    "a length that is text": b'{"type": "ping", "payload_length": "9"}\n',
    "a length that is true": b'{"type": "ping", "payload_length": true}\n',
    "data that is no JSON": b'{"type": "ping", "data_length": 3}\nabc',
    "no rate": b'{"type": "audio-start", "data": {}}\n',
    "an absurd rate": AUDIO % (1e9, 2, 1),
    "no channels": AUDIO % (16000, 2, 0),
    "wide": AUDIO % (16000, 9, 1),
    "no text": b'{"type": "transcript"}\n',
    "a text that is a number": b'{"type": "transcript", "data": {"text": 7}}\n',
    "a blank text": b'{"type": "transcript", "data": {"text": " "}}\n',
    "a long text": b'{"type": "transcript", "data": {"text": "' + b"a" * 20000 + b'"}}\n',
    "a language that is a number": b'{"type": "transcribe", "data": {"language": 7}}\n',
    "a sensitivity of its own": b'{"type": "transcribe", "data": {"vad_sensitivity": "x"}}\n',
    "an unknown program": b'{"type": "select-program", "data": {"name": "whisper"}}\n',
    "names that are none": b'{"type": "detect", "data": {"names": "alexa"}}\n',
    "an unknown voice": b'{"type": "synthesize", "data": {"text": "a", "voice": {"name": "?"}}}\n',
    "a voice that is none": b'{"type": "synthesize", "data": {"text": "a", "voice": 3}}\n',
    "markup": b'{"type": "synthesize", "data": {"text": "a", "text_format": "ssml"}}\n',
}


def test_what_is_broken_is_told_and_ends_the_connection(hearing):
    async def answer(port, data):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        if not data.endswith(b"\n"):
            writer.write_eof()
        line = await asyncio.wait_for(reader.readline(), 10)
        header = json.loads(line)
        error = json.loads(await reader.readexactly(header["data_length"]))
        rest = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return header["type"], error, rest

    async def talk(client, service, port):
        found = {name: await answer(port, data) for name, data in BROKEN.items()}
        async with client() as c:
            await c.write_event(Ping("a").event())
            assert (await c.read_event()).type == "pong"
        return found

    found = run(talk, hearing, senses=Senses(True, voices={"en": "English"}))
    for name, (kind, error, rest) in found.items():
        assert kind == "error" and not rest, name
        assert error["code"] in ("bad-event", "refused"), (name, error)
        assert len(error["text"]) < 200, (name, error)


FIELDS = st.sampled_from(
    ("type", "data", "data_length", "payload_length", "rate", "width", "channels", "text", "name")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=8,
)
LINES = st.dictionaries(FIELDS, VALUES, max_size=6).map(lambda line: json.dumps(line).encode())


@given(st.lists(st.one_of(st.binary(max_size=60), LINES), max_size=4).map(b"\n".join))
def test_bytes_of_any_kind_are_events_or_refused(data):
    async def read():
        reader = asyncio.StreamReader(limit=1024)
        reader.feed_data(data)
        reader.feed_eof()
        while (event := await read_event(reader, 5.0)) is not None:
            assert isinstance(event.type, str) and isinstance(event.data, dict)
            for parse in (format_of, Transcribe.from_event, Transcript.from_event):
                with contextlib.suppress(BadFrame):
                    _parsed(parse, event)

    with contextlib.suppress(BadFrame):
        asyncio.run(read())


def test_http_on_wyomings_port(hearing):
    import httpx

    async def talk(client, service, port):
        async with httpx.AsyncClient() as http:
            return await http.get(f"http://127.0.0.1:{port}/v1/models")

    response = run(talk, hearing)
    assert response.status_code == 400 and "Wyoming" in response.text


def test_events_that_mean_nothing_here_are_left_out(hearing, speech):
    async def talk(client, service, port):
        async with client() as c:
            await c.write_event(Event("from-the-future", {"a": 1}, b"xyz"))
            await c.write_event(AudioChunk(16000, 2, 1, b"\0" * 64).event())  # before a start
            await c.write_event(AudioStop().event())
            await c.write_event(SynthesizeChunk("a").event())
            await c.write_event(SynthesizeStop().event())
            await c.write_event(SelectProgram("edge-gemma").event())
            await say(c, speech, language="en")
            await c.write_event(AudioChunk(16000, 2, 1, pcm(speech)).event())  # behind the stop
            return await until(c, "transcript-stop")

    events = run(talk, hearing)
    assert [event.type for event in events].count("transcript") == 1


def test_a_format_that_changes_within_a_stream(hearing):
    async def talk(client, service, port):
        async with client() as c:
            await c.write_event(AudioStart(16000, 2, 1).event())
            await c.write_event(AudioChunk(48000, 2, 1, b"\0" * 64).event())
            return await failed(c)

    assert "changed" in run(talk, hearing)["text"]


def test_a_queue_that_is_full_is_told(hearing, speech):
    from edge_gemma.serve.answer import GenerationRequest

    async def talk(client, service, port):
        endless = Sampling(max_tokens=600, grammar="root ::= [a-z] root")
        service.max_waiting = 0
        request = GenerationRequest(prompt="a", sampling=endless, urgent=True)
        busy = [service.submit(request) for _ in range(2)]
        await anext(busy[1])
        async with client() as c:
            await say(c, speech)
            error = await failed(c)
        for answer in busy:
            answer.cancel()
        return error

    error = run(talk, hearing)
    assert error["code"] == "busy"


def test_addresses():
    for uri in ("10300", "http://127.0.0.1:1", "tcp://", "tcp://a:99999", "tcp://a:1/b", "unix://"):
        with pytest.raises(UsageError, match="expected tcp://"):
            WyomingAddress.parse(uri)
    for uri in ("tcp://0.0.0.0:10300", "tcp://192.168.1.2:10300", "tcp://[::]:10300"):
        with pytest.raises(UsageError, match="neither tokens nor encryption"):
            WyomingAddress.parse(uri)
        assert WyomingAddress.parse(uri, to_network=True).port == 10300
    with pytest.raises(UsageError, match="this machine only"):
        WyomingAddress.parse("tcp://localhost:1", discoverable="gemma")
    with pytest.raises(UsageError, match="discovered"):
        WyomingAddress.parse("unix:///a", discoverable="gemma")
    assert str(WyomingAddress.parse("tcp://[::1]")) == "tcp://[::1]:10300"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeFailure, match=f"{port}.*another program"):
            WyomingAddress.parse(f"tcp://127.0.0.1:{port}").open()


def test_the_command_speaks_wyoming_too(tiny_bundle):
    """No ears: that is said at the start; a conversation is cut off by SIGTERM."""
    with running("tcp://127.0.0.1:0", tiny_bundle) as (server, port):
        assert "no tokens, no encryption" in server.said and "does not hear" in server.said

        async def talk():
            async with AsyncTcpClient("127.0.0.1", port) as c:
                await c.write_event(Describe().event())
                info = Info.from_event(await c.read_event())
                await c.write_event(Transcript("Hello").event())
                await until(c, "handled-start")
                server.process.terminate()
                kinds = []
                while (event := await c.read_event()) is not None:
                    kinds.append(event.type)
            return info, kinds

        info, kinds = asyncio.run(asyncio.wait_for(talk(), 30))
        assert info.asr == [] and info.handle[0].models[0].name == server.name
        assert kinds[-1] in ("handled-stop", "error")
        assert server.process.wait(20) == 0


@contextlib.contextmanager
def running(uri, bundle, *options):
    with serving_process(bundle, "--wyoming", uri, "--stop-seconds", "0.05", *options) as server:
        [port] = re.findall(r"wyoming: tcp://127.0.0.1:(\d+)", server.said)
        yield server, int(port)


def test_wyoming_for_everybody_is_refused_before_anything_is_loaded(tiny_bundle):
    for options, reason in (
        (("--wyoming", "tcp://0.0.0.0:10300"), "neither tokens nor encryption"),
        (("--zeroconf", "gemma"), "need --wyoming"),
        (("--wyoming", "10300"), "tcp://127.0.0.1:10300"),
    ):
        refused = subprocess.run(
            command(tiny_bundle, "--port", "0", *options), capture_output=True, text=True
        )
        assert refused.returncode == 2 and reason in refused.stderr, refused.stderr


def test_home_assistant_can_discover_it():
    """Told to the network by multicast DNS, and taken back; asked for by another resolver."""
    from zeroconf.asyncio import AsyncZeroconf

    address = WyomingAddress.parse("tcp://0.0.0.0:0", to_network=True, discoverable="edge-gemma-t")
    name = "edge-gemma-t._wyoming._tcp.local."

    async def talk():
        wyoming = SimpleNamespace(connected=None, close=lambda: asyncio.sleep(0))
        network = AsyncZeroconf()
        with address.open() as bound:
            async with serving(wyoming, address, bound):
                found = await network.async_get_service_info("_wyoming._tcp.local.", name, 3000)
        port = bound and found and found.port
        await network.async_close()
        return found, port

    try:
        found, port = asyncio.run(talk())
    except (RuntimeFailure, OSError) as error:
        pytest.skip(f"no network: {error}")
    if found is None:
        pytest.skip("no multicast here")
    assert port and found.parsed_addresses()
