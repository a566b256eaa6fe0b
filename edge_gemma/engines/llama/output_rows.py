"""Room for logits that an embedding model never writes, without the memory.

In: nothing but the ggml libraries that are loaded. Out: :class:`UnwrittenOutputs`, around the
calls of one context. llama.cpp reserves and fills one row of logits (``n_vocab`` float32) for every
token that it encodes, of an embedding model too: 2 GiB for 2048 tokens of EmbeddingGemma. Nothing
is ever written there, so within the block these buffers are addresses without pages: mapped, not
reserved, and not filled with zeros (fresh pages are zero).

What is changed in ggml are two function pointers, found by what they do and checked before use; on
a platform or version where they are not found, llama.cpp allocates as it always does.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from edge_gemma.engines.llama import library as llama

_MAP_NORESERVE = 0x4000  # <asm-generic/mman-common.h>
_MAX_WORDS = 24  # of ggml's struct for a buffer, that are searched
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_CLEAR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint8)
_leave_as_it_is = _CLEAR(lambda buffer, value: None)
_one_at_a_time = threading.Lock()


class UnwrittenOutputs:
    """The output buffers of one context whose rows have ``row_bytes``. Close it after the
    context.
    """

    def __init__(self, row_bytes: int):
        self._row_bytes = row_bytes
        self._mapped: list[mmap.mmap] = []

    @contextmanager
    def reserving(self) -> Iterator[None]:
        """Around every call in which llama.cpp may reserve outputs."""
        place = _allocator_place()
        if place is None:
            yield
            return
        ours = threading.get_ident()
        slot = ctypes.c_void_p.from_address(place)

        @_ALLOCATE
        def allocate(kind: int, n_bytes: int) -> int | None:
            is_output = n_bytes >= self._row_bytes and n_bytes % self._row_bytes == 0
            if threading.get_ident() != ours or not is_output:
                return original(kind, n_bytes)
            return self._unwritten(n_bytes) or original(kind, n_bytes)

        with _one_at_a_time:
            before = slot.value
            assert before is not None
            original = _ALLOCATE(before)
            slot.value = ctypes.cast(allocate, ctypes.c_void_p).value
            try:
                yield
            finally:
                slot.value = before

    def _unwritten(self, n_bytes: int) -> int | None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            pages = mmap.mmap(-1, n_bytes, flags=flags)
        except OSError:
            return None
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        buffer = llama.ggml()["ggml_backend_cpu_buffer_from_ptr"](address, n_bytes)
        place = _clear_place(buffer)
        if place is None:
            llama.ggml()["ggml_backend_buffer_free"](buffer)
            return None
        ctypes.c_void_p.from_address(place).value = _no_clear()
        self._mapped.append(pages)  # llama.cpp frees the buffer, not the pages
        return buffer

    def close(self) -> None:
        self._mapped.clear()


def _no_clear() -> int | None:
    return ctypes.cast(_leave_as_it_is, ctypes.c_void_p).value


def _clear_place(buffer: int) -> int | None:
    """The address of the pointer to the function that fills a buffer: in ggml's struct it stands
    two words before (buffer type, base address, size), which are known.
    """
    g = llama.ggml()
    known = (
        g["ggml_backend_buffer_get_type"](buffer),
        g["ggml_backend_buffer_get_base"](buffer),
        g["ggml_backend_buffer_get_size"](buffer),
    )
    words = (ctypes.c_size_t * _MAX_WORDS).from_address(buffer)
    for i in range(2, _MAX_WORDS - 2):
        if tuple(words[i : i + 3]) == known:
            return buffer + (i - 2) * ctypes.sizeof(ctypes.c_size_t)
    return None


@functools.cache
def _allocator_place() -> int | None:
    """The address of the pointer to the function that allocates buffers for the CPU, second in
    ggml's struct; None where it or the one that fills them is not what it seems.
    """
    if not sys.platform.startswith("linux"):
        return None
    llama.library()
    g = llama.ggml()
    kind = g["ggml_backend_cpu_buffer_type"]()
    place = kind + ctypes.sizeof(ctypes.c_void_p)
    slot, asked = ctypes.c_void_p.from_address(place), []
    before = slot.value
    if before is None:
        return None
    original = _ALLOCATE(before)

    @_ALLOCATE
    def allocate(kind: int, n_bytes: int) -> int | None:
        asked.append(n_bytes)
        return original(kind, n_bytes)

    with _one_at_a_time:
        slot.value = ctypes.cast(allocate, ctypes.c_void_p).value
        try:
            buffer = g["ggml_backend_buft_alloc_buffer"](kind, 4096)
        finally:
            slot.value = before
    try:
        return place if asked == [4096] and _can_leave_unfilled(buffer) else None
    finally:
        g["ggml_backend_buffer_free"](buffer)


def _can_leave_unfilled(buffer: int) -> bool:
    """Whether the pointer that :func:`_clear_place` finds is the one that fills."""
    g, place = llama.ggml(), _clear_place(buffer)
    if place is None:
        return False
    first = ctypes.c_uint8.from_address(g["ggml_backend_buffer_get_base"](buffer))
    g["ggml_backend_buffer_clear"](buffer, 1)
    filled = first.value
    slot = ctypes.c_void_p.from_address(place)
    before, slot.value = slot.value, _no_clear()
    g["ggml_backend_buffer_clear"](buffer, 2)
    slot.value = before
    return (filled, first.value) == (1, 1)
