"""How g3n-audio.npz was made: transformers' Gemma 3n in float32 on clips of 0.9 and 6.3 seconds.

    PYTHONPATH=tests python tests/reference/make_audio.py OUT

OUT gets g3n-audio.npz, and it is printed how far that is from the stored one. Needs what
transformers_models.py says. For each clip: the samples, their log-mel, the soft tokens in the
decoder's space, a prompt with 188 places for them, and the logits of its last 4 positions.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers_models import encode, load, logits, report

RATE_HZ = 16_000
N_SLOTS = 188  # what the processor reserves for any clip
SECONDS = (0.9, 6.3)


def wave(seconds: float) -> np.ndarray:
    """A rising tone that beats three times a second, in noise: [n] float32."""
    noise = np.random.default_rng(int(seconds * 10))
    t = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    tone = np.sin(2 * np.pi * (150 + 400 * t / seconds) * t)
    beat = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * t)
    return (0.2 * tone * beat + 0.02 * noise.standard_normal(t.size)).astype(np.float32)


def answers_of(model) -> dict[str, np.ndarray]:
    from transformers.models.gemma3n.feature_extraction_gemma3n import (
        Gemma3nAudioFeatureExtractor,
    )

    config, extract = model.config, Gemma3nAudioFeatureExtractor()
    sound = [config.boa_token_id, *[config.audio_token_id] * N_SLOTS, config.eoa_token_id]
    prompt = [2, 8, *encode("user\n"), 13, *sound, 13, *encode("Transcribe this"), 9]
    answers: dict[str, np.ndarray] = {}
    for seconds in SECONDS:
        samples = wave(seconds)
        made = extract([samples], return_tensors="pt")
        mel, mask = made["input_features"].float(), made["input_features_mask"].bool()
        soft = model.model.get_audio_features(mel, ~mask).pooler_output
        rows = logits(model, prompt, input_features=mel, input_features_mask=mask)
        answers |= {
            f"wave_{seconds}": samples,
            f"mel_{seconds}": mel.numpy()[0],
            f"audio_soft_{seconds}": np.asarray(soft)[0],
            f"audio_prompt_{seconds}": np.array(prompt),
            f"audio_logits_{seconds}": rows[-4:],
        }
    return answers


if __name__ == "__main__":
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        answers = answers_of(load("g3n", Path(folder)))
    report(Path(sys.argv[1]) / "g3n-audio.npz", answers)
