"""What sentence-transformers keeps beside EmbeddingGemma's weights: pooling,
dense layers, prompts, what stands around a text.

In: a checkpoint whose config asks for bidirectional attention. Out: an
:class:`~edge_gemma.bundles.manifest.EmbeddingPart`; the dense layers become
tensors of the checkpoint. A module that llama.cpp does not compute is
refused by name, because without it every vector would be another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from edge_gemma.bundles.description import DENSE, EMBEDDING_PROMPTS, MRL_DIMENSIONS
from edge_gemma.bundles.manifest import EmbeddingPart
from edge_gemma.convert.checkpoint import Checkpoint, read_json
from edge_gemma.errors import CheckpointError, UnsupportedModel

MODULES = "modules.json"
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclass(frozen=True)
class _Module:
    """One line of modules.json: the last part of its class, and its folder
    below the checkpoint.
    """

    kind: str
    folder: Path


def read_embedding(checkpoint: Checkpoint, n_embd: int, n_ctx_train: int) -> EmbeddingPart:
    """How the checkpoint embeds. Its dense layers are added to it as
    ``dense_2.weight`` and ``dense_3.weight``. Raises CheckpointError,
    UnsupportedModel (a module, pooling or activation other than
    EmbeddingGemma's).
    """
    folder = checkpoint.folder
    modules = _modules(folder)
    dense_modules = [module for module in modules if module.kind == "Dense"]
    for module in modules:
        if module.kind == "Pooling":
            _check_pooling(module.folder / "config.json")
    dense = tuple(
        _include_dense(checkpoint, name, module.folder)
        for name, module in zip(DENSE, dense_modules, strict=False)
    )
    _check_widths(folder, dense, n_embd)
    prompts, default = _prompts(folder)
    add_bos, add_eos = _surroundings(folder)
    return EmbeddingPart(
        width=n_embd,
        dimensions=(n_embd, *(width for width in MRL_DIMENSIONS if width < n_embd)),
        max_tokens=min(n_ctx_train, _max_tokens(folder) or n_ctx_train),
        add_bos=add_bos,
        add_eos=add_eos,
        dense=dense,
        normalize=any(module.kind == "Normalize" for module in modules),
        prompts=prompts,
        default_prompt=default,
    )


def _modules(folder: Path) -> list[_Module]:
    path = folder / MODULES
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MODULES}: it lists the layers that turn EmbeddingGemma's output "
            "into a vector. Download the whole repository, with its folders 1_Pooling, 2_Dense "
            "and 3_Dense"
        )
    try:
        listed = msgspec.json.decode(path.read_bytes(), type=list[dict[str, object]])
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a list of modules: {error}") from None
    modules = [_module(path, entry) for entry in listed]
    kinds = [module.kind for module in modules]
    n_dense = kinds.count("Dense")
    expected = ["Transformer", "Pooling", *["Dense"] * n_dense]
    if kinds not in (expected, [*expected, "Normalize"]) or n_dense not in (0, len(DENSE)):
        raise UnsupportedModel(
            f"{path} lists {', '.join(kinds) or 'nothing'}; EmbeddingGemma is Transformer, "
            "Pooling, Dense, Dense, Normalize"
        )
    return modules


def _module(path: Path, entry: dict[str, object]) -> _Module:
    kind, place = str(entry.get("type", "")).rpartition(".")[2], entry.get("path", "")
    if not isinstance(place, str) or ".." in PurePosixPath(place).parts or place.startswith("/"):
        raise CheckpointError(f"{path} places a module in {place!r}; expected a folder beside it")
    if kind not in _KINDS:
        raise UnsupportedModel(
            f"{path} lists the module {entry.get('type')!r}; known are {', '.join(_KINDS)}"
        )
    return _Module(kind, path.parent / place)


def _check_pooling(path: Path) -> None:
    """Mean of all positions, the prompt's included: what llama.cpp does."""
    config = read_json(path) if path.is_file() else {}
    prefix = "pooling_mode_"
    modes = [
        key.removeprefix(prefix).removesuffix("s").removesuffix("_token")
        for key, on in config.items()
        if key.startswith(prefix) and on is True
    ]
    if "pooling_mode" in config:  # as sentence-transformers 6 writes it
        mode = config["pooling_mode"]
        modes = mode if isinstance(mode, list) else [mode]
    if modes not in ([], ["mean"]):
        raise UnsupportedModel(f"{path} asks for pooling by {modes}; EmbeddingGemma takes the mean")
    if config.get("include_prompt", True) is not True:
        raise UnsupportedModel(
            f"{path}: include_prompt is false; llama.cpp takes the mean of all tokens, the "
            "prompt's too"
        )


def _include_dense(checkpoint: Checkpoint, name: str, folder: Path) -> tuple[int, int]:
    """Add one dense layer to the checkpoint; its (inputs, outputs)."""
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    if not config_path.is_file() or not weights_path.is_file():
        raise CheckpointError(
            f"{folder} lacks config.json or model.safetensors; download the whole repository"
        )
    config = read_json(config_path)
    activation = str(config.get("activation_function", "")).rpartition(".")[2]
    extras = [key for key in ("bias", "use_residual") if config.get(key) not in (False, None)]
    if activation != "Identity" or extras or "bias" not in config:
        raise UnsupportedModel(
            f"{config_path} describes a layer with activation {activation or 'Tanh'!r} and "
            f"{', '.join(extras) or 'no stated bias'}; EmbeddingGemma's layers are products alone"
        )
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise UnsupportedModel(
                f"{config_path}: {key} is {config[key]!r}; expected sentence_embedding"
            )
    checkpoint.include(f"{name}.weight", weights_path, "linear.weight")
    shape = checkpoint.shape(f"{name}.weight")
    n_in, n_out = config.get("in_features"), config.get("out_features")
    if shape != (n_out, n_in):
        raise CheckpointError(
            f"{weights_path} holds a layer of shape {list(shape)}, its config says "
            f"{[n_out, n_in]} (outputs, inputs)"
        )
    return shape[1], shape[0]


def _check_widths(folder: Path, dense: tuple[tuple[int, int], ...], n_embd: int) -> None:
    widths = [n_embd, *(width for layer in dense for width in layer), n_embd]
    if any(a != b for a, b in zip(widths[::2], widths[1::2], strict=True)):
        raise UnsupportedModel(
            f"{folder}: the dense layers take and give {[list(layer) for layer in dense]} "
            f"numbers; llama.cpp runs layers that begin and end at {n_embd}"
        )


def _prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """(the prompts by name, the name of the one used by default)."""
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return dict(EMBEDDING_PROMPTS), None
    config = read_json(path)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    is_table = isinstance(prompts, dict) and all(isinstance(x, str) for x in prompts.values())
    if not is_table or (default is not None and default not in prompts):
        raise CheckpointError(
            f"{path}: prompts is {str(prompts)[:80]} and default_prompt_name {default!r}; "
            "expected texts by name, and one of those names or null"
        )
    return prompts, default


def _max_tokens(folder: Path) -> int | None:
    """The longest text that sentence-transformers lets through, in tokens."""
    path = folder / "sentence_bert_config.json"
    config = read_json(path) if path.is_file() else {}
    value = config.get("max_seq_length")
    return value if type(value) is int and value > 0 else None


def _surroundings(folder: Path) -> tuple[bool, bool]:
    """Whether begin and end of sequence stand around a text: the template
    of tokenizer.json decides, as in transformers; without one
    tokenizer_config.json, else the begin alone, as in every Gemma.
    """
    tokenizer_path = folder / "tokenizer.json"
    if tokenizer_path.is_file():
        around = _post_processor(read_json(tokenizer_path))
        if around is not None:
            return around
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    return config.get("add_bos_token") is not False, config.get("add_eos_token") is True


def _post_processor(tokenizer: dict) -> tuple[bool, bool] | None:
    """Whether the template for one text has a special token before it and
    behind it; None where there is no template.
    """
    processor = tokenizer.get("post_processor")
    steps = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    for step in steps:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            single = [next(iter(piece)) for piece in step.get("single", []) if piece]
            if "Sequence" in single:
                at = single.index("Sequence")
                return "SpecialToken" in single[:at], "SpecialToken" in single[at:]
    return None
