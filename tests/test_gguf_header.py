"""The GGUF header reader on files built byte by byte: every refusal has its message, and no bytes
at all make it fall over.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.bundles.gguf import Skipped, find_strings, read_header
from edge_gemma.errors import BundleError, UnsupportedModel

STRING, ARRAY, UINT32, FLOAT32 = 8, 9, 4, 6


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


def build(
    keys: list[bytes] = (),
    tensors: list[bytes] = (),
    data: int = 64,
    version: int = 3,
    n_keys=None,
    n_tensors=None,
) -> bytes:
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    head += b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\1" * data


VOCABULARY = key(
    "words", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("<end_of_turn>") + text("")
)
GOOD = build(
    [
        key("name", STRING, text("Gemma")),
        key("sizes", ARRAY, struct.pack("<IQ3I", UINT32, 3, 1, 2, 3)),
        VOCABULARY,
    ],
    [tensor("t", (4, 2))],
)


@pytest.fixture
def write(tmp_path):
    def write(data: bytes):
        (tmp_path / "x.gguf").write_bytes(data)
        return tmp_path / "x.gguf"

    return write


def test_reads_what_is_there_and_steps_over_vocabularies(write):
    header = read_header(write(GOOD))
    assert header.metadata["name"] == "Gemma" and header.metadata["sizes"] == [1, 2, 3]
    assert isinstance(words := header.metadata["words"], Skipped) and words.length == 3
    (found,) = header.tensors
    assert (found.name, found.type, found.shape, found.nbytes) == ("t", "F32", (4, 2), 32)
    assert header.data_offset % 32 == 0 and found.offset == header.data_offset
    assert find_strings(write(GOOD), words, {"<end_of_turn>", "absent"}) == {"<end_of_turn>": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + GOOD[4:], "begins with b'GGML'"),
        (b"", "is empty"),
        (build(version=1), "GGUF version 1"),
        (build(version=3 << 24), "big-endian"),
        (build(n_tensors=1 << 60), "claims 1152921504606846976 tensors"),
        (build(n_keys=1 << 60), "keys"),
        (build([text("k") + struct.pack("<I", 77)]), "value type 77"),
        (
            build([text("k") + struct.pack("<I", STRING) + struct.pack("<Q", 1 << 50)]),
            "string of 1125899906842624 bytes",
        ),
        (
            build([text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", STRING, 1 << 50)]),
            "strings",
        ),
        (
            build([text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", UINT32, 1 << 50)]),
            "past the end",
        ),
        (
            build([text("k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1)]),
            "array of type 9",
        ),
        (build([key("k", UINT32, struct.pack("<I", 1))] * 2), "occurs twice"),
        (
            build([key("general.alignment", UINT32, struct.pack("<I", 48))]),
            "no power of two|not a power of two",
        ),
        (build(tensors=[tensor("t", (1 << 50,))]), "claims the shape"),
        (build(tensors=[tensor("t", (4096,))]), "ends at byte"),
        (build(tensors=[tensor("t", (4,), kind=99)]), "ggml type 99"),
        (build(tensors=[tensor("t", (33,), kind=2)]), "no multiple of Q4_0"),
        (build(tensors=[tensor("t", (4,), offset=32)]), "lies at 32, expected 0"),
        (build(tensors=[tensor("t" * 64, (4,))]), "name has 64 bytes"),
        (build(tensors=[tensor("t", ())]), "0 dimensions"),
        (build(tensors=[tensor("t", (4,)), tensor("t", (4,), offset=32)]), "occurs twice"),
    ],
)
def test_refuses_with_the_reason(write, data, message):
    with pytest.raises(BundleError, match=message):
        read_header(write(data))


def test_every_truncation_is_refused(write):
    header = read_header(write(GOOD))
    for n in range(len(GOOD) - 64 + header.tensors[0].nbytes):
        with pytest.raises(BundleError):
            read_header(write(GOOD[:n]))


@settings(max_examples=400)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_flipped_bytes_are_read_or_refused(tmp_path_factory, flips):
    data = bytearray(GOOD)
    for at, value in flips:
        data[at] = value
    path = tmp_path_factory.mktemp("flip") / "x.gguf"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except (BundleError, UnsupportedModel):
        return
    assert all(0 <= t.offset and t.offset + t.nbytes <= len(data) for t in header.tensors)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_noise_behind_the_magic_is_read_or_refused(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("noise") / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + noise)
    try:
        read_header(path)
    except BundleError:
        pass
