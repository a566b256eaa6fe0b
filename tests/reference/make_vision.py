"""How NAME-vision.npz were made: transformers and timm 1.0 in float32, eager attention, on the
checkpoints of the recipes beside them.

    PYTHONPATH=tests python tests/reference/make_vision.py g3mm|g3n|mnv5 OUT

OUT gets NAME-vision.npz, and it is printed how far that is from the stored one. Needs what
transformers_models.py says. ``mnv5`` is a MobileNetV5 with few narrow blocks, one of each kind; its
recipe is stored with its answers. ``g3n`` writes a checkpoint of 660 MB.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from checkpoints import values
from seeing import TINY_BLOCKS, TINY_EMBED, picture, squeezed
from transformers_models import (
    REFERENCE,
    encode,
    load,
    logits,
    report,
    stand_in_for_torchvision,
)


def soft_tokens(model, pixels):
    out = model.model.get_image_features(torch.tensor(pixels))
    return np.asarray(
        out.pooler_output if getattr(out, "pooler_output", None) is not None else out
    )[0]


def g3mm(model):
    config, n = model.config, model.config.mm_tokens_per_image
    size = config.vision_config.image_size
    images = [squeezed(picture(seed), size, 0.5, 0.5) for seed in (6, 7)]
    image = [13, 10, *[config.image_token_index] * n, 768, 13]
    user = [2, 8, *encode("user\n")]
    one = [*user, *image, *encode("Describe"), 9]
    two = [*user, *encode("First"), *image, *encode("and then"), *image]
    two += [*encode("Compare them"), 9]
    answers = {
        f"soft_{seed}": soft_tokens(model, pixels)
        for seed, pixels in zip((6, 7), images, strict=True)
    }
    for name, ids, pixels in (("one", one, images[:1]), ("two", two, images)):
        rows = logits(
            model,
            ids,
            token_type_ids=torch.tensor([[int(i == config.image_token_index) for i in ids]]),
            pixel_values=torch.tensor(np.concatenate(pixels)),
        )
        answers |= {f"ids_{name}": np.array(ids), f"logits_{name}": rows[-4:]}
    return answers


def g3n(model):
    from transformers.models.gemma3n.feature_extraction_gemma3n import (
        Gemma3nAudioFeatureExtractor,
    )

    config = model.config
    images = [squeezed(picture(seed), 768) for seed in (5, 8)]
    wave = np.load(REFERENCE / "g3n-audio.npz")["wave_0.9"]
    features = Gemma3nAudioFeatureExtractor()([wave], return_tensors="pt")
    audio = {
        "input_features": features["input_features"].float(),
        "input_features_mask": features["input_features_mask"].bool(),
    }
    one_image = {"pixel_values": torch.tensor(images[0])}
    two_images = {"pixel_values": torch.tensor(np.concatenate(images))}
    image = [13, 10, *[config.image_token_id] * 256, config.eoi_token_id, 13]
    sound = [13, config.boa_token_id, *[config.audio_token_id] * 188, config.eoa_token_id, 13]
    user = [2, 8, *encode("user\n")]
    one = [*user, *image, *encode("Describe"), 9]
    two = [*user, *image, *encode("and"), *image, *encode("Compare them"), 9]
    image_audio = [*user, *image, *encode("What is said here?"), *sound, 9]
    audio_image = [*user, *encode("Listen"), *sound, *encode("and look"), *image]
    audio_image += [*encode("Tell"), 9]
    answers = {
        f"soft_{seed}": soft_tokens(model, pixels)
        for seed, pixels in zip((5, 8), images, strict=True)
    }
    for name, ids, media in (
        ("one", one, one_image),
        ("two", two, two_images),
        ("image_audio", image_audio, one_image | audio),
        ("audio_image", audio_image, one_image | audio),
    ):
        rows = logits(model, ids, **media)
        answers |= {f"ids_{name}": np.array(ids), f"logits_{name}": rows[-4:]}
    return answers


def mnv5():
    stand_in_for_torchvision()
    from timm.layers import RmsNorm2d
    from timm.models import mobilenetv5
    from timm.models._efficientnet_builder import decode_arch_def

    tower = mobilenetv5.MobileNetV5Encoder(
        decode_arch_def(TINY_BLOCKS, group_size=None),
        stem_size=16,
        pad_type="same",
        norm_layer=RmsNorm2d,
        layer_scale_init_value=1e-5,
        round_chs_fn=lambda c: int(c),
    )
    prefix = "model.vision_tower.timm_model."
    shapes = {
        prefix + name: list(value.shape) for name, value in tower.state_dict().items()
    } | TINY_EMBED
    weights = {name: values(name, tuple(shape), 7, "gemma3n") for name, shape in shapes.items()}
    bf16 = {name: torch.tensor(value).bfloat16().float() for name, value in weights.items()}
    tower.load_state_dict(
        {name[len(prefix) :]: value for name, value in bf16.items() if name.startswith(prefix)}
    )
    tower.eval()
    config = {"model_type": "gemma3n", "vision_config": {"hidden_size": 2048}}
    recipe = {"seed": 7, "config": config, "tensors": shapes}
    answers = {"recipe": np.array(json.dumps(recipe))}

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    for size in (768, 512, 256):
        pooled = tower(torch.tensor(squeezed(picture(5), size)))
        x = pooled.reshape(1, 2048, 256).permute(0, 2, 1) * 2048**0.5
        x = norm(x, bf16["model.embed_vision.soft_embedding_norm.weight"])
        x = x @ bf16["model.embed_vision.embedding_projection.weight"].T
        answers[f"soft_{size}"] = norm(x, 1.0)[0].numpy()
    return answers


if __name__ == "__main__":
    name, out = sys.argv[1:]
    if name == "mnv5":
        answers = mnv5()
    else:
        with tempfile.TemporaryDirectory() as folder:
            model = load(name, Path(folder), with_vision=True)
        answers = {"g3mm": g3mm, "g3n": g3n}[name](model)
    report(Path(out) / f"{name}-vision.npz", answers)
