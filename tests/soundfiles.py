"""Small writers of sound files for tests, byte by byte, and any container and codec of FFmpeg's."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

RATE_HZ = 16_000


def voice(seconds: float = 2.0, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Something like speech, ``[n]`` float32: a gliding voice in syllables, below 3 kHz."""
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    phase = 2 * np.pi * np.cumsum(140 + 40 * np.sin(2 * np.pi * 0.9 * t)) / rate_hz
    harmonics = sum(np.sin(k * phase + k) / k for k in range(1, 14))
    syllables = np.clip(np.sin(2 * np.pi * 2.3 * t) + 0.3, 0, 1)
    return (0.25 * harmonics * syllables).astype(np.float32)


def pcm(samples: np.ndarray) -> bytes:
    """16-bit little-endian."""
    return (samples * 32767).astype("<i2").tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)


def wav(
    data: bytes,
    *,
    riff_bytes: int | None = None,
    data_bytes: int | None = None,
    format: int = 1,
    channels: int = 1,
    rate_hz: int = RATE_HZ,
    bits: int = 16,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A WAV; the two sizes are what they should be unless given."""
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", format, channels, rate_hz, rate_hz * block, block, bits)
    size = len(data) if data_bytes is None else data_bytes
    body = b"WAVE" + chunk(b"fmt ", fmt) + before + b"data" + struct.pack("<I", size) + data + after
    riff = len(body) if riff_bytes is None else riff_bytes
    return b"RIFF" + struct.pack("<I", riff) + body


def rf64(data: bytes, *, riff_bytes: int, data_bytes: int, n_samples: int) -> bytes:
    fmt = struct.pack("<HHIIHH", 1, 1, RATE_HZ, RATE_HZ * 2, 2, 16)
    sizes = struct.pack("<QQQI", riff_bytes, data_bytes, n_samples, 0)
    body = b"WAVE" + chunk(b"ds64", sizes) + chunk(b"fmt ", fmt)
    return b"RF64" + b"\xff" * 4 + body + b"data" + b"\xff" * 4 + data


def encoded(samples: np.ndarray, format: str, subtype: str | None = None) -> bytes:
    """A file by libsndfile at 16 kHz."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE_HZ, format=format, subtype=subtype)
    return buffer.getvalue()


def ogg_pages(data: bytes) -> list[int]:
    """The offsets of an Ogg file's pages."""
    return [at for at in range(len(data)) if data.startswith(b"OggS\0", at)]


def write_av(
    path: Path,
    samples: np.ndarray,
    format: str,
    codec: str,
    rate_hz: int,
    layout: str,
    **options: str,
) -> None:
    """``samples [n]`` at 16 kHz by FFmpeg's muxer, with its ``options``, and encoder."""
    with av.open(str(path), "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=rate_hz)
        stream.layout = layout
        stream.bit_rate = 64_000 if layout == "mono" else 128_000
        if codec == "amr_nb" or "amrnb" in codec:
            stream.bit_rate = 12_200
        context = stream.codec_context
        context.open(strict=False)
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = RATE_HZ, Fraction(1, RATE_HZ), 0
        convert = av.AudioResampler(
            context.format.name, layout, rate_hz, frame_size=context.frame_size or 1024
        )
        for converted in (*convert.resample(frame), *convert.resample(None)):
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))


def likeness(heard: np.ndarray, original: np.ndarray) -> float:
    """The highest correlation of the two over all delays, 0 … 1."""
    n = len(heard) + len(original)
    spectrum = np.fft.rfft(heard, n) * np.conj(np.fft.rfft(original, n))
    peak = np.abs(np.fft.irfft(spectrum, n)).max()
    scale = np.linalg.norm(heard) * np.linalg.norm(original)
    return float(peak / scale) if scale else 0.0
