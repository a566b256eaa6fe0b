"""Paths as people type them, and data URIs: what is meant, and each refusal with its message."""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma import sources
from edge_gemma.cli.common import parse_scaled
from edge_gemma.cli.options import with_typed_paths
from edge_gemma.cli.see import QUESTION, split
from edge_gemma.cli.text import _keep, _media_turn
from edge_gemma.errors import MediaError
from edge_gemma.messages import Audio, Image
from edge_gemma.sources import Wanted, data_uri_bytes, first_path, local_file, typed, typed_line

PICTURE = Wanted("image", ("image/",), 1000)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with names of every kind, which is also the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("plain.png", "my photo.png", "it's.png", 'say "hi".png', "a\\b.png", "'q'.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "inner photo.png").write_bytes(b"x")
    return tmp_path


@pytest.mark.compat(
    kind="path",
    what="a path that is quoted, escaped, spaced, with ~ or file://",
    happens="the file that is meant; one that exists as typed wins",
)
@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("plain.png", "plain.png"),
        ("my photo.png", "my photo.png"),
        ("'my photo.png'", "my photo.png"),
        ('"my photo.png"', "my photo.png"),
        (r"my\ photo.png", "my photo.png"),
        ("  'my photo.png' ", "my photo.png"),
        ("it's.png", "it's.png"),
        (r"it\'s.png", "it's.png"),
        ('"it\'s.png"', "it's.png"),
        ('say "hi".png', 'say "hi".png'),
        ("'q'.png", "'q'.png"),  # exists as typed
        ("a\\b.png", "a\\b.png"),
        ("~/plain.png", "{home}/plain.png"),
        ("~/my photo.png", "{home}/my photo.png"),
        ('"~/my photo.png"', "{home}/my photo.png"),
        (r"~/my\ photo.png", "{home}/my photo.png"),
        ("~/new\\ file.json", "{home}/new\\ file.json"),  # made as it is written
        ("file://{home}/my%20photo.png", "{home}/my photo.png"),
        ("none such.png", "none such.png"),
        ("isn't there.png", "isn't there.png"),
        ("gemma-3-270m", "gemma-3-270m"),
        ("data:image/png;base64,AA==", "data:image/png;base64,AA=="),
        ("https://a.org/b.png", "https://a.org/b.png"),
        ("", ""),
        ("x" * 5000, "x" * 5000),
        ("nul\0.png", "nul\0.png"),
    ],
)
def test_typed(here, text, meant):
    assert typed(text.format(home=here)) == meant.format(home=here)


@pytest.mark.parametrize(
    ("line", "path", "words"),
    [
        ("plain.png", "plain.png", ""),
        ("plain.png what is this?", "plain.png", "what is this?"),
        ("my photo.png what's this?", "my photo.png", "what's this?"),
        ("'my photo.png' what's this?", "my photo.png", "what's this?"),
        (r"my\ photo.png what's this?", "my photo.png", "what's this?"),
        ('"my photo.png" "quoted" words', "my photo.png", '"quoted" words'),
        ("my/inner photo.png and?", "my/inner photo.png", "and?"),
        ("~/my photo.png  why?", "{home}/my photo.png", "why?"),
        ("it's.png what's up?", "it's.png", "what's up?"),
        ("none.png what's up?", "none.png", "what's up?"),
        ("isn't.png what now?", "isn't.png", "what now?"),
        ("'not ended.png what?", "'not", "ended.png what?"),
        ("data:image/png;base64,AA== what?", "data:image/png;base64,AA==", "what?"),
        ("my", "my", ""),
        ("/dev/null what?", "/dev/null", "what?"),
        ("", "", ""),
    ],
)
def test_first_path(here, line, path, words):
    assert first_path(line.format(home=here)) == (path.format(home=here), words)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (" my chat.json ", "my chat.json"),
        ("'my chat.json'", "my chat.json"),
        (r"my\ chat.json", "my chat.json"),
        ("~/chat.json", "{home}/chat.json"),
        ("it's new.json", "it's new.json"),
        ("my photo.png", "my photo.png"),
    ],
)
def test_a_line_that_is_one_path(here, line, path):
    assert typed_line(line) == path.format(home=here)


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_read_without_an_error(text):
    assert isinstance(typed(text), str) and isinstance(typed_line(text), str)
    path, words = first_path(text)
    assert len(path) + len(words) <= len(text) + len(os.path.expanduser("~")) or "~" in text


@given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30))
def test_any_name_quoted_as_a_shell_quotes_it_is_found(tmp_path_factory, name):
    import shlex

    folder = tmp_path_factory.getbasetemp() / "names"
    folder.mkdir(exist_ok=True)
    path = str(folder / f"n{name}")
    with open(path, "wb") as file:
        file.write(b"x")
    try:
        assert typed(path) == typed(shlex.quote(path)) == path
        found, words = first_path(f"{shlex.quote(path)} what is it?")
        assert (found, words) == (path, "what is it?")
    finally:
        os.unlink(path)


