"""How fast this machine reads memory: what bounds a decoder that reads all its weights a token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edge_gemma.machine.device import Device
from edge_gemma.units import MiB

MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 16 * MiB, 256 * MiB  # past a board's caches, past a server's
ROUNDS = 5
# of what plain reading reaches; llama.cpp on a Pi 5 decodes at 10 of its 12 to 13 GB/s
DECODER_SHARE = 0.75


def decode_bytes_per_second(device: Device) -> float:
    """At which a decoder on this machine will about read its weights."""
    return DECODER_SHARE * read_bytes_per_second(device.n_threads, device.available_bytes)


def read_bytes_per_second(n_threads: int, available_bytes: int) -> float:
    """The best of a few passes of ``n_threads`` threads over a block that takes at most an eighth
    of ``available_bytes``; a tenth of a second on a laptop.
    """
    block_bytes = max(MIN_BLOCK_BYTES, min(MAX_BLOCK_BYTES, available_bytes // 8))
    values = np.ones(block_bytes // 8, dtype=np.int64)
    parts = np.array_split(values, n_threads)
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            list(pool.map(np.max, parts))  # lets the interpreter go while it reads
            best = max(best, values.nbytes / (time.perf_counter() - began))
    return best
