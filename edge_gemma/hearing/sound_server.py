"""The echo canceller of a sound server (PulseAudio, PipeWire): whether one is loaded, and how to
use it. Asked through ``pactl``, which speaks to both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from edge_gemma.errors import UsageError

_TIMEOUT_S = 5
_MARK = "echo-cancel"  # in the module's name, and in the names it gives its devices
LOAD = "pactl load-module module-echo-cancel aec_method=webrtc"


@dataclass(frozen=True)
class EchoCancelled:
    """A microphone and a loudspeaker whose echo the sound server takes out, by its names."""

    source: str
    sink: str


@dataclass(frozen=True)
class SoundServer:
    """``name`` as it calls itself; ``echo_cancelled`` None: its canceller is not loaded."""

    name: str
    echo_cancelled: EchoCancelled | None


def sound_server() -> SoundServer | None:
    """The running sound server, None where there is none or pactl is not installed."""
    facts = _pactl("info")
    if facts is None:
        return None
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("Server Name:")]
    sources = [name for name in _named("sources") if not name.endswith(".monitor")]
    sinks = _named("sinks")
    pair = EchoCancelled(sources[0], sinks[0]) if sources and sinks else None
    return SoundServer(names[0] if names else "sound server", pair)


def use(pair: EchoCancelled) -> None:
    """Let what this process opens from now on by default be that microphone and loudspeaker."""
    os.environ["PULSE_SOURCE"], os.environ["PULSE_SINK"] = pair.source, pair.sink


def require() -> EchoCancelled:
    """The server's pair. Raises UsageError where there is no server, or its canceller is not
    loaded.
    """
    server = sound_server()
    if server is None:
        raise UsageError(
            "no PulseAudio or PipeWire server answers (or pactl is not installed: on Debian type "
            "sudo apt-get install pulseaudio-utils); use --echo-cancel aec"
        )
    if server.echo_cancelled is None:
        raise UsageError(f"{server.name} has no echo canceller loaded. Type: {LOAD}")
    return server.echo_cancelled


def _named(kind: str) -> list[str]:
    """Names of the canceller's devices of that kind."""
    lines = _pactl("list", "short", kind) or []
    rows = [line.split("\t") for line in lines]
    return [row[1] for row in rows if len(row) > 2 and _MARK in row[1] + row[2]]


def _pactl(*arguments: str) -> list[str] | None:
    program = shutil.which("pactl")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env=os.environ | {"LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None
