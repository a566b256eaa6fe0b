"""A virtual microphone: a separate PulseAudio server with a null sink whose monitor is the default
source.

The server and its clients get another environment (HOME, XDG_RUNTIME_DIR), so no sound server of
the user is touched. PortAudio reaches it through ALSA's pulse plugin, and reads the environment
once: whoever captures runs in a child process with :attr:`VirtualMicrophone.environment`.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import time
from pathlib import Path

CONFIG = """\
load-module module-native-protocol-unix auth-anonymous=1 socket={socket}
load-module module-null-sink sink_name=vmic_sink rate=16000 channels=1 format=s16le norewinds=1
load-module module-remap-source source_name=vmic master=vmic_sink.monitor
set-default-source vmic
set-default-sink vmic_sink
"""
ASOUND = """\
pcm.!default { type pulse }
ctl.!default { type pulse }
"""
NEEDED = ("pulseaudio", "paplay", "espeak-ng")


def missing() -> str | None:
    """What a virtual microphone lacks here, or None."""
    absent = [program for program in NEEDED if shutil.which(program) is None]
    if ctypes.util.find_library("portaudio") is None:
        absent.append("libportaudio2")
    return (
        f"no virtual microphone here: {', '.join(absent)} missing (make system)" if absent else None
    )


class VirtualMicrophone:
    def __init__(self, folder: Path):
        self.folder, self.socket = folder, folder / "native"
        self.environment = {
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
            "PULSE_SERVER": f"unix:{self.socket}",
        }
        (folder / ".asoundrc").write_text(ASOUND)
        (folder / "server.pa").write_text(CONFIG.format(socket=self.socket))
        self._server: subprocess.Popen | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        options = [
            "--daemonize=no",
            "--use-pid-file=no",
            "--exit-idle-time=-1",
            "--realtime=no",
            "--high-priority=no",
        ]
        command = ["pulseaudio", "-n", "-F", str(self.folder / "server.pa"), *options]
        with open(self.folder / "log", "wb") as log:
            self._server = subprocess.Popen(
                command, env=os.environ | self.environment, stdout=subprocess.DEVNULL, stderr=log
            )
        until = time.monotonic() + 20
        while subprocess.run(
            ["pactl", "info"], env=os.environ | self.environment, capture_output=True
        ).returncode:
            assert self._server.poll() is None and time.monotonic() < until, (
                self.folder / "log"
            ).read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        if self._server:
            self._server.kill()
            self._server.wait()
            self._server = None

    def play(self, wav: Path) -> subprocess.Popen:
        """Into the microphone. A long latency: the server has the whole file before it plays, so a
        busy machine makes no gap in it.
        """
        return subprocess.Popen(
            ["paplay", "--latency-msec=10000", "--device=vmic_sink", str(wav)],
            env=os.environ | self.environment,
            stdout=subprocess.DEVNULL,
        )
