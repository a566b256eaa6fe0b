"""How loud the machine is, by the program of its sound server: wpctl, pactl or amixer."""

from __future__ import annotations

import re
import shutil
import subprocess

from edge_gemma.assistant.tool import ToolError

# program → what sets the volume to a per cent, what prints it
_PROGRAMS: dict[str, tuple[list[str], list[str]]] = {
    "wpctl": (
        ["set-volume", "@DEFAULT_AUDIO_SINK@", "{}%"],
        ["get-volume", "@DEFAULT_AUDIO_SINK@"],
    ),
    "pactl": (["set-sink-volume", "@DEFAULT_SINK@", "{}%"], ["get-sink-volume", "@DEFAULT_SINK@"]),
    "amixer": (["-q", "sset", "Master", "{}%"], ["sget", "Master"]),
}
_PER_CENT = re.compile(r"(\d+)%")
_SHARE = re.compile(r"Volume: (\d+\.\d+)")  # wpctl's
_TIMEOUT_S = 5.0


def get_volume() -> int:
    """Per cent. Raises ToolError: none of the programs is here, or none of them can."""
    return _by_any(None)


def set_volume(per_cent: int) -> int:
    """0 to 100 → what it is then. Raises ToolError."""
    if not 0 <= per_cent <= 100:
        raise ToolError(f"a volume of {per_cent} per cent; expected 0 to 100")
    return _by_any(per_cent)


def _by_any(per_cent: int | None) -> int:
    found = [(name, path) for name in _PROGRAMS if (path := shutil.which(name))]
    if not found:
        raise ToolError(
            f"the volume cannot be set: none of {', '.join(_PROGRAMS)} is installed on this machine"
        )
    reasons = []
    for name, path in found:
        setting, getting = _PROGRAMS[name]
        try:
            if per_cent is not None:
                _run([path, *(part.format(per_cent) for part in setting)])
            return _read(_run([path, *getting]))
        except ToolError as error:
            reasons.append(f"{name}: {error}")
    raise ToolError(f"the volume cannot be set ({'; '.join(reasons)})")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(str(error)) from None
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ToolError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout.decode("utf-8", "replace")


def _read(printed: str) -> int:
    if match := _PER_CENT.search(printed):
        return int(match[1])
    if match := _SHARE.search(printed):
        return round(100 * float(match[1]))
    raise ToolError("it did not say the volume")
