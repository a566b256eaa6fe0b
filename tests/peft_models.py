"""A small checkpoint with an adapter, computed by PEFT and by this package. Needs torch,
transformers and peft; imported by slow tests only.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from edge_gemma.convert.lora import convert_lora
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.engines.llama import decoder as decode
from edge_gemma.plan.records import Settings
from edge_gemma.spans import Tokens

IDS = tuple(range(2, 60))


def base_model(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )


def logits_of_peft(checkpoint: Path, adapter: Path | None) -> np.ndarray:
    """[58, n_vocab] of fixed ids, the adapter applied as PEFT applies it; None: without one."""
    model = base_model(checkpoint)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, among others
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        return model.eval()(torch.tensor([IDS])).logits[0].float().numpy()


def logits_here(
    checkpoint: Path, adapter: Path, folder: Path, *, at_run_time: bool = True
) -> list[np.ndarray]:
    """The same, by a GGUF adapter at run time (if asked for), and merged into the weights."""
    exact = Conversion(quant="f32", verify=False)
    found = []
    if at_run_time:
        plain = convert(checkpoint, folder / "exact", exact).bundle
        convert_lora(adapter, checkpoint, folder / "exact.gguf")
        found.append(_logits(plain.decoder_path, [(folder / "exact.gguf", 1.0)]))
    options = Conversion(quant="f32", verify=False, merge=((adapter, 1.0),))
    found.append(_logits(convert(checkpoint, folder / "merged", options).bundle.decoder_path))
    return found


def _logits(path: Path, lora: list[tuple[Path, float]] | None = None) -> np.ndarray:
    settings = Settings(n_ctx=128, n_ubatch=128, n_threads=1, repack=False)
    decoder = decode.Decoder(path, settings, lora=lora or [])
    try:
        return np.concatenate(list(decoder.context(n_outputs=128).evaluate([Tokens(IDS)])))
    finally:
        decoder.close()
