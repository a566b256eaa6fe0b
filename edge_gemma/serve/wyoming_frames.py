"""Wyoming's frames and its sound, from a client that is not trusted.

In: bytes of a connection. Out: events, each bounded before memory is taken for it; and audio chunks
of any rate, width and number of channels as 16 kHz mono float32.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from wyoming.event import Event

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.hearing.mixing import Mixer
from edge_gemma.hearing.sound import Resampler
from edge_gemma.units import KiB

HEADER_BYTES = 64 * KiB
DATA_BYTES = 64 * KiB
PAYLOAD_BYTES = 512 * KiB  # 16 s of what Home Assistant sends; its chunks hold a tenth of a second
_BOUNDS = {"rate": (4000, 192_000), "width": (1, 4), "channels": (1, 8)}
_HTTP = re.compile(rb"[A-Z]{3,10} \S+ HTTP/\d")


class BadFrame(EdgeGemmaError):
    """What a client sent is no event, or too large for one."""


class OtherProtocol(BadFrame):
    """An HTTP request, on Wyoming's port."""


async def read_event(
    reader: asyncio.StreamReader, wait_s: float, begin_s: float | None = None
) -> Event | None:
    """The next event: it must begin within ``begin_s`` (None: whenever), and be there whole
    ``wait_s`` later. None when the client has gone between two events.

    Raises BadFrame, OtherProtocol, TimeoutError.
    """
    async with asyncio.timeout(begin_s):
        first = await reader.read(1)
    if not first:
        return None
    async with asyncio.timeout(wait_s):
        return await _rest(reader, first)


async def _rest(reader: asyncio.StreamReader, first: bytes) -> Event:
    try:
        line = first if first == b"\n" else first + await reader.readline()
    except ValueError:
        raise BadFrame(f"an event's first line is longer than {HEADER_BYTES} bytes") from None
    if _HTTP.match(line):
        raise OtherProtocol("an HTTP request came where Wyoming is spoken")
    if not line.endswith(b"\n"):
        raise BadFrame("the connection ended in the middle of an event")
    header = _object(line, "an event's first line")
    data = header.get("data") or {}
    if not isinstance(header.get("type"), str) or not isinstance(data, dict):
        raise BadFrame("an event is a JSON object with a type, and data that is an object")
    n_data = _length(header, "data_length", DATA_BYTES)
    n_payload = _length(header, "payload_length", PAYLOAD_BYTES)
    try:
        if n_data:
            data |= _object(await reader.readexactly(n_data), "an event's data")
        payload = await reader.readexactly(n_payload) if n_payload else None
    except asyncio.IncompleteReadError:
        raise BadFrame("the connection ended in the middle of an event") from None
    return Event(header["type"], data, payload)


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadFrame(f"{what} is not JSON; Wyoming's events are lines of JSON") from None
    if not isinstance(value, dict):
        raise BadFrame(f"{what} is not a JSON object")
    return value


def _length(header: Mapping[str, Any], name: str, n_most: int) -> int:
    n = header.get(name)
    if n is None:
        return 0
    if type(n) is not int or not 0 <= n <= n_most:
        raise BadFrame(f"{name} is {str(n)[:20]}; expected a number up to {n_most}")
    return n


class Format(NamedTuple):
    """Of PCM: ``width`` in bytes a sample."""

    rate: int
    width: int
    channels: int


def format_of(event: Event) -> Format:
    """Raises BadFrame."""
    values = []
    for name, (low, high) in _BOUNDS.items():
        value = event.data.get(name)
        if type(value) is not int or not low <= value <= high:
            raise BadFrame(f"the {name} of the sound is {value!r:.20}; expected {low} … {high}")
        values.append(value)
    return Format(*values)


class Pcm:
    """One stream of PCM → ``[n]`` float32 at 16 kHz.

    >>> Pcm(Format(16000, 2, 1)).push(bytes([0, 64, 0, 192])).tolist()
    [0.5, -0.5]
    """

    def __init__(self, form: Format):
        self.form = form
        self._mixer, self._resampler = Mixer(), Resampler(form.rate)
        self._part = b""  # of a frame

    def push(self, data: bytes) -> np.ndarray:
        data = self._part + data
        n = len(data) // (self.form.width * self.form.channels) * self.form.width
        n *= self.form.channels
        self._part = data[n:]
        samples = _samples(data[:n], self.form.width).reshape(-1, self.form.channels)
        return self._resampler.push(self._mixer.mono(samples))

    def finish(self) -> np.ndarray:
        """What the resampler held back."""
        return self._resampler.push(np.zeros(0, np.float32), last=True)


def _samples(data: bytes, width: int) -> np.ndarray:
    """Little-endian integers (unsigned where they have 8 bits) → float32 in [−1, 1)."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return padded.view("<i4")[:, 0].astype(np.float32) / 2**31
    return np.frombuffer(data, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
