"""Does a new bundle run at all: a few greedy tokens, a picture and a sound, in
child processes, so that a native abort becomes an error of ours.

In: a bundle. Out: the text it generates. It does not judge text or soft tokens.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import BundleError

N_TOKENS = 8
_CHILD = "import sys; from edge_gemma.convert.trial import _main; _main(sys.argv[1])"
_ENCODERS = "import sys; from edge_gemma.convert.trial import _encode; _encode(sys.argv[1])"
_EMBED = "import sys; from edge_gemma.convert.trial import _embed; _embed(sys.argv[1])"
_SOUND_SAMPLES = 16_000  # one second


def try_out(bundle: Bundle) -> str:
    """A few greedy tokens after "The": that the new file loads and
    computes. Raises BundleError.
    """
    return _run(_CHILD, bundle.decoder_path, bundle.folder, "a short generation")


def try_embedding(bundle: Bundle) -> None:
    """A vector of one text: that a new bundle that embeds loads and
    computes. Raises BundleError.
    """
    _run(_EMBED, bundle.folder, bundle.folder, "embedding a text")


def try_encoders(bundle: Bundle) -> bool:
    """Run each encoder of the bundle once. False when onnxruntime is not installed, which
    converting does not need. Raises BundleError.
    """
    manifest = bundle.manifest
    if manifest.audio is None and manifest.vision is None:
        return True
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    _run(_ENCODERS, bundle.folder, bundle.folder, "running an encoder")
    return True


def _run(child: str, argument: Path, folder: Path, what: str) -> str:
    """What ``child`` prints when it is given ``argument``. Raises BundleError."""
    command = [sys.executable, "-c", child, str(argument)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        how = f"stopped with signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise BundleError(f"{folder} was written, but {what} {how}: {reason}")
    return done.stdout


def _encode(folder: str) -> None:
    """The child that runs the encoders: nothing is printed, or it leaves with a message."""
    bundle = Bundle.open(folder)
    noise = np.random.default_rng(0)
    if bundle.manifest.vision is not None:
        from edge_gemma.seeing.encoder import ImageEncoder

        size = min(bundle.manifest.vision.image_sizes)
        pixels = noise.uniform(-1, 1, (1, 3, size, size)).astype(np.float32)
        with ImageEncoder(bundle, size=size, n_threads=1) as pictures:
            _check_soft_tokens("vision", pictures.encode(pixels))
    if bundle.manifest.audio is not None:
        from edge_gemma.hearing.encoder import AudioEncoder

        samples = noise.uniform(-0.1, 0.1, _SOUND_SAMPLES).astype(np.float32)
        with AudioEncoder(bundle, n_threads=1) as sounds:
            _check_soft_tokens("audio", sounds.encode(samples))


def _check_soft_tokens(encoder: str, soft: np.ndarray) -> None:
    if not np.isfinite(soft).all() or not len(soft):
        sys.exit(f"the soft tokens of the {encoder} encoder are not finite")


def _embed(folder: str) -> None:
    """The child that embeds: nothing is printed, or it leaves with a message."""
    from edge_gemma.engines.llama.decoder import Decoder
    from edge_gemma.plan.records import Settings

    bundle = Bundle.open(folder)
    decoder = Decoder(bundle.decoder_path, Settings(n_ctx=64, n_threads=1, repack=False))
    vectors = decoder.embedder().embed([[decoder.bos, *decoder.tokenize("The")]])
    if not np.isfinite(vectors).all():
        sys.exit("the vector is not finite")
    decoder.close()


def _main(decoder_path: str) -> None:
    """The child: print what the model says, or leave with a message."""
    from edge_gemma.engines.llama.decoder import Decoder
    from edge_gemma.plan.records import Settings
    from edge_gemma.spans import Tokens

    settings = Settings(n_ctx=64, n_ubatch=32, n_threads=1, repack=False)
    decoder = Decoder(Path(decoder_path), settings)
    context = decoder.context()
    ids = [decoder.bos] if decoder.add_bos else []
    ids += decoder.tokenize("The")
    context.decode(0, 0, Tokens(tuple(ids)), outputs="last")
    said: list[int] = []
    for position in range(len(ids), len(ids) + N_TOKENS):
        logits = context.logits()
        if not np.isfinite(logits).all():
            sys.exit("the logits are not finite")
        said.append(int(logits.argmax()))
        context.decode_step([(0, position, said[-1:])])
    text = b"".join(decoder.piece(token, special=True) for token in said)
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
    decoder.close()
