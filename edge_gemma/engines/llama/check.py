"""Does llama.cpp run a decoder at all: loaded as ``run`` loads it, and one token decoded.

In: a bundle's folder and its manifest, which need not be written yet. Out: nothing, or an error of
ours. It happens in a child process, because llama.cpp aborts on some files.

What it takes: the child maps the file and lets go of what is cold, like any load (weights.py);
nothing is repacked and the context is small. Its memory is what llama.cpp allocates for the
vocabulary and one token, and clean file pages, which the kernel takes back when it needs them.
Measured with E2B of 3.5 GB: 83 MiB allocated, 1.3 GiB of pages of the matrices; where memory may
not be locked, all 3.3 GiB are mapped for a moment. It passes in a control group of 512 MiB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import Manifest, decode_manifest, encode_manifest
from edge_gemma.errors import BundleError, EdgeGemmaError

_CHILD = "import sys; from edge_gemma.engines.llama import check; check.main(sys.argv[1])"
# reading 3.5 GB off a slow card takes two minutes
_PATIENCE_S = 1800


def check_runs(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError: llama.cpp refuses the decoder, dies of it, or computes no numbers."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder)],
        input=encode_manifest(manifest),
        capture_output=True,
        timeout=_PATIENCE_S,
    )
    if done.returncode == 0:
        return
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
    how = "refuses it"
    if done.returncode < 0:
        how = f"stops with signal {-done.returncode} on it"
    raise BundleError(
        f"{manifest.source.origin}: llama.cpp {how}: {said[0]}. The file is damaged, incomplete or "
        "not for this version"
    )


def main(folder: str) -> None:
    """The child: the manifest comes on standard input."""
    import numpy as np

    from edge_gemma.engines.llama.weights import Weights
    from edge_gemma.plan.records import Plan, Settings
    from edge_gemma.spans import Tokens

    manifest = decode_manifest(sys.stdin.buffer.read())
    settings = Settings(n_ctx=64, n_ubatch=32, repack=False)
    plan = Plan(True, 0, 0, 0, 0, (), settings, ())  # nothing is weighed here
    try:
        with Weights(Bundle(Path(folder), manifest), plan) as weights:
            begin = manifest.special_tokens.get("bos", 0)
            if manifest.embedding is not None:
                answer = weights.decoder.embedder().embed([[begin]])
            else:
                context = weights.decoder.context()
                context.decode(0, 0, Tokens((begin,)), outputs="last")
                answer = context.logits()
            if not np.isfinite(answer).all():
                sys.exit("its first answer is not finite")
    except EdgeGemmaError as error:
        sys.exit(" ".join(str(error).split()))
