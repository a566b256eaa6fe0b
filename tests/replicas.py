"""How real Gemma 3 and 3n repositories are laid out, on checkpoints of a few MB.

A layout is a function ``(folder) -> None`` in :data:`LAYOUTS`: it writes a repository as somebody
publishes it (names, files, configs, tokenizers). All of one family hold the same decoder, tower and
tokens, those of ``reference/{g3text,g3mm,g3n}.json``, so that whatever becomes of a layout can be
held against what becomes of the plain checkpoint. Sources: the file lists, configs and code of
Google's repositories, transformers 4.57 and 5.24, mlx-vlm, mlx-lm and PEFT.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import REFERENCE, recipe, values
from prompts import TEMPLATE
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
GENERATION = {
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "do_sample": True,
    "eos_token_id": [1, 9],
    "pad_token_id": 0,
    "top_k": 64,
    "top_p": 0.95,
    "transformers_version": "4.50.0.dev0",
}
TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "tokenizer_class": "GemmaTokenizer",
}
N_LAYER_3N, N_FF_3N = 22, 256
# What transformers 5 writes into every config and no model reads
_NOISE = ("id2label", "label2id", "return_dict", "problem_type", "chunk_size_feed_forward")


# --- the one checkpoint of each family ---


def plain_tensors(name: str) -> Tensors:
    """float32 by the names that transformers 5 writes."""
    data = recipe(name)
    family = "gemma3n" if name == "g3n" else "gemma3"
    found = {
        stored: values(stored, tuple(shape), data["seed"], family)
        for stored, shape in data["tensors"].items()
        if name != "g3n" or "vision_tower" not in stored  # a MobileNetV5 of real size
    }
    return _fewer(found) if name == "g3n" else found


def _fewer(tensors: Tensors) -> Tensors:
    """Gemma 3n with two layers that share K and V instead of ten, narrow, and without eyes: what
    makes it a Gemma 3n is all there.
    """
    kept: Tensors = {}
    for name, x in tensors.items():
        layer = re.search(r"language_model\.layers\.(\d+)", name)
        if "embed_vision" in name or (layer and int(layer[1]) >= N_LAYER_3N):
            continue
        if "mlp.down_proj" in name:
            x = x[:, :N_FF_3N]
        elif "mlp." in name:
            x = x[:N_FF_3N]
        elif "embed_tokens_per_layer" in name:
            x = x[:, : 256 * N_LAYER_3N]
        elif "per_layer_model_projection" in name:
            x = x[: 256 * N_LAYER_3N]
        kept[name] = x
    return kept


def _fewer_in_config(config: dict[str, Any]) -> None:
    text = config["text_config"]
    text |= {
        "num_hidden_layers": N_LAYER_3N,
        "num_kv_shared_layers": N_LAYER_3N - 20,
        "intermediate_size": [N_FF_3N] * N_LAYER_3N,
        "layer_types": text["layer_types"][:N_LAYER_3N],
        "activation_sparsity_pattern": text["activation_sparsity_pattern"][:N_LAYER_3N],
    }


def full_config(name: str) -> dict[str, Any]:
    """As transformers 5 writes it."""
    config = recipe(name)["config"]
    if name == "g3n":
        _fewer_in_config(config)
    return config


def plain_config(name: str) -> dict[str, Any]:
    """As Google publishes it: no noise, rope as transformers 4 spells it."""
    config = _without_noise(full_config(name))
    for section in (config, config.get("text_config", {})):
        if "rope_parameters" in section:
            del section["rope_parameters"]
            section |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}
    config |= {"transformers_version": "4.50.0.dev0", "torch_dtype": "bfloat16"}
    if name == "g3n":
        config["vision_config"]["model_type"] = "gemma3n_vision"
    return config


def _without_noise(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_noise(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in _NOISE and value is not None
    }


# --- a repository, part by part ---


@dataclass
class Repository:
    """What is in a repository before it is written. A layout changes it and writes it."""

    base: str  # g3text, g3mm, g3n
    config: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    generation: dict[str, Any] | None = field(default_factory=lambda: dict(GENERATION))
    tokenizer_config: dict[str, Any] | None = field(default_factory=lambda: dict(TOKENIZER_CONFIG))
    tokenizers: tuple[str, ...] = ("tokenizer.model", "tokenizer.json")
    added: dict[str, int] | None = None  # added_tokens.json
    template: str | None = "jinja"  # jinja | config | json | list | None
    metadata: dict[str, str] | None = field(default_factory=lambda: {"format": "pt"})
    dtype: str = "bfloat16"
    n_shards: int = 1
    indexed: Callable[[dict[str, str]], dict[str, str]] | None = None  # changes the weight map
    others: dict[str, Any] = field(default_factory=dict)  # further JSON files

    @classmethod
    def of(cls, base: str) -> Repository:
        found = cls(base, plain_config(base), plain_tensors(base))
        if base == "g3text":  # as 270M and 1B: one token more than rows
            found.added = {"<image_soft_token>": 768}
        return found

    def rename(self, *pairs: tuple[str, str]) -> Repository:
        """Regular expressions over the names, in order; the first that matches counts."""
        renamed: Tensors = {}
        for name, x in self.tensors.items():
            for pattern, replacement in pairs:
                new, n = re.subn(pattern, replacement, name)
                if n:
                    name = new
                    break
            renamed[name] = x
        self.tensors = renamed
        return self

    def without(self, pattern: str) -> Repository:
        self.tensors = {n: x for n, x in self.tensors.items() if not re.search(pattern, n)}
        return self

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _json(folder / "config.json", self.config)
        if self.generation is not None:
            _json(folder / "generation_config.json", self.generation)
        for name in self.tokenizers:
            (folder / name).write_bytes((REFERENCE / name).read_bytes())
        if self.added is not None:
            _json(folder / "added_tokens.json", self.added)
        self._write_template(folder)
        if self.tokenizer_config is not None:
            _json(folder / "tokenizer_config.json", self.tokenizer_config)
        for name, content in self.others.items():
            _json(folder / name, content)
        self._write_weights(folder)

    def _write_template(self, folder: Path) -> None:
        if self.template == "jinja":
            (folder / "chat_template.jinja").write_text(TEMPLATE)
        elif self.template == "json":
            _json(folder / "chat_template.json", {"chat_template": TEMPLATE})
        elif self.template is not None and self.tokenizer_config is not None:
            named = [
                {"name": "tool_use", "template": "x"},
                {"name": "default", "template": TEMPLATE},
            ]
            self.tokenizer_config["chat_template"] = (
                TEMPLATE if self.template == "config" else named
            )

    def _write_weights(self, folder: Path) -> None:
        kind = getattr(ml_dtypes, self.dtype, None) or np.dtype(self.dtype)
        stored = {
            name: x if x.dtype.kind in "iu" else np.ascontiguousarray(x, np.float32).astype(kind)
            for name, x in self.tensors.items()
        }
        names = list(stored)
        files = {"model.safetensors": names}
        if self.n_shards > 1 or self.indexed is not None:
            files = {
                f"model-{i + 1:05d}-of-{self.n_shards:05d}.safetensors": names[i :: self.n_shards]
                for i in range(self.n_shards)
            }
        for file, part in files.items():
            save_file({name: stored[name] for name in part}, folder / file, self.metadata)
        if "model.safetensors" not in files:
            where = {name: file for file, part in files.items() for name in part}
            where = self.indexed(where) if self.indexed else where
            index = {"metadata": {"total_size": 1}, "weight_map": where}
            _json(folder / "model.safetensors.index.json", index)


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def channel_last(tensors: Tensors, names: Iterable[str]) -> Tensors:
    """Convolutions as MLX stores them: [out, height, width, in]."""
    turned = dict(tensors)
    for name in names:
        x = tensors[name]
        turned[name] = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    return turned


# --- layouts ---

Layout = Callable[[Path], None]
LAYOUTS: dict[str, tuple[str, str, Layout]] = {}  # name → (base, what it is, writer)


def layout(base: str, what: str) -> Callable[[Callable[[Repository], Repository]], Layout]:
    """Register a function that changes the plain repository of ``base`` into a layout."""

    def register(change: Callable[[Repository], Repository]) -> Layout:
        def write(folder: Path) -> None:
            change(Repository.of(base)).write(folder)

        LAYOUTS[change.__name__] = (base, what, write)
        return write

    return register


# names as published: Google's 4B and everything before transformers 4.52
_OLD_4B = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.(multi_modal_projector)\.", r"\1."),
)
_MLX_VLM = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(audio_tower|embed_audio|vision_tower|embed_vision)\.", r"\1."),
)


@layout("g3text", "google/gemma-3-270m-it: chat_template.jinja, layer_types, eos 1")
def g270m_it(r: Repository) -> Repository:
    return r


@layout("g3text", "google/gemma-3-270m (base): no chat template")
def g270m(r: Repository) -> Repository:
    r.template = None
    return r


@layout("g3text", "google/gemma-3-1b-it: the template in tokenizer_config.json, eos [1, 106]")
def g1b_it(r: Repository) -> Repository:
    r.template = "config"
    r.config["eos_token_id"] = [1, 9]
    del r.config["layer_types"]
    r.config["sliding_window_pattern"] = r.config.pop("_sliding_window_pattern")
    r.others["special_tokens_map.json"] = {"boi_token": "<start_of_image>"}
    return r


@layout("g3text", "google/gemma-3-1b-it-qat-q4_0-unquantized: as 1b-it")
def g1b_it_qat(r: Repository) -> Repository:
    r.template = "config"
    r.config["eos_token_id"] = [1, 9]
    return r


@layout("g3text", "a tune of 270M saved by transformers 5: rope_parameters, dtype, tokenizer.json")
def g270m_transformers_5(r: Repository) -> Repository:
    for key in ("torch_dtype", "rope_theta", "rope_local_base_freq", "rope_scaling"):
        r.config.pop(key, None)
    r.config |= {
        "dtype": "bfloat16",
        "rope_parameters": recipe("g3text")["config"]["rope_parameters"],
        "tie_word_embeddings": True,
        "transformers_version": "5.24.0",
    }
    r.tokenizers, r.added = ("tokenizer.json",), None
    return r


@layout("g3text", "a mirror of 1b-it: eos 106 in config.json, <end_of_turn> as eos_token")
def g1b_unsloth(r: Repository) -> Repository:
    r.template = "config"
    r.config |= {"eos_token_id": 9, "unsloth_fixed": True}
    assert r.tokenizer_config is not None
    r.tokenizer_config |= {"eos_token": "<end_of_turn>", "padding_side": "left"}
    return r


@layout("g3text", "merged from 4 bit: a quantization_config left over, bf16 weights")
def g1b_quantization_left(r: Repository) -> Repository:
    r.config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    return r


@layout("g3text", "stored as float32")
def g1b_f32(r: Repository) -> Repository:
    r.dtype = "float32"
    r.tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in r.tensors.items()}
    return r


@layout(
    "g3text", "mlx-community text in bf16: format mlx, an equal lm_head, an index beside one file"
)
def g1b_mlx(r: Repository) -> Repository:
    r.tensors["lm_head.weight"] = r.tensors["model.embed_tokens.weight"]
    r.metadata, r.generation, r.template = {"format": "mlx"}, None, "config"
    names = dict.fromkeys(r.tensors, "model.safetensors")
    r.others["model.safetensors.index.json"] = {"metadata": {}, "weight_map": names}
    return r


@layout("g3text", "merged by hand: base_model.model. kept in the names")
def g1b_peft_prefix(r: Repository) -> Repository:
    return r.rename((r"^", "base_model.model."))


@layout("g3text", "saved from torch.compile: _orig_mod. before every name")
def g1b_orig_mod(r: Repository) -> Repository:
    return r.rename((r"^", "_orig_mod."))


@layout("g3text", "saved from FSDP and DDP: their wrappers in the names")
def g1b_fsdp(r: Repository) -> Repository:
    return r.rename(
        (r"^model\.layers\.(\d+)\.", r"module.model.layers.\1._fsdp_wrapped_module."),
        (r"^", "module."),
    )


@layout("g3text", "the bare text model (AutoModel): names without model.")
def g1b_bare(r: Repository) -> Repository:
    r.config["architectures"] = ["Gemma3TextModel"]
    return r.rename((r"^model\.", ""))


@layout("g3text", "a whole model.safetensors beside the index of shards that are gone")
def g1b_stale_index(r: Repository) -> Repository:
    gone = dict.fromkeys(r.tensors, "model-00001-of-00002.safetensors")
    r.others["model.safetensors.index.json"] = {"metadata": {}, "weight_map": gone}
    return r


@layout("g3text", "an index that lists a tied lm_head which no shard holds")
def g1b_index_lists_head(r: Repository) -> Repository:
    first = "model-00001-of-00001.safetensors"
    r.indexed = lambda where: where | {"lm_head.weight": first}
    return r


@layout("g3text", "a shard that holds an equal lm_head which the index does not list")
def g1b_index_omits_head(r: Repository) -> Repository:
    r.tensors["lm_head.weight"] = r.tensors["model.embed_tokens.weight"]
    r.indexed = lambda where: {n: f for n, f in where.items() if n != "lm_head.weight"}
    return r


@layout("g3text", "1b with its buffers saved: rotary frequencies, embed_scale")
def g1b_buffers(r: Repository) -> Repository:
    for place in ("rotary_emb", "rotary_emb_local"):
        r.tensors[f"model.{place}.inv_freq"] = np.ones(64, np.float32)
    r.tensors["model.embed_tokens.embed_scale"] = np.full(1, 16, np.float32)
    return r


@layout("g3text", "tie_word_embeddings false, and no lm_head saved")
def g270m_untied_in_config(r: Repository) -> Repository:
    r.config["tie_word_embeddings"] = False
    return r


@layout("g3text", "nothing but tokenizer.model")
def g1b_tokenizer_model_alone(r: Repository) -> Repository:
    r.tokenizers, r.tokenizer_config, r.template = ("tokenizer.model",), None, None
    r.added = None
    return r


@layout("g3text", "several chat templates by name")
def g1b_template_list(r: Repository) -> Repository:
    r.template = "list"
    return r


@layout("g3text", "FunctionGemma 270M: two added tokens beyond the table, a third end token")
def g270m_function(r: Repository) -> Repository:
    r.added = {"<image_soft_token>": 768, "<end_of_image>": 769}
    assert r.generation is not None
    r.generation["eos_token_id"] = [1, 50, 9]
    return r


@layout(
    "g3text", "saved as Gemma3ForConditionalGeneration's text: image_token_index beyond the rows"
)
def g1b_language_model(r: Repository) -> Repository:
    text = {k: v for k, v in r.config.items() if k not in ("architectures", "transformers_version")}
    r.config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 10,
        "eoi_token_index": 11,
        "image_token_index": 768,
        "text_config": text,
    }
    r.tensors["lm_head.weight"] = r.tensors["model.embed_tokens.weight"]
    return r.rename((r"^model\.", "language_model.model."), (r"^lm_head", "language_model.lm_head"))


@layout("g3mm", "google/gemma-3-4b-it: two shards, chat_template.json, a config of differences")
def g4b_it(r: Repository) -> Repository:
    r.n_shards, r.template = 2, "json"
    r.config["eos_token_id"] = [1, 9]
    r.others["processor_config.json"] = {"image_seq_length": 16}
    return r.rename(*_OLD_4B)


@layout("g3mm", "google/gemma-3-4b-pt: as -it, no chat template")
def g4b_pt(r: Repository) -> Repository:
    r.n_shards, r.template = 2, None
    return r.rename(*_OLD_4B)


@layout("g3mm", "4B saved whole by transformers 4.57")
def g4b_transformers_4(r: Repository) -> Repository:
    r.config["transformers_version"] = "4.57.6"
    return r.rename(*_OLD_4B)


@layout("g3mm", "4B saved whole by transformers 5: config in full")
def g4b_transformers_5(r: Repository) -> Repository:
    r.config = full_config("g3mm")
    r.tokenizers = ("tokenizer.json",)
    return r.rename(*_OLD_4B)


@layout("g3mm", "4B tuned under DeepSpeed: module names and an equal lm_head")
def g4b_deepspeed(r: Repository) -> Repository:
    r.tensors["lm_head.weight"] = r.tensors["model.language_model.embed_tokens.weight"]
    r.n_shards = 3
    return r.rename((r"^model\.vision_tower\.", "model.vision_tower.vision_model."))


@layout("g3mm", "4B without any model. (transformers 4.52.0)")
def g4b_no_model(r: Repository) -> Repository:
    return r.rename(
        (r"^model\.language_model\.", "language_model."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.", ""),
    )


@layout("g3mm", "4B with a position_ids buffer")
def g4b_position_ids(r: Repository) -> Repository:
    r.rename(*_OLD_4B)
    ids = np.arange(256, dtype=np.int64)[None]
    r.tensors["vision_tower.vision_model.embeddings.position_ids"] = ids
    return r


@layout("g3mm", "mlx-vlm 4B in bf16: channel-last patches")
def g4b_mlx_vlm(r: Repository) -> Repository:
    r.tensors = channel_last(r.tensors, ["model.vision_tower.embeddings.patch_embedding.weight"])
    r.metadata = {"format": "mlx"}
    return r.rename(*_OLD_4B)


@layout("g3mm", "text alone out of 4B (Gemma3ForCausalLM saved)")
def g4b_text_only(r: Repository) -> Repository:
    text = r.config["text_config"]
    r.config = text | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    r.without(r"vision|multi_modal")
    return r.rename((r"^model\.language_model\.", "model."))


@layout("g3mm", "4B whose table was cut below its image token")
def g4b_trimmed(r: Repository) -> Repository:
    r.config["text_config"]["vocab_size"] = 768
    r.config |= {"eoi_token_index": 11}
    name = "model.language_model.embed_tokens.weight"
    r.tensors[name] = r.tensors[name][:768]
    return r.rename(*_OLD_4B)


@layout("g3n", "google/gemma-3n-E2B-it: three shards, names of transformers 4.53 and 5")
def g3n_it(r: Repository) -> Repository:
    r.n_shards = 3
    return r


@layout("g3n", "3n saved by transformers 5: K and V of sharing layers left out")
def g3n_transformers_5(r: Repository) -> Repository:
    r.config = full_config("g3n")
    return r.without(r"layers\.2\d\.self_attn\.(k_proj|v_proj|k_norm)")


@layout("g3n", "3n text saved by transformers 4.57: one tensor misspelled")
def g3n_text_transformers_4(r: Repository) -> Repository:
    text = r.config["text_config"]
    r.config = text | {"architectures": ["Gemma3nForCausalLM"], "model_type": "gemma3n_text"}
    r.without("audio")
    return r.rename(
        (r"per_layer_model_projection", "per_layer_model.language_model_projection"),
    )


@layout("g3n", "3n text alone, flat config, names model.…")
def g3n_text_flat(r: Repository) -> Repository:
    text = r.config["text_config"]
    r.config = text | {"architectures": ["Gemma3nForCausalLM"], "model_type": "gemma3n_text"}
    r.without("audio")
    return r.rename((r"^model\.language_model\.", "model."))


@layout("g3n", "3n of early names: language_model.model.…")
def g3n_old_names(r: Repository) -> Repository:
    return r.rename(*_MLX_VLM)


@layout("g3n", "3n with an equal lm_head, widths as numbers, no layer_types")
def g3n_head_written(r: Repository) -> Repository:
    text = r.config["text_config"]
    text["intermediate_size"] = text["intermediate_size"][0]
    del text["layer_types"]
    r.tensors["lm_head.weight"] = r.tensors["model.language_model.embed_tokens.weight"]
    return r


@layout("g3n", "3n stored as float16")
def g3n_f16(r: Repository) -> Repository:
    # of bf16 weights: float16 holds those values, but for the smallest
    r.tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in r.tensors.items()}
    r.dtype = "float16"
    return r


@layout("g3n", "mlx-lm 3n: the text of a multimodal config")
def g3n_mlx_lm(r: Repository) -> Repository:
    r.metadata = {"format": "mlx"}
    r.config["quantization"] = None
    r.without("audio")
    return r.rename(*_MLX_VLM)


@layout("g3n", "mlx-vlm 3n in bf16: channel-last convolutions of the audio tower")
def g3n_mlx_vlm(r: Repository) -> Repository:
    names = [n for n in r.tensors if re.search(r"conv_\d\.conv|depthwise_conv1d", n)]
    r.tensors = channel_last(r.tensors, names)
    r.metadata = {"format": "mlx"}
    return r.rename(*_MLX_VLM)


@layout("g3n", "3n whose audio_config spells one number as early ports do")
def g3n_audio_early(r: Repository) -> Repository:
    audio = r.config["audio_config"]
    audio["sscp_conv_eps"] = audio.pop("sscp_conv_group_norm_eps")
    return r


@layout("g3n", "3n with a config of differences: all else is transformers' default")
def g3n_differences(r: Repository) -> Repository:
    text, audio = r.config["text_config"], r.config["audio_config"]
    kept = (
        "model_type hidden_size intermediate_size num_hidden_layers num_kv_shared_layers head_dim "
        "vocab_size vocab_size_per_layer_input sliding_window num_attention_heads "
        "num_key_value_heads"
    )
    r.config["text_config"] = {key: text[key] for key in kept.split()}
    kept = "model_type hidden_size conf_num_attention_heads conf_num_hidden_layers"
    r.config["audio_config"] = {key: audio[key] for key in kept.split()} | {
        "sscp_conv_channel_size": audio["sscp_conv_channel_size"]
    }
    return r


def changed(base: str, change: Callable[[Repository], object], folder: Path) -> Path:
    """A one-off repository: the plain one of ``base`` after ``change``."""
    repository = Repository.of(base)
    repository.config = copy.deepcopy(repository.config)
    change(repository)
    repository.write(folder)
    return folder
