"""A bundle without an encoder: one error and one exit code, whichever way it was asked."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import seeing

import edge_gemma
from edge_gemma import cli
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import require
from edge_gemma.errors import UnsupportedModel
from edge_gemma.plan.records import PlanRequest

HEAR = "has no audio encoder, so it cannot hear; Gemma 3n E2B and E4B can"
SEE = "has no vision encoder, so it cannot see; Gemma 3 4B and Gemma 3n can"


def refused(message: str):
    return pytest.raises(UnsupportedModel, match=message)


def test_the_manifest(tiny_bundle, encoder_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    for sense, message in (("audio", HEAR), ("vision", SEE)):
        with refused(message) as error:
            require(manifest, sense)
        assert error.value.exit_code == 3
    hearing = Bundle.open(encoder_bundle).manifest
    assert require(hearing, "audio") is hearing.audio


def test_the_plan(tiny_bundle):
    for sense, message in (("audio", HEAR), ("vision", SEE)):
        with refused(message):
            edge_gemma.load(tiny_bundle, request=PlanRequest(senses=(sense,)))


def test_the_model(tiny_model):
    pixels = np.zeros((8, 8, 3), np.uint8)
    with refused(HEAR):
        tiny_model.encode_audio(np.zeros(16000, np.float32))
    with refused(SEE):
        tiny_model.encode_image(pixels)
    with tiny_model.chat() as chat:
        with refused(SEE):
            list(chat.send([edge_gemma.Image(pixels), "?"]))
        with refused(HEAR):
            list(chat.send([edge_gemma.Audio(np.zeros(16000, np.float32)), "?"]))


def test_the_encoders(tiny_bundle):
    from edge_gemma.hearing.encoder import AudioEncoder
    from edge_gemma.seeing.encoder import ImageEncoder

    bundle = Bundle.open(tiny_bundle)
    with refused(HEAR):
        AudioEncoder(bundle)
    with refused(SEE):
        ImageEncoder(bundle)


def test_the_commands(tiny_bundle, tmp_path, capsys):
    import soundfile

    clip, photo = tmp_path / "clip.wav", tmp_path / "photo.png"
    soundfile.write(clip, np.zeros(16000, np.float32), 16000)
    PIL.Image.fromarray(seeing.picture(1, 8, 8)).save(photo)
    for arguments, message in (
        (("transcribe", clip), HEAR),
        (("translate", clip), HEAR),
        (("ask", clip, "What?"), HEAR),
        (("run", "What?", "--audio", clip), HEAR),
        (("run", "What?", "--image", photo), SEE),
        (("describe", photo), SEE),
    ):
        command, *rest = (str(argument) for argument in arguments)
        with pytest.raises(SystemExit) as end:
            cli.main([command, str(tiny_bundle), *rest])
        said = capsys.readouterr().err
        assert (end.value.code, message in said) == (3, True), (command, said)
