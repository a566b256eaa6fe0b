"""The wall to llama.cpp: which of its weight layouts are left to the loader."""

from __future__ import annotations

import ctypes

from edge_gemma.engines.llama import library as llama


def names(listed) -> list[bytes]:
    found = []
    while listed and listed[len(found)]:
        found.append(llama.ggml()["ggml_backend_buft_name"](listed[len(found)]))
    return found


def test_the_loader_finds_no_amx():
    llama.library()
    assert b"AMX" not in names(llama._extra_buffer_types())


def test_amx_leaves_the_list_and_the_rest_stays_in_order(monkeypatch):
    kinds = {1: b"CPU_REPACK", 2: b"AMX", 3: b"CPU_KLEIDIAI"}
    listed = (ctypes.c_void_p * 4)(1, 2, 3, None)
    monkeypatch.setattr(llama, "_extra_buffer_types", lambda: listed)
    monkeypatch.setattr(llama, "ggml", lambda: {"ggml_backend_buft_name": kinds.get})
    llama.leave_amx_out()
    assert list(listed)[:3] == [1, 3, None]
    llama.leave_amx_out()  # and does nothing the second time
    assert list(listed)[:3] == [1, 3, None]


def test_a_machine_without_such_layouts(monkeypatch):
    monkeypatch.setattr(llama, "_extra_buffer_types", lambda: None)
    llama.leave_amx_out()
