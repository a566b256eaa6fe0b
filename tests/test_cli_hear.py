"""The commands that hear, on the reference Gemma 3n with ears: output formats and every refusal."""

import base64
import io
import json

import hearing
import numpy as np
import pytest
import soundfile

from edge_gemma.cli import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(hearing.hearing_bundle(tmp_path_factory.mktemp("cli")).folder)


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as left:
            code = left.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two sentences of espeak-ng with a pause between, 44.1 kHz stereo."""
    import shutil

    from edge_gemma.conversation.voice import espeak

    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed (make system)")
    say = espeak("en")
    (a, rate_hz), (b, _) = say("The first sentence is here."), say("And this is the second one.")
    pause = np.zeros(int(1.5 * rate_hz), np.float32)
    path = tmp_path_factory.mktemp("clip") / "two.wav"
    soundfile.write(
        path, np.repeat(np.concatenate([pause, a, pause, b, pause])[:, None], 2, axis=1), rate_hz
    )
    return path


SHORT = ("--max-tokens", "4", "--threads", "1", "--ctx", "512")


def test_transcribe_as_text_json_and_subtitles(run, bundle, clip):
    code, out, _ = run("transcribe", bundle, clip, "--json", *SHORT)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert (
        len(rows) == 2
        and rows[0]["start_s"] == pytest.approx(1.5, abs=0.3)
        and rows[0]["end_s"] < rows[1]["start_s"] < rows[1]["end_s"]
    )
    code, out, _ = run("translate", bundle, clip, "--to", "French", "--srt", *SHORT)
    assert code == 0 and out.startswith("1\n00:00:01,") and "\n\n2\n00:00:0" in out
    code, out, _ = run("transcribe", bundle, clip, "--vtt", "--short", *SHORT)
    assert code == 0 and out.startswith("WEBVTT\n\n00:00:01.")


def test_ask(run, bundle, tmp_path):
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(16000) / 10) / 2, 16000)
    code, out, _ = run(
        "ask", bundle, tmp_path / "tone.wav", "What is this?", "--json", "--temp", "0", *SHORT
    )
    found = json.loads(out)
    assert (
        code == 0
        and found["usage"]["completion_tokens"]
        and found["finish_reason"] in ("stop", "length")
    )


def test_silence_says_so(run, bundle, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(32000), 16000)
    code, out, err = run("transcribe", bundle, tmp_path / "silence.wav", *SHORT)
    assert (code, out) == (0, "") and "no speech found" in err


def test_mistakes_are_answered_in_one_line(run, bundle, tmp_path, tiny_bundle, clip):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").touch()
    for arguments, code, message in (
        (("transcribe", bundle, tmp_path / "none.wav"), 6, "no sound file at"),
        (("transcribe", bundle, tmp_path / "text.wav"), 6, "is not a sound file that can be read"),
        (("transcribe", bundle, tmp_path / "empty.wav"), 6, "is empty (0 bytes)"),
        (("transcribe", bundle), 2, "give a sound file or --mic"),
        (("transcribe", bundle, clip, "--mic"), 2, "not both"),
        (
            ("transcribe", bundle, clip, "--srt", "--vtt"),
            2,
            "choose one of --srt, --vtt and --json",
        ),
        (("transcribe", tiny_bundle, clip), 3, "has no audio encoder, so it cannot hear"),
        (("ask", bundle, clip), 2, "write it like: edge-gemma ask BUNDLE clip.wav"),
        (("transcribe", bundle, clip, "--pause", "9"), 2, "end_s is 9.0; expected 0 … 5"),
    ):
        got, out, err = run(*arguments)
        assert (
            (got, out) == (code, "")
            and message in err
            and "Traceback" not in err
            and len(err.strip().splitlines()) == 1
        ), (arguments, err)


@pytest.mark.compat(
    kind="sound", what="a file without samples, in every command", happens="refused, exit code 6"
)
def test_no_samples_are_refused_by_every_command(run, bundle, tmp_path, monkeypatch):
    nothing = tmp_path / "nothing.wav"
    soundfile.write(nothing, np.zeros(0), 16000)
    for arguments in (
        ("transcribe", bundle, nothing),
        ("translate", bundle, nothing),
        ("ask", bundle, nothing, "What?"),
        ("run", bundle, "What?", "--audio", nothing),
    ):
        code, out, err = run(*arguments, *SHORT)
        assert code == 6 and "nothing.wav holds no samples" in err and "Traceback" not in err
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/audio '{nothing}' what?\n"))
    code, _, err = run("chat", bundle, *SHORT)
    assert code == 0 and "nothing.wav holds no samples" in err


@pytest.mark.compat(
    kind="sound", what="what was done to hear a file", happens="a note by every command"
)
def test_notes_about_a_file_are_shown(run, bundle, tmp_path):
    wave = np.sin(np.arange(16000) / 10) / 2
    soundfile.write(tmp_path / "my clip.wav", np.stack([wave, -wave], axis=1), 16000)
    quoted = f"'{tmp_path / 'my clip.wav'}'"
    for arguments in (
        ("transcribe", bundle, quoted),
        ("ask", bundle, quoted, "What?"),
        ("run", bundle, "What?", "--audio", quoted),
    ):
        code, _, err = run(*arguments, *SHORT)
        assert code == 0 and "my clip.wav: its channels cancel each other" in err
        assert "note: " in err and "Warning" not in err
    data = base64.b64encode((tmp_path / "my clip.wav").read_bytes()).decode()
    code, _, err = run("transcribe", bundle, f"data:audio/wav;base64,{data}", *SHORT)
    assert code == 0 and "note: the sound: its channels cancel" in err


def test_no_microphone_here(run, bundle, monkeypatch):
    from edge_gemma.hearing import devices as audio

    monkeypatch.setattr(audio, "devices", lambda: [])
    for arguments in (
        ("listen", bundle),
        ("devices", "--meter"),
        ("transcribe", bundle, "--mic", *SHORT),
    ):
        code, _, err = run(*arguments)
        assert code == 6 and "no microphone found; plug one in" in err


def test_devices_as_json(run, monkeypatch):
    from edge_gemma.hearing import devices as audio

    monkeypatch.setattr(
        audio, "devices", lambda: [audio.SoundDevice(0, "USB Microphone", 1, 0, 48000, True, False)]
    )
    code, out, _ = run("devices", "--json")
    assert code == 0 and json.loads(out)[0]["name"] == "USB Microphone"
    code, out, _ = run("devices")
    assert "USB Microphone  1 in, 0 out, 48000 Hz  ← default microphone" in out


def test_missing_voice_is_said_before_anything_is_loaded(run, bundle, monkeypatch):
    from edge_gemma.conversation import voice as speech

    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    code, _, err = run("listen", bundle, "--voice", "en")
    assert code == 2 and "espeak-ng is not installed" in err


def test_bench_wer_on_a_stub_decoder(run, bundle, clip, tmp_path, monkeypatch):
    """Files, speech detection, encoder, prompt and prefill are real; only what the decoder says is
    scripted: 3 of 11 words wrong.
    """
    from edge_gemma.conversation.session import Session
    from edge_gemma.conversation.stream import Chunk

    said = iter(["The first sentence", " is here.", "And this was a second one!"])

    def answer(session, options):
        assert (
            session.length > 20 and options.temperature == 0 and options.max_tokens == 448
        )  # the prompt with its soft tokens
        text = next(said)
        if text.startswith("The"):
            yield Chunk(text)
            text = next(said)
        yield Chunk(text, finish_reason="stop")

    monkeypatch.setattr(Session, "generate", answer)
    (tmp_path / "two.wav").write_bytes(clip.read_bytes())
    (tmp_path / "two.txt").write_text(
        "The first sentence is here. And this is the second one there."
    )
    (tmp_path / "broken.wav").write_text("no sound")
    (tmp_path / "broken.txt").write_text("lost")
    code, out, err = run("bench", "wer", bundle, tmp_path, "--short", "--json")
    found = json.loads(out)
    assert code == 0 and {**found, "bundle": ""} == {
        "wer": round(4 / 13, 4),
        "words": 13,
        "errors": 4,
        "files": 2,
        "failed": 1,
        "bundle": "",
    }
    assert (
        "two.wav: 3 of 12 words wrong: the first sentence is here and this was a second one" in err
        and "broken.wav is not a sound file" in err
    )
    assert next(said, None) is None


@pytest.mark.slow
def test_bench_wer_runs_the_whole_way(run, bundle, clip, tmp_path):
    """With the real decoder, whose random weights hear noise: the rate means nothing, the counting
    does.
    """
    (tmp_path / "two.wav").write_bytes(clip.read_bytes())
    (tmp_path / "two.txt").write_text("The first sentence is here. And this is the second one.")
    code, out, _ = run("bench", "wer", bundle, tmp_path, "--json")
    found = json.loads(out)
    assert code == 0 and found["words"] == 11 and found["files"] == 1 and found["errors"] >= 1
