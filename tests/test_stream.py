"""Text pieces: however the bytes come, the text is the same and no character is ever cut."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.conversation.stream import TextStream


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.text(), st.lists(st.integers(0, 10**6)))
def test_any_split_gives_the_same_text(text, cuts):
    stream = TextStream()
    out = [stream.push(p) for p in pieces(text.encode(), cuts)]
    assert "".join(out) + stream.finish() == text


@given(st.text("abE ND", max_size=40), st.lists(st.integers(0, 10**6)))
def test_a_stop_string_ends_the_text_before_itself(text, cuts):
    stream, stops = TextStream(("END", "bb")), ("END", "bb")
    out = "".join(stream.push(p) for p in pieces(text.encode(), cuts)) + stream.finish()
    first = min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))
    assert stream.stopped == (first < len(text))
    assert out == text[:first] or (
        stream.stopped and text.startswith(out) and not any(s in out for s in stops)
    )


def test_broken_bytes_become_a_replacement():
    stream = TextStream()
    assert stream.push(b"a\xff") + stream.push(b"\xe2\x82") + stream.finish() == "a\ufffd\ufffd"