@pytest.mark.compat(
    kind="path",
    what="quoted, escaped and spaced paths and ~ in /image, /audio, /save and /load",
    happens="the file that is meant; the rest of the line is the question",
)
def test_paths_in_a_chat(here):
    picture, question = _media_turn("/image", r"my\ photo.png what's this?")
    assert isinstance(picture, Image) and picture.source == "my photo.png"
    assert question == "what's this?"
    (sound,) = _media_turn("/audio", "'my photo.png'")
    assert isinstance(sound, Audio) and sound.source == "my photo.png"

    class Talk:
        messages = ()
        saved: list[str] = []

        def save(self, path):
            self.saved.append(path)

        restore = save

    _keep(Talk(), "/save", "'my chat.json'")
    _keep(Talk(), "/load", r"~/my\ chat.json")
    _keep(Talk(), "/save", "my new chat.json")
    assert Talk.saved == ["my chat.json", f"{here}/my chat.json", "my new chat.json"]


@pytest.mark.compat(
    kind="path", what="~ and quotes in the options of a command", happens="the file that is meant"
)
def test_paths_in_options(here):
    assert with_typed_paths("save", Path("~/a.json")) == here / "a.json"
    assert with_typed_paths("video", [Path("'my photo.png'")]) == [Path("my photo.png")]
    assert with_typed_paths("image", ["~/plain.png"]) == [f"{here}/plain.png"]
    assert with_typed_paths("prompt", "'my photo.png'") == "'my photo.png'"
    assert with_typed_paths("threads", 2) == 2 and with_typed_paths("save", None) is None
    assert parse_scaled("~/plain.png:0.5", "--lora") == (here / "plain.png", 0.5)
    assert parse_scaled("'my photo.png'", "--lora") == (Path("my photo.png"), 1.0)


def test_words_of_describe(here):
    assert split(["'my photo.png'", "What's this?"]) == (["my photo.png"], "What's this?")
    assert split(["plain.png", "~/plain.png"]) == (["plain.png", f"{here}/plain.png"], QUESTION)
    long = "What is this? " * 400  # longer than a name may be
    assert split(["plain.png", long]) == (["plain.png"], long)
    uri = "data:image/png;base64,AA=="
    assert split([uri]) == ([uri], QUESTION) and split([]) == ([], QUESTION)


# ---- what is no file


def test_what_is_no_file(here, monkeypatch):
    os.mkfifo("pipe.wav")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.wav")
        for name, message in {
            "pipe.wav": "pipe.wav is a pipe, not a file; write what it gives into a sound file",
            "socket.wav": "is a socket, not a file",
            "/dev/zero": "/dev/zero is a device, not a file",
            "my": "my is a directory; name the sound files in it",
            "none.wav": "there is no sound file at none.wav",
            "plain.png/x": "there is no sound file at",
            "n" * 5000: "cannot read n{120}…: File name too long",
            "nul\0": "there is no sound file at",
            "https://a.org/b.wav": "is a network address; download it first",
        }.items():
            with pytest.raises(MediaError, match=message):
                local_file(name, "sound")
    monkeypatch.setattr(sources, "open", _denied, raising=False)
    with pytest.raises(MediaError, match="cannot read plain.png: Permission denied"):
        local_file("plain.png", "sound")


def _denied(path, mode):
    raise PermissionError(13, "Permission denied", str(path))


# ---- data URIs


def uri(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_come_back(data):
    plain = base64.b64encode(data).decode()
    for text in (
        plain,
        plain.rstrip("="),
        base64.urlsafe_b64encode(data).decode(),
        "\n".join(plain[at : at + 10] for at in range(0, len(plain), 10)),
        plain.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ):
        for head in ("data:image/png;base64,", "DATA:;BASE64,", " data:image/x;name=a;base64,"):
            assert data_uri_bytes(head + text, PICTURE) == data
    percent = "".join(f"%{byte:02x}" for byte in data)
    assert data_uri_bytes(f"data:image/png,{percent}", PICTURE) == data


@pytest.mark.compat(
    kind="path",
    what="a data URI that is cut, damaged, too large or of another type",
    happens="refused before it is decoded",
)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:image/png;base64", "a data URI without a comma; expected data:image/…;base64,…"),
        ("data:image/png;base64,", "holds no image: it has 0 bytes"),
        ("data:image/png;base64,A", "not base64: it has 1 characters"),
        ("data:image/png;base64,AA$A", "not base64: '\\$' at character 2 behind the comma"),
        ("data:image/png;base64,AA=A", "not base64: '=' at character 2"),
        ("data:audio/wav;base64,AAAA", "holds audio/wav; expected image/…, an image"),
        ("data:text/plain,hello", "holds text/plain; expected image/"),
        (uri(bytes(1001)), "holds 1001 B; image data up to 1000 B are read"),
        (uri(bytes(9001)), "image data up to 1000 B are read"),
        ("data:image/png," + "a" * 1001, "image data up to 1000 B are read"),
    ],
)
def test_data_uris_that_are_refused(text, message):
    with pytest.raises(MediaError, match=message):
        data_uri_bytes(text, PICTURE)
