"""Wyoming: the model as Home Assistant's ears, conversation and voice.

In: connections of clients that speak Wyoming (events as lines of JSON with sound behind them). Out:
events. One connection is one client, which asks for one thing after the other; the answers go
through the same queue, lanes and counters as those of HTTP. The protocol has neither tokens nor
encryption, so it stays on this machine unless it is told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioStop
from wyoming.error import Error
from wyoming.event import Event, Eventable, async_write_event
from wyoming.info import SelectProgram
from wyoming.ping import Ping, Pong
from wyoming.tts import Synthesize, SynthesizeChunk, SynthesizeStart, SynthesizeStop
from wyoming.wake import Detect

from edge_gemma.errors import EdgeGemmaError, ServiceBusy, UnsupportedModel, UsageError, first_line
from edge_gemma.serve.bodies import Server
from edge_gemma.serve.wyoming_asr import SILENCE_S, Asked, Transcription
from edge_gemma.serve.wyoming_frames import (
    HEADER_BYTES,
    BadFrame,
    Format,
    OtherProtocol,
    Pcm,
    format_of,
    read_event,
)
from edge_gemma.serve.wyoming_info import PROGRAM, Senses, info
from edge_gemma.serve.wyoming_talk import Conversations, Reading
from edge_gemma.serve.wyoming_wake import WakeWords

log = logging.getLogger("edge_gemma.serve")
_MAX_CONNECTIONS = 32
_LAST_READ_S = 2.0  # for a client to notice that it was told an error
_Parse = Callable[[Event], Any]
_Handle = Callable[[Any], Awaitable[None]]
_NOT_WYOMING = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
    b"This port speaks Wyoming (Home Assistant's voice protocol), not HTTP.\n"
)


class Wyoming:
    """The server of one or several sockets. Close it before the service."""

    def __init__(self, server: Server, senses: Senses, *, system: str | None = None):
        self.server, self.senses = server, senses
        self.conversations = Conversations(server, system)
        self._connections: set[asyncio.Task[None]] = set()
        self._closing = False
        self.info = info(server, senses).event()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """For ``asyncio.start_server``: one client, until it or the server leaves."""
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(self, reader, writer)
        if len(self._connections) >= _MAX_CONNECTIONS:
            await connection.refuse(f"{_MAX_CONNECTIONS} clients are connected already")
            return
        self._connections.add(task)
        try:
            with self.server.using():
                await connection.run()
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            self._connections.discard(task)

    async def close(self) -> None:
        self._closing = True
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


class _Connection:
    """One client."""

    def __init__(
        self, wyoming: Wyoming, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ):
        self._wyoming, self._reader, self._writer = wyoming, reader, writer
        self._wait_s = wyoming.server.limits.wait_s
        self._writing = asyncio.Lock()  # one event at a time
        self._asked: Asked | Detect = Asked(endpoint=wyoming.senses.endpoint)
        self._pcm: Pcm | None = None  # while a stream of sound is open
        self._ears: Transcription | WakeWords | None = None
        self._reading: Reading | None = None  # aloud, while its text still comes
        self._answering: asyncio.Task[None] | None = None
        self._handlers: dict[str, tuple[_Parse, _Handle]] = {
            "describe": (_itself, self._describe),
            "ping": (Ping.from_event, self._ping),
            "select-program": (SelectProgram.from_event, self._select),
            "transcribe": (Transcribe.from_event, self._transcribe),
            "detect": (Detect.from_event, self._detect),
            "audio-start": (format_of, self._open_ears),
            "audio-chunk": (_itself, self._audio_chunk),
            "audio-stop": (AudioStop.from_event, self._audio_stop),
            "transcript": (Transcript.from_event, self._transcript),
            "synthesize": (Synthesize.from_event, self._synthesize),
            "synthesize-start": (SynthesizeStart.from_event, self._synthesize_start),
            "synthesize-chunk": (SynthesizeChunk.from_event, self._synthesize_chunk),
            "synthesize-stop": (SynthesizeStop.from_event, self._synthesize_stop),
        }

    async def run(self) -> None:
        try:
            while (event := await self._next_event()) is not None:
                if event.type in self._handlers:  # clients send what older servers do not know
                    parse, handle = self._handlers[event.type]
                    await handle(_parsed(parse, event))
        except OtherProtocol:
            self._writer.write(_NOT_WYOMING)
            await self._close_writer()
        except (EdgeGemmaError, TimeoutError) as error:
            await self._fail(error)
        except OSError:
            pass  # the client has gone
        except Exception as error:
            await self._fail(error)
        finally:
            self._leave()
            await self._close_writer()

    async def _next_event(self) -> Event | None:
        """A client may be silent as long as it likes, but not in the middle of a stream."""
        begin_s = None if self._pcm is None else self._wait_s
        return await read_event(self._reader, self._wait_s, begin_s)

    async def refuse(self, reason: str) -> None:
        await self._fail(ServiceBusy(reason))
        await self._close_writer()

    async def _send(self, event: Eventable) -> None:
        """Raises OSError (the client has gone), TimeoutError (it takes nothing)."""
        await self._write(event.event())

    async def _write(self, event: Event) -> None:
        async with self._writing, asyncio.timeout(self._wait_s):
            await async_write_event(event, self._writer)

    async def _fail(self, error: BaseException) -> None:
        """Tell the client what went wrong, and leave: where a stream is broken, nothing that
        follows would mean anything.
        """
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            self._writer.close()
            return
        with contextlib.suppress(OSError, TimeoutError):
            await self._send(_told(error))
            self._writer.write_eof()
            async with asyncio.timeout(_LAST_READ_S):
                # closing with sound unread would take the error back before it is read
                while await self._reader.read(HEADER_BYTES):
                    pass
        self._writer.close()

    async def _close_writer(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LAST_READ_S):
                await self._writer.wait_closed()

    def _leave(self) -> None:
        """Nobody reads any more: stop what runs for this client."""
        if self._ears is not None:
            self._ears.close()
        if self._answering is not None:
            self._answering.cancel()

    # what clients ask

    async def _describe(self, event: Event) -> None:
        await self._write(self._wyoming.info)

    async def _ping(self, ping: Ping) -> None:
        await self._send(Pong(text=ping.text))

    async def _select(self, program: SelectProgram) -> None:
        if program.name != PROGRAM:
            raise UsageError(f"no program {str(program.name)[:40]!r} here; there is {PROGRAM!r}")

    async def _transcribe(self, asked: Transcribe) -> None:
        sensitivity = asked.vad_sensitivity
        name = str(getattr(sensitivity, "value", sensitivity) or "default")
        endpoint = self._wyoming.senses.endpoint or sensitivity is not None
        if name not in SILENCE_S:
            raise UsageError(f"vad_sensitivity is {name[:20]!r}; expected {', '.join(SILENCE_S)}")
        if not isinstance(asked.language, str | None):
            raise UsageError(f"language is {str(asked.language)[:20]}; expected a code like en")
        self._asked = Asked(asked.language, endpoint, SILENCE_S[name])

    async def _detect(self, asked: Detect) -> None:
        names = asked.names or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError("names of wake words are a list of texts")
        self._asked = asked

    # sound

    async def _open_ears(self, form: Format) -> None:
        if self._ears is not None:
            await self._ears.wait()  # the stream before is written down first
            self._ears.close()
        wyoming = self._wyoming
        if isinstance(self._asked, Detect):
            known = list(wyoming.senses.wake_words)
            if not known:
                raise UsageError("no wake words are installed: pip install 'edge-gemma[voice]'")
            self._ears = WakeWords(self._asked.names or [], known, self._send)
        elif not wyoming.senses.hears:
            raise UnsupportedModel(f"{wyoming.server.name} cannot hear: it has no audio encoder")
        else:
            self._ears = Transcription(wyoming.server, self._asked, self._send, self._fail)
        self._pcm = Pcm(form)

    async def _audio_chunk(self, event: Event) -> None:
        """A chunk behind the stop begins no stream of its own; it is left out."""
        if self._pcm is None or self._ears is None:
            return
        form = format_of(event)
        if form != self._pcm.form:
            raise BadFrame(f"the sound changed from {self._pcm.form} to {form} within a stream")
        await self._ears.push(self._pcm.push(event.payload or b""))

    async def _audio_stop(self, event: AudioStop) -> None:
        pcm, self._pcm = self._pcm, None
        if pcm is not None and self._ears is not None:
            await self._ears.push(pcm.finish())
            await self._ears.finish()

    # text

    async def _transcript(self, said: Transcript) -> None:
        context = said.context if isinstance(said.context, dict) else None
        await self._begin(self._wyoming.conversations.answer(said.text, context, self._send))

    async def _synthesize(self, asked: Synthesize) -> None:
        if self._reading is not None:
            return  # the whole text once more, for servers that take it only so
        reading = self._new_reading(asked)

        async def read() -> None:
            await reading.push(asked.text)
            await reading.finish(streamed=False)

        await self._begin(read())

    async def _synthesize_start(self, asked: SynthesizeStart) -> None:
        self._reading = self._new_reading(asked)

    def _new_reading(self, asked: Synthesize | SynthesizeStart) -> Reading:
        if asked.text_format not in (None, "text"):
            raise UsageError("only plain text is read aloud here")
        voices = self._wyoming.senses.voices
        if not voices:
            raise UsageError("no voice is installed here; on Debian: apt-get install espeak-ng")
        return Reading(asked.voice, voices, self._send)

    async def _synthesize_chunk(self, chunk: SynthesizeChunk) -> None:
        if self._reading is not None:
            await self._reading.push(chunk.text)

    async def _synthesize_stop(self, event: SynthesizeStop) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            await self._begin(reading.finish(streamed=True))

    async def _begin(self, answering: Coroutine[Any, Any, None]) -> None:
        """Answer beside the reading of events, so that a client that leaves is noticed."""
        if self._answering is not None:
            await self._answering
        self._answering = asyncio.create_task(self._told_errors(answering))

    async def _told_errors(self, answering: Coroutine[Any, Any, None]) -> None:
        try:
            await answering
        except Exception as error:
            await self._fail(error)


def _itself(event: Event) -> Event:
    return event


def _parsed(parse: _Parse, event: Event) -> Any:
    try:
        return parse(event)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, EdgeGemmaError):
            raise
        what = f"{type(error).__name__}: {first_line(error)}"
        raise BadFrame(f"the event {event.type[:40]!r} cannot be read ({what})") from None


def _told(error: BaseException) -> Error:
    """What a client is told; the text of a fault of ours stays in the log."""
    if isinstance(error, TimeoutError):
        return Error("nothing came in time", code="timeout")
    if isinstance(error, ServiceBusy):
        return Error(str(error), code="busy")
    if isinstance(error, BadFrame):
        return Error(str(error), code="bad-event")
    if isinstance(error, EdgeGemmaError):
        return Error(str(error), code="refused")
    log.error("a Wyoming client's request failed", exc_info=error)
    return Error("the server failed on this request; see its log", code="failed")
