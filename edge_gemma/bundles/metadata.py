"""The key/value section of a GGUF, read by type.

In: a :class:`~edge_gemma.bundles.gguf.Header` that nobody has checked. Out: single values of the
type and range that were asked for, or an error that names the file, the key, what was found and
what was expected. llama.cpp compares types exactly, and aborts the process on some mismatches, so
"a number" is not enough: each reader here accepts the types that llama.cpp accepts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from edge_gemma.bundles.gguf import Header, Skipped, Value
from edge_gemma.errors import UnsupportedModel

_LAYER_ARRAYS = ("array of uint32", "array of int32")


class Metadata:
    """The keys of one file. Every method raises UnsupportedModel for a wrong type or value.

    Without a ``default`` a key that is missing is an error as well.
    """

    def __init__(self, header: Header, path: Path):
        self._header, self._path = header, path

    def __contains__(self, key: str) -> bool:
        return key in self._header.metadata

    def keys(self) -> list[str]:
        return list(self._header.metadata)

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A uint32 between ``low`` and ``high``, both allowed."""
        value = self._typed(key, ("uint32",), default)
        if not isinstance(value, int) or not low <= value <= high:
            self.refuse(key, f"a number from {low} to {high}")
        return value

    def whole(self, key: str, low: int, high: int, default: int) -> int:
        """A whole number written as a uint32 or as a float32; llama.cpp does not read the key."""
        value = self._typed(key, ("uint32", "float32"), default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or not low <= value <= high:
            self.refuse(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A float32 between ``low`` and ``high``, both allowed; never NaN or infinite."""
        value = self._typed(key, ("float32",), default)
        if not isinstance(value, float) or not low <= value <= high or not math.isfinite(value):
            self.refuse(key, f"a number from {low:g} to {high:g}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._typed(key, ("bool",), default)
        assert isinstance(value, bool)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._typed(key, ("string",), default)
        assert isinstance(value, str)
        return value

    def layers(self, key: str, n_layer: int, high: int, default: int | None = None) -> int:
        """One positive number for all layers: a uint32, or an array of ``n_layer`` equal ones."""
        value = self._typed(key, ("uint32", *_LAYER_ARRAYS), default)
        expected = f"one number from 1 to {high} for all {n_layer} layers"
        if isinstance(value, Skipped):
            self.refuse(key, expected)
        if isinstance(value, list):
            if len(value) != n_layer or len(set(value)) != 1:
                self.refuse(key, expected)
            value = value[0]
        if not isinstance(value, int) or not 1 <= value <= high:
            self.refuse(key, expected)
        return value

    def array(self, key: str, items: Sequence[str], length: int | None = None) -> int:
        """The length of an array of one of the types ``items``; ``length`` is the only one allowed,
        if given.
        """
        value = self._typed(key, [f"array of {item}" for item in items])
        found = value.length if isinstance(value, Skipped) else len(self._list(key, value))
        if length is not None and found != length:
            self.refuse(key, f"{length} entries")
        return found

    def finite(self, key: str, length: int) -> None:
        """Check an array of ``length`` float32 values, none NaN or infinite."""
        self.array(key, ("float32",), length)
        value = self._header.metadata[key]
        if isinstance(value, Skipped):
            items = np.fromfile(self._path, "<f4", value.length, offset=value.offset)
        else:
            items = np.array(value, np.float32)
        if not np.isfinite(items).all():
            self.refuse(key, "finite numbers")

    def flags(self, key: str, length: int) -> list[bool]:
        """An array of ``length`` bools."""
        value = self._list(key, self._typed(key, ("array of bool",)))
        if len(value) != length:
            self.refuse(key, f"{length} entries")
        return [bool(entry) for entry in value]

    def integers(self, key: str, low: int, high: int, longest: int) -> list[int]:
        """A short array of whole numbers between ``low`` and ``high``, both allowed."""
        values = self._list(key, self._typed(key, _LAYER_ARRAYS))
        whole = [value for value in values if isinstance(value, int) and low <= value <= high]
        if len(whole) != len(values) or len(values) > longest:
            self.refuse(key, f"at most {longest} numbers from {low} to {high}")
        return whole

    def type(self, key: str) -> str:
        """GGUF's name of the value's type, "missing" where there is none."""
        return self._header.types.get(key, "missing")

    def value(self, key: str) -> Value | None:
        return self._header.metadata.get(key)

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise the error for a value that has the right type and cannot be used."""
        value = self._header.metadata.get(key)
        found = "missing"
        if isinstance(value, Skipped):
            found = f"{self.type(key)} with {value.length} entries"
        elif isinstance(value, list):
            found = f"{value[:4]}{' …' * (len(value) > 4)} ({self.type(key)}, {len(value)} entries)"
        elif value is not None:
            found = f"{repr(value)[:80]} ({self.type(key)})"
        raise UnsupportedModel(f"{self._path}: {key} is {found}; expected {expected}")

    def _typed(self, key: str, types: Sequence[str], default: Value | None = None) -> Value:
        value = self._header.metadata.get(key)
        if value is None:
            if default is None:
                self.refuse(key, " or ".join(types))
            return default
        if self.type(key) not in types:
            self.refuse(key, " or ".join(types))
        return value

    def _list(self, key: str, value: Value) -> list[bool] | list[int] | list[float]:
        if not isinstance(value, list):
            self.refuse(key, "an array of fewer entries")
        return value
