"""The part of a systemd unit that only a plan knows: what to start, and how much memory it gets.

In: a command and a plan. Out: a drop-in beside ``packaging/systemd/edge-gemma.service``.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_gemma.units import MiB, format_bytes

# beside the plan: the server's own 25 MiB, and what the kernel counts for sockets and page tables
_MARGIN_BYTES = 64 * MiB
_MARGIN_SHARE = 0.1


def memory_max_bytes(planned_bytes: int) -> int:
    """A limit that the plan stays inside with room to spare, in whole MiB.

    >>> memory_max_bytes(1000 * MiB) // MiB
    1164
    """
    return -(-int(planned_bytes * (1 + _MARGIN_SHARE) + _MARGIN_BYTES) // MiB) * MiB


def drop_in(command: Sequence[str], planned_bytes: int, *, to_network: bool) -> str:
    """The text of ``edge-gemma.service.d/plan.conf``. ``to_network``: other machines may come in,
    which the unit forbids otherwise.
    """
    lines = [
        f"# by edge-gemma serve --print-unit: {format_bytes(planned_bytes)} planned",
        "[Service]",
        "ExecStart=",
        f"ExecStart={' '.join(quoted(word) for word in command)}",
        f"MemoryMax={memory_max_bytes(planned_bytes) // MiB}M",
    ]
    if to_network:
        # zeroconf asks the kernel for the machine's addresses by netlink
        lines += ["IPAddressDeny=", "RestrictAddressFamilies=AF_NETLINK"]
    return "\n".join(lines) + "\n"


def quoted(word: str) -> str:
    """One word of a command, as systemd reads it.

    >>> print(quoted("/srv/gemma"), quoted('a "b" 100% $HOME'))
    /srv/gemma "a \\"b\\" 100%% $$HOME"
    """
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("%", "%%"), ("$", "$$")):
        word = word.replace(plain, escaped)
    plain_word = word and all(c.isalnum() or c in "/._-=:%$,@+" for c in word)
    return word if plain_word else f'"{word}"'
