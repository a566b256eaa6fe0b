"""How the vision answers in this folder were made: transformers 5.23 and timm 1.0 in float32, eager
attention, on the checkpoints of the recipes beside it.

    python make_vision.py g3mm|g3n|mnv5 RECIPES OUT

Needs torch, transformers, timm and sentencepiece (and torchvision, or anything importable in its
place: the encoder never calls it). ``RECIPES`` is this folder, ``OUT`` gets NAME-vision.npz.
``mnv5`` is a MobileNetV5 with few narrow blocks, one of each kind.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import REFERENCE, values, write_checkpoint  # noqa: E402
from seeing import TINY_BLOCKS, TINY_EMBED, picture, squeezed  # noqa: E402

torch.set_grad_enabled(False)


def model_of(recipe, folder):
    from transformers import (
        Gemma3ForConditionalGeneration,
        Gemma3nForConditionalGeneration,
    )

    kind = {"g3n": Gemma3nForConditionalGeneration, "g3mm": Gemma3ForConditionalGeneration}[recipe]
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def soft_tokens(model, pixels):
    out = model.model.get_image_features(torch.tensor(pixels))
    return np.asarray(
        out.pooler_output if getattr(out, "pooler_output", None) is not None else out
    )[0]


def logits(model, ids, **media):
    return (
        model(input_ids=torch.tensor([ids]), use_cache=False, **media)
        .logits[0, -4:]
        .float()
        .numpy()
    )


def g3mm(folder, encode):
    model = model_of("g3mm", folder)
    config, n = model.config, model.config.mm_tokens_per_image
    images = [squeezed(picture(seed), config.vision_config.image_size, 0.5, 0.5) for seed in (6, 7)]
    image = [13, 10, *[config.image_token_index] * n, 768, 13]
    answers = {f"soft_{seed}": soft_tokens(model, pixels) for seed, pixels in zip((6, 7), images)}
    for name, ids, pixels in (
        ("one", [2, 8, *encode("user\n"), *image, *encode("Describe"), 9], images[:1]),
        (
            "two",
            [
                2,
                8,
                *encode("user\n"),
                *encode("First"),
                *image,
                *encode("and then"),
                *image,
                *encode("Compare them"),
                9,
            ],
            images,
        ),
    ):
        types = torch.tensor([[int(i == config.image_token_index) for i in ids]])
        answers |= {
            f"ids_{name}": np.array(ids),
            f"logits_{name}": logits(
                model, ids, token_type_ids=types, pixel_values=torch.tensor(np.concatenate(pixels))
            ),
        }
    return answers


def g3n(folder, encode):
    from transformers.models.gemma3n.feature_extraction_gemma3n import (
        Gemma3nAudioFeatureExtractor,
    )

    model = model_of("g3n", folder)
    config = model.config
    images = [squeezed(picture(seed), 768) for seed in (5, 8)]
    wave = np.load(REFERENCE / "g3n-audio.npz")["wave_0.9"]
    features = Gemma3nAudioFeatureExtractor()([wave], return_tensors="pt")
    audio = {
        "input_features": features["input_features"].float(),
        "input_features_mask": features["input_features_mask"].bool(),
    }
    image = [13, 10, *[config.image_token_id] * 256, config.eoi_token_id, 13]
    sound = [13, config.boa_token_id, *[config.audio_token_id] * 188, config.eoa_token_id, 13]
    user = [2, 8, *encode("user\n")]
    answers = {f"soft_{seed}": soft_tokens(model, pixels) for seed, pixels in zip((5, 8), images)}
    for name, ids, media in (
        ("one", [*user, *image, *encode("Describe"), 9], {"pixel_values": torch.tensor(images[0])}),
        (
            "two",
            [*user, *image, *encode("and"), *image, *encode("Compare them"), 9],
            {"pixel_values": torch.tensor(np.concatenate(images))},
        ),
        (
            "image_audio",
            [*user, *image, *encode("What is said here?"), *sound, 9],
            {"pixel_values": torch.tensor(images[0]), **audio},
        ),
        (
            "audio_image",
            [*user, *encode("Listen"), *sound, *encode("and look"), *image, *encode("Tell"), 9],
            {"pixel_values": torch.tensor(images[0]), **audio},
        ),
    ):
        answers |= {f"ids_{name}": np.array(ids), f"logits_{name}": logits(model, ids, **media)}
    return answers


def mnv5(folder, encode):
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
    answers = {
        "recipe": np.array(
            json.dumps(
                {
                    "seed": 7,
                    "config": {"model_type": "gemma3n", "vision_config": {"hidden_size": 2048}},
                    "tensors": shapes,
                }
            )
        )
    }

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    for size in (768, 512, 256):
        x = (
            tower(torch.tensor(squeezed(picture(5), size))).reshape(1, 2048, 256).permute(0, 2, 1)
            * 2048**0.5
        )
        x = (
            norm(x, bf16["model.embed_vision.soft_embedding_norm.weight"])
            @ bf16["model.embed_vision.embedding_projection.weight"].T
        )
        answers[f"soft_{size}"] = norm(x, 1.0)[0].numpy()
    return answers


if __name__ == "__main__":
    name, recipes, out = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        encode = None
        if name != "mnv5":
            import sentencepiece

            recipe = json.loads((Path(recipes) / f"{name}.json").read_text())
            if name == "g3n":  # its vision tensors are a recipe of their own
                recipe["tensors"] |= json.loads((Path(recipes) / "g3n-vision.json").read_text())[
                    "tensors"
                ]
            write_checkpoint(recipe, Path(folder))
            encode = sentencepiece.SentencePieceProcessor(str(REFERENCE / "tokenizer.model")).encode
        answers = {"g3mm": g3mm, "g3n": g3n, "mnv5": mnv5}[name](folder, encode)
    np.savez_compressed(Path(out) / f"{name}-vision.npz", **answers)
    print({key: value.shape for key, value in answers.items()})
