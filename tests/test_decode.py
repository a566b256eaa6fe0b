"""The wall before llama.cpp: rows as transformers reads them, what is repacked, rewinds,
cancelling, and no native aborts.
"""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest
from checkpoints import REFERENCE, write_checkpoint

from edge_gemma.benchmarks.dev.synthetic import Types, tiny_gguf
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.gguf import GGML_TYPES
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.engines.llama.decoder import Decoder
from edge_gemma.engines.llama.library import repacks
from edge_gemma.errors import BundleError, Cancelled, UsageError
from edge_gemma.plan.records import Settings
from edge_gemma.prompts.prompt import read_special_rows
from edge_gemma.spans import Rows, Tokens

TOLERANCE = (
    0.04  # specs: llama.cpp's f16 GELU table and its top-k statistics against float32 transformers
)


@pytest.fixture(scope="module")
def gemma3n(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("g3n")
    write_checkpoint("g3n", folder / "checkpoint", keep=lambda name: "_tower" not in name)
    return convert(
        folder / "checkpoint",
        folder / "bundle",
        Conversion(quant="f32", verify=False, audio="none", vision="none"),
    ).bundle


@pytest.fixture
def decoder(gemma3n):
    made = Decoder(gemma3n.decoder_path, Settings(n_ctx=512, n_ubatch=256, n_threads=1))
    yield made
    made.close()


@pytest.mark.parametrize("seconds", ["0.9", "6.3"])
def test_rows_and_special_rows_answer_as_transformers(gemma3n, decoder, seconds):
    """Soft tokens, padding rows and the end-of-audio row all as embeddings; the ids around them as
    tokens.
    """
    reference = np.load(REFERENCE / "g3n-audio.npz")
    prompt, soft = reference[f"audio_prompt_{seconds}"].tolist(), reference[f"audio_soft_{seconds}"]
    special = read_special_rows(gemma3n)
    slots = [
        i
        for i, token in enumerate(prompt)
        if token >= gemma3n.manifest.decoder.n_vocab or prompt.count(token) == 188
    ]
    first, n = slots[0], 188
    rows = np.concatenate(
        [soft, *[special["audio_padding"][None]] * (n - len(soft)), special["end_of_audio"][None]]
    )
    spans = [Tokens(prompt[:first]), Rows(rows), Tokens(prompt[first + n + 1 :])]
    context = decoder.context(n_outputs=64)
    logits = np.concatenate(list(context.evaluate(spans, range(len(prompt) - 4, len(prompt)))))
    expected = reference[f"audio_logits_{seconds}"]
    assert np.abs(logits - expected).max() < TOLERANCE
    first, second = -np.sort(-expected, axis=1)[:, :2].T
    clear = first - second > TOLERANCE  # ties within the tolerance may fall either way
    assert clear.any()
    np.testing.assert_array_equal(logits[clear].argmax(1), expected[clear].argmax(1))


def test_the_end_row_matters(gemma3n, decoder):
    """The plain id of end-of-audio is another row than the one the model was trained with: it must
    not pass for it.
    """
    reference = np.load(REFERENCE / "g3n-audio.npz")
    special, soft = read_special_rows(gemma3n), reference["audio_soft_0.9"]
    context = decoder.context(n_outputs=64)
    right = np.concatenate(
        list(
            context.evaluate(
                [
                    Tokens([2]),
                    Rows(np.concatenate([soft, special["end_of_audio"][None]])),
                    Tokens([9]),
                ]
            )
        )
    )[-1]
    wrong = np.concatenate(
        list(
            context.evaluate(
                [Tokens([2]), Rows(soft), Tokens([gemma3n.manifest.decoder.n_vocab - 1, 9])]
            )
        )
    )[-1]
    assert np.abs(right - wrong).max() > TOLERANCE


@pytest.mark.parametrize("family", ["gemma3", "gemma3n"])
@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q6_k", "q4_k", "iq4_nl", "f16"])
def test_the_probe_knows_what_the_loader_repacks(family, kind, tmp_path):
    if family == "gemma3n" and kind.endswith("_k"):
        pytest.skip("LAuReL's rows of 64 take no K-quant")
    from edge_gemma.bundles.description import describe
    from edge_gemma.engines.llama.weights import repacked_here

    path = tiny_gguf(tmp_path / "x.gguf", family, types=Types(kind, "q8_0"), head_dim=64)
    decoder = Decoder(path, Settings(n_ctx=64))
    reported = decoder.reported_bytes().get("CPU_REPACK model", 0)
    decoder.close()
    probed = sum(
        t.nbytes for t in describe(path).decoder.tensors if t.use != "lookup" and repacked_here(t)
    )
    assert abs(probed - reported) < 20_000


def test_the_probe_looks_at_shapes():
    q4_0 = next(k for k, (name, *_) in GGML_TYPES.items() if name == "Q4_0")
    if not repacks(q4_0, 1024, 640):
        pytest.skip("this CPU repacks no Q4_0")
    assert not repacks(q4_0, 1024, 63)


def logits(context, spans) -> np.ndarray:
    context.clear(0)
    position = 0
    for span in spans:
        context.decode(0, position, span, "last")
        position += len(span)
    return context.logits().copy()


def test_a_rewind_is_right_or_refused(decoder):
    """Within the window the cells are there; beyond it llama.cpp would answer wrongly, so the
    rewind says no.
    """
    ids = [2, *range(20, 220)]
    context = decoder.context(Settings(n_ctx=512, n_ubatch=32, n_threads=1))
    fresh = logits(context, [Tokens(ids[:100]), Tokens(ids[100:120])])
    context.clear(0)
    context.decode(0, 0, Tokens(ids[:100]))
    context.decode(0, 100, Tokens(range(300, 310)))
    assert context.rewind(0, 100)
    context.decode(0, 100, Tokens(ids[100:120]), "last")
    np.testing.assert_array_equal(context.logits(), fresh)
    long = Tokens([3 + i % 500 for i in range(500)])
    context.clear(0)
    context.decode(0, 0, long)
    refused = not context.rewind(0, 10)
    assert refused == (decoder.n_swa < 450) and (not refused or context.length(0) == 0)


def test_cancel_stops_within_a_prefill_and_leaves_the_rest_intact(decoder):
    context = decoder.context(Settings(n_ctx=512, n_ubatch=16, n_threads=1))
    ids = Tokens([5 + i % 400 for i in range(480)])
    begun = time.perf_counter()
    context.decode(0, 0, ids)
    whole_s = time.perf_counter() - begun
    context.clear(0)
    timer = threading.Timer(whole_s / 3, context.cancel)
    timer.start()
    with pytest.raises(Cancelled) as stop:
        context.decode(0, 0, ids)
    timer.join()
    assert context.length(0) == stop.value.position < 480
    context.clear_cancel()
    rest = Tokens(ids.ids[stop.value.position :])
    context.decode(0, stop.value.position, rest, "last")
    np.testing.assert_array_equal(context.logits(), logits(context, [ids]))


def test_what_llama_cpp_would_assert_on_is_refused_first(decoder):
    context = decoder.context()
    with pytest.raises(UsageError, match="token ids must be 0"):
        context.decode(0, 0, Tokens([decoder.n_vocab]))
    with pytest.raises(UsageError, match="logits rows asked of a context made for 1"):
        context._out[:] = 1
        context._run(2, {0: 0})
    with pytest.raises(UsageError, match="7 wide"):
        context.decode(0, 0, Rows(np.zeros((1, 7), np.float32)))
    with pytest.raises(UsageError, match="need n_ubatch ≥ 257"):
        context.decode(0, 0, Rows(np.zeros((257, decoder.n_embd), np.float32), causal=False))
    with pytest.raises(UsageError, match="NaN"):
        Rows(np.full((1, 7), np.nan, np.float32))


def test_a_file_llama_cpp_refuses_is_our_error(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BundleError, match="could not load"):
        Decoder(tmp_path / "x.gguf", Settings(n_ctx=64))


def test_a_load_can_be_stopped(gemma3n):
    with pytest.raises(KeyboardInterrupt):
        Decoder(gemma3n.decoder_path, Settings(n_ctx=64), on_progress=lambda fraction: False)


class _Interrupting(list):
    """A log that Ctrl-C is pressed in: inside a callback of llama.cpp, where what is raised would
    be printed and forgotten.
    """

    def append(self, line):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, which a test run in the background (`nohup make test &`) does
    not have.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_callback_of_llama_cpp_is_kept(gemma3n, decoder, ctrl_c, monkeypatch, capsys):
    settings = Settings(n_ctx=64, n_ubatch=64, n_threads=1)
    with pytest.raises(KeyboardInterrupt):
        Decoder(
            gemma3n.decoder_path,
            settings,
            on_progress=lambda fraction: signal.raise_signal(signal.SIGINT),
        )
    watching = decoder.context(
        on_tensor=lambda pointer, ask: bool(signal.raise_signal(signal.SIGINT))
    )
    with pytest.raises(KeyboardInterrupt):
        watching.decode(0, 0, Tokens([2, 3]))
    monkeypatch.setattr("edge_gemma.engines.llama.library._log_tail", _Interrupting())
    with pytest.raises(KeyboardInterrupt):
        Decoder(gemma3n.decoder_path, settings)
    with pytest.raises(KeyboardInterrupt):
        decoder.context(settings)
    assert (
        "Exception ignored" not in capsys.readouterr().err
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


def test_tokens_round_trip(decoder):
    for text in ("", "hello", "a  b\n\nc", "déjà vu 🙂", "<end_of_turn>"):
        assert b"".join(decoder.piece(t) for t in decoder.tokenize(text)).decode() == text
