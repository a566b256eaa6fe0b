"""Does a new bundle run at all: a few greedy tokens, in a child process, so
that a native abort becomes an error of ours.

In: a bundle. Out: the text it generates. It does not judge the text.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import BundleError

N_TOKENS = 8
_CHILD = "import sys; from edge_gemma.convert.trial import _main; _main(sys.argv[1])"


def try_out(bundle: Bundle) -> str:
    """A few greedy tokens after "The": that the new file loads and
    computes. Raises BundleError.
    """
    command = [sys.executable, "-c", _CHILD, str(bundle.decoder_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        how = f"stopped with signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise BundleError(f"{bundle.folder} was written, but a short generation {how}: {reason}")
    return done.stdout


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
        context.decode_step([(0, position, said[-1])])
    text = b"".join(decoder.piece(token, special=True) for token in said)
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
    decoder.close()
