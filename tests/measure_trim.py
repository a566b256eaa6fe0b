"""What a cut vocabulary costs on texts of one's own: bits per character, tokens, equal logits.

    python tests/measure_trim.py WHOLE CUT TEXT…

Both bundles are of one model; TEXT must not have chosen the tokens. Decode speed and memory are
`edge-gemma bench compare CUT --also edge-gemma=WHOLE`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.trim.choice import Choice
from edge_gemma.convert.trim.cut import read_kept
from edge_gemma.convert.trim.receipt import receipt_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("whole", type=Path)
    parser.add_argument("cut", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    whole, cut = Bundle.open(given.whole), Bundle.open(given.cut)
    kept = read_kept(cut)
    assert kept is not None, f"{given.cut} was not cut"
    texts = {path.stem: path.read_text("utf-8") for path in given.texts}
    choice = Choice(kept, 1.0, tuple(texts), ())
    found = receipt_of(
        whole.decoder_path,
        cut.decoder_path,
        choice,
        measure=True,
        n_threads=given.threads,
        texts=texts,
    )
    for name, figures in found.items():
        before, after = figures["bits_per_character_before"], figures["bits_per_character_after"]
        print(f"{name}: bits {before:.4f} → {after:.4f} ({after / before - 1:+.2%})")
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
