"""The reference vision modules in torch, for `dev/vision.py --torch-python`: run them, or export
them to ONNX.

Stands alone: it is started by another interpreter, one with torch, transformers and timm, and
imports nothing of this package.

    python torch_vision.py export FOLDER KIND OUT.onnx
    python torch_vision.py worker FOLDER KIND THREADS    pictures in, soft tokens out
"""

import json
import sys

import numpy as np

SIZES = {"siglip": 896, "mobilenetv5": 768}  # pixels a side


def module(folder: str, kind: str):
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModel

    torch.set_grad_enabled(False)
    with open(f"{folder}/config.json") as file:
        config = json.load(file)
    vision = AutoConfig.for_model(**config["vision_config"])
    n_embd = config["text_config"]["hidden_size"]

    class Siglip(torch.nn.Module):
        def __init__(self):
            from transformers import Gemma3Config
            from transformers.models.gemma3.modeling_gemma3 import (
                Gemma3MultiModalProjector,
            )

            super().__init__()
            self.vision_tower = AutoModel.from_config(vision)
            whole = Gemma3Config(
                text_config={"hidden_size": n_embd},
                vision_config=config["vision_config"],
                mm_tokens_per_image=config["mm_tokens_per_image"],
            )
            self.multi_modal_projector = Gemma3MultiModalProjector(whole)

        def forward(self, pixels):
            return self.multi_modal_projector(
                self.vision_tower(pixel_values=pixels).last_hidden_state
            )

    class MobileNet(torch.nn.Module):
        def __init__(self):
            from transformers import Gemma3nTextConfig
            from transformers.models.gemma3n.modeling_gemma3n import (
                Gemma3nMultimodalEmbedder,
            )

            super().__init__()
            self.vision_tower = AutoModel.from_config(vision)
            self.embed_vision = Gemma3nMultimodalEmbedder(
                vision, Gemma3nTextConfig(hidden_size=n_embd)
            )

        def forward(self, pixels):
            hidden = self.vision_tower(pixel_values=pixels, do_pooling=False).last_hidden_state
            hidden = (
                hidden.reshape(hidden.shape[0], vision.hidden_size, 256).permute(0, 2, 1)
                * vision.hidden_size**0.5
            )
            return self.embed_vision(inputs_embeds=hidden)

    found = (Siglip if kind == "siglip" else MobileNet)().eval().float()
    wanted = set(found.state_dict())
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        stored = {name[len("model.") :]: name for name in file.keys()}
        weights = {name: file.get_tensor(stored[name]).float() for name in wanted if name in stored}
    missing = [
        name
        for name in wanted - set(weights)
        if ".head." not in name and "post_projection" not in name
    ]
    if missing:
        raise SystemExit(f"the checkpoint lacks {missing[:4]}")
    found.load_state_dict(weights, strict=False)
    return found


def normalized(kind: str, pixels: np.ndarray) -> np.ndarray:  # [1, 3, size, size] float32
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) / np.float32(255)
    half = np.float32(0.5)
    return (planes - half) / half if kind == "siglip" else planes


def export(folder: str, kind: str, out: str) -> None:
    import torch

    size = SIZES[kind]
    example = torch.zeros((1, 3, size, size))
    torch.onnx.export(
        module(folder, kind),
        (example,),
        out,
        input_names=["pixels"],
        external_data=True,
        dynamo=True,
    )


def worker(folder: str, kind: str, threads: str) -> None:
    """Standard input: pictures of SIZES[kind] a side, 3 bytes a pixel. Standard output: "ready",
    then for each picture a JSON line with the shape of its rows and their float32 bytes.
    """
    import torch

    encoder, size = module(folder, kind), SIZES[kind]
    torch.set_num_threads(int(threads))
    out = sys.stdout.buffer
    out.write(b"ready\n")
    out.flush()
    while data := sys.stdin.buffer.read(size * size * 3):
        pixels = np.frombuffer(data, np.uint8).reshape(size, size, 3)
        rows = encoder(torch.tensor(normalized(kind, pixels))).numpy().astype(np.float32)
        out.write(json.dumps(list(rows.shape)).encode() + b"\n" + rows.tobytes())
        out.flush()


if __name__ == "__main__":
    {"export": export, "worker": worker}[sys.argv[1]](*sys.argv[2:])
