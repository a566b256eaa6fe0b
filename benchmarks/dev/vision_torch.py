"""The reference vision modules in torch, for `benchmarks/vision.py --torch-python`: run them, or
export them to ONNX.

Stands alone: it is started by another interpreter, one with torch, transformers and timm, and
imports nothing of this package.
"""

import json
import sys
import time

import numpy as np


def module(folder: str, kind: str):
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModel

    torch.set_grad_enabled(False)
    config = json.load(open(f"{folder}/config.json"))
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


def pixels(kind: str) -> np.ndarray:
    size = {"siglip": 896, "mobilenetv5": 768}[kind]
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:size, 0:size]
    values = np.stack(
        [255 * x / size, 255 * y / size, 127 + 127 * np.sin((x + y) / 37)], -1
    ) + rng.normal(0, 8, (size, size, 3))
    scaled = np.ascontiguousarray(
        values.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)[None], np.float32
    ) / np.float32(255)
    return (scaled - np.float32(0.5)) / np.float32(0.5) if kind == "siglip" else scaled


def main(command: str, folder: str, kind: str, last: str) -> None:
    import torch

    encoder = module(folder, kind)
    if command == "export":
        torch.onnx.export(
            encoder,
            (torch.tensor(pixels(kind)),),
            last,
            input_names=["pixels"],
            external_data=True,
            dynamo=True,
        )
        return
    torch.set_num_threads(int(last))
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        rows = encoder(torch.tensor(pixels(kind))).numpy()
        print(
            json.dumps(
                {
                    "seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                    "probe": rows.astype(np.float64).reshape(-1)[::997].tolist(),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
