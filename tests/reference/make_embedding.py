"""How gemma-embedding.npz was made: sentence-transformers in float32 on the checkpoints of
tests/embedding.py, the small one and one of the real model's shape (24 layers, 768 wide).

    PYTHONPATH=tests python tests/reference/make_embedding.py OUT

OUT gets gemma-embedding.npz. Needs torch 2.14, transformers 5.24, sentence-transformers 6.2 and
the `dev` extra. For each size and prompt: vectors of all texts ``[n, width]`` float32, and the
token ids of each text with its prompt.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from embedding import SIZES, TEXTS, write_embedding
from sentence_transformers import SentenceTransformer

KINDS = {"query": "query", "document": "document", "none": None}


def answers_of(size: str, folder: Path) -> dict[str, np.ndarray]:
    write_embedding(folder, size)
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    answers = {}
    for kind, prompt in KINDS.items():
        answers[f"{size}/{kind}"] = model.encode(
            list(TEXTS), prompt_name=prompt, batch_size=1, convert_to_numpy=True
        )
        text = model.prompts[prompt] if prompt else ""
        rows = [model.tokenizer(text + each)["input_ids"] for each in TEXTS]
        answers[f"ids/{kind}"] = np.array([id for row in rows for id in [*row, -1]], np.int32)
    answers[f"{size}/query 128"] = model.encode(
        list(TEXTS), prompt_name="query", truncate_dim=128, normalize_embeddings=True
    )
    return answers


if __name__ == "__main__":
    answers = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            answers |= answers_of(size, Path(folder) / "checkpoint")
    np.savez_compressed(Path(sys.argv[1]) / "gemma-embedding.npz", **answers)
    for key, value in answers.items():
        print(key, value.shape, value.dtype)
