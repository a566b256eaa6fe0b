"""Which weights a CPU's kernels copy into a layout of their own, by the rules in
device_profiles/repack.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from typing import Protocol

from edge_gemma.machine.device import PROFILES, Device


@cache
def repack_rules() -> dict[str, tuple[tuple[frozenset[str], int], ...]]:
    """type → ((CPU features, rows must be a multiple of), …), from repack.toml."""
    table = tomllib.loads((resources.files(PROFILES) / "repack.toml").read_text(encoding="utf-8"))
    rules: dict[str, list] = {}
    for rule in table["rules"]:
        rules.setdefault(rule["type"], []).append((frozenset(rule["features"]), rule["rows"]))
    return {type: tuple(found) for type, found in rules.items()}


def repacked(type: str, shape: Iterable[int], cpu_features: Iterable[str]) -> bool:
    """Whether llama.cpp copies a matmul weight of ``type`` and ``shape`` (ggml order: row length
    first) into a repacked buffer.

    Source: device_profiles/repack.toml. A weight that is only looked up, never multiplied, is not
    copied: ask for matmuls.

    >>> repacked("Q4_0", (2048, 16384), ("avx2",)), repacked("Q8_0", (2048, 16384), ("avx2",))
    (True, False)
    >>> repacked("Q8_0", (2048, 16384), ("neon", "dotprod"))
    True
    """
    dims = list(shape)
    while len(dims) > 1 and dims[-1] == 1:  # ggml_n_dims
        dims.pop()
    features = frozenset(cpu_features)
    return len(dims) == 2 and any(
        needs <= features and dims[1] % rows == 0 for needs, rows in repack_rules().get(type, ())
    )


class Weight(Protocol):
    """What the rules look at: a manifest's tensor has it."""

    @property
    def type(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def repacks_for(device: Device) -> Callable[[Weight], bool]:
    """What ``make_plan`` asks about each weight, for a machine that is not this one: by the rules.

    For this machine llama.cpp itself is asked (engines/llama/weights.py, repacked_here).
    """
    return lambda weight: repacked(weight.type, weight.shape, device.cpu_features)
