"""assistant init: a unit for systemd's user manager, which has the user's sound server.

In: a command and a plan. Out: the text of edge-gemma-assistant.service. Of the system unit's
hardening (packaging/systemd) it has what works without root and leaves sound, /home and a GPIO
header reachable.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_gemma.serve.systemd_unit import memory_max_bytes, quoted
from edge_gemma.units import MiB

UNIT_NAME = "edge-gemma-assistant.service"
_HARDENING = """\
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""


def user_unit(command: Sequence[str], planned_bytes: int | None) -> str:
    """``planned_bytes`` None: no limit of memory."""
    memory = "# no limit of memory: write assistant.toml's bundle, and: assistant init --force"
    if planned_bytes is not None:
        memory = f"MemoryMax={memory_max_bytes(planned_bytes) // MiB}M\nMemorySwapMax=0"
    return f"""\
# by edge-gemma assistant init
[Unit]
Description=edge-gemma: an assistant by voice
After=pipewire-pulse.service pulseaudio.service

[Service]
ExecStart={" ".join(quoted(word) for word in command)}
Type=notify
NotifyAccess=main
WatchdogSec=120
TimeoutStartSec=15min
TimeoutStopSec=30
Restart=on-failure
RestartSec=5
# a configuration or a bundle that is wrong stays wrong
RestartPreventExitStatus=2 3
{memory}

{_HARDENING}
[Install]
WantedBy=default.target
"""
