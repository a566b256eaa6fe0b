"""How NAME-text.npz were made: transformers in float32 on the checkpoints of the recipes beside
them.

    PYTHONPATH=tests python tests/reference/make_text.py g3text|g3mm|g3n OUT

OUT gets NAME-text.npz, and it is printed how far that is from the stored one. Needs what
transformers_models.py says. The 301 ids are the question, not an answer: BOS and 300 ids of an
English text (more than a sliding window), of which only the ids are kept.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers_models import REFERENCE, load, logits, report

N_GREEDY, N_PROMPT = 16, 40


def answers_of(name: str, model) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / f"{name}-text.npz") as stored:
        ids = stored["input_ids"]
    rows = logits(model, ids)
    log_p = torch.log_softmax(torch.tensor(rows[:-1]), -1)
    nll = -log_p[range(len(ids) - 1), ids[1:]].mean()
    text = ids[:N_PROMPT].tolist()
    for _ in range(N_GREEDY):
        text.append(int(logits(model, text)[-1].argmax()))
    return {
        "input_ids": ids,
        "logits_last8": rows[-8:],
        "nll": nll.numpy(),
        "greedy": np.array(text[N_PROMPT:]),
    }


if __name__ == "__main__":
    name, out = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        answers = answers_of(name, load(name, Path(folder)))
    report(Path(out) / f"{name}-text.npz", answers)
