"""Weights and vocabulary of one GGUF in llama.cpp; its failures become ours here.

In: a GGUF that was checked, settings that a plan approved. Out: ids and text pieces, and what makes
contexts (context.py) and samplers (sampler.py). This module does not know prompts, bundles or
sessions.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_gemma.engines.constraint import Constraint, TokenTable
from edge_gemma.engines.guidance import Guidance, is_installed
from edge_gemma.engines.llama import library as llama
from edge_gemma.engines.llama.context import Context, LoadedModel
from edge_gemma.engines.llama.embedder import Embedder
from edge_gemma.engines.llama.rescoring import Rescorer
from edge_gemma.engines.llama.sampler import Sampler
from edge_gemma.errors import BundleError, UsageError
from edge_gemma.machine.footprint import trim_heap
from edge_gemma.options import Sampling
from edge_gemma.plan.records import Settings

# What every Gemma's tokenizer does, whatever a file says: llama.cpp puts a space before each text
# where the key is missing.
_GEMMA_FLAGS: dict[str, bool | int] = {
    "tokenizer.ggml.add_space_prefix": False,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": False,
}
# Tokens without a meaning, control tokens for llama.cpp; in Gemma's tokenizer.json they are text
# ("special": false), so what is typed reaches them.
_RESERVED = r"<mask>|<unused\d{1,5}>"
# Spellings that llama.cpp takes for an end of generation in every vocabulary (llama-vocab.cpp,
# load), and that may be text in a Gemma's: </s> is HTML there.
_TAKEN_FOR_ENDS = (
    "</s>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|tool_response>",
    "<turn|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<end_of_utterance>",
    "<eos>",
    "<end_of_turn>",
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
)
_SPACE_MARK = "▁".encode()  # how a vocabulary writes a space


class Decoder:
    """Weights and vocabulary of one GGUF in llama.cpp.

    Holds no conversation; :meth:`context` makes what does. ``suppressed`` are ids that no sampler
    chooses, ``ends`` those that end an answer (default: the file's eos and end of turn),
    ``controls`` those that stand for no text. ``overrides`` are metadata that count instead of the
    file's: key → value. ``vocab_only`` loads no weights: then :meth:`context` makes nothing.

    ``on_progress(fraction) -> bool`` is called while weights load; returning False stops the load
    (KeyboardInterrupt is raised for it). Raises BundleError when llama.cpp refuses the file.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Settings,
        *,
        lora: Sequence[tuple[str | Path, float]] = (),
        suppressed: Sequence[int] = (),
        ends: Sequence[int] = (),
        controls: Sequence[int] = (),
        overrides: Mapping[str, bool | int] | None = None,
        vocab_only: bool = False,
        on_progress: Callable[[float], bool] | None = None,
    ):
        self._low = low = llama.library()
        self.settings, self.suppressed = settings, tuple(suppressed)
        # of every context's logits; whoever opened the weights may set one
        self.rescorer: Rescorer | None = None
        self._model: Any = None  # llama.cpp's pointer
        self._vocab_only = vocab_only
        self._adapters: list[tuple[Any, float]] = []
        self._contexts: set[Context] = set()
        # llama.cpp reads the array while it loads
        self._overrides = llama.kv_overrides({**_GEMMA_FLAGS, **(overrides or {})})
        self._guidance: Guidance | None = None  # made when the first schema comes
        self._guidance_lock = threading.Lock()
        self._embedders: list[Embedder] = []
        llama.forget_log()
        try:
            self._load(path, lora, on_progress)
        except BaseException:
            self.close()
            raise
        self.vocab: Any = low.llama_model_get_vocab(self._model)
        self.n_vocab: int = low.llama_vocab_n_tokens(self.vocab)
        self.n_embd: int = low.llama_model_n_embd(self._model)
        self.n_ctx_train: int = low.llama_model_n_ctx_train(self._model)
        self.n_swa: int = low.llama_model_n_swa(self._model)
        self.bos: int = low.llama_vocab_bos(self.vocab)
        self.add_bos = bool(low.llama_vocab_get_add_bos(self.vocab))
        usual = (low.llama_vocab_eos(self.vocab), low.llama_vocab_eot(self.vocab))
        self.ends = frozenset(ends or (id for id in usual if id >= 0))
        self._controls = frozenset(controls)
        self._texts = self._mistaken_for_ends()
        self._own_tokens: dict[str, int | None] = {}
        self._text_pattern = re.compile("|".join([_RESERVED, *map(re.escape, self._texts)]))

    def _mistaken_for_ends(self) -> dict[str, int]:
        """Tokens that are text here and that llama.cpp takes for control tokens: spelling → id."""
        texts: dict[str, int] = {}
        for spelling in _TAKEN_FOR_ENDS:
            ids = self._tokenized(spelling, special=True)
            if len(ids) != 1 or ids[0] in self.ends | self._controls:
                continue
            if self._low.llama_vocab_is_eog(self.vocab, ids[0]):
                texts[spelling] = ids[0]
        return texts

    def _load(
        self,
        path: str | Path,
        lora: Sequence[tuple[str | Path, float]],
        on_progress: Callable[[float], bool] | None,
    ) -> None:
        params = self._low.llama_model_default_params()
        params.n_gpu_layers = self.settings.n_gpu_layers
        params.use_extra_bufts = self.settings.repack
        params.load_mode = self._low.LLAMA_LOAD_MODE_MMAP
        params.vocab_only = self._vocab_only
        stopped = threading.Event()

        def progress(fraction: float, _: Any) -> bool:
            try:
                if on_progress is not None and on_progress(fraction) is False:
                    stopped.set()
            except BaseException:  # it cannot cross the C frames: stop the load, tell afterwards
                stopped.set()
            return not stopped.is_set()

        params.kv_overrides = self._overrides
        params.progress_callback = self._low.llama_progress_callback(progress)
        with llama.interrupts_held(stopped.set):
            self._model = self._low.llama_model_load_from_file(os.fsencode(path), params)
            if not self._model:
                if stopped.is_set():
                    raise KeyboardInterrupt
                raise BundleError(f"llama.cpp could not load {path}: {llama.last_log()}")
            for file, scale in lora:  # before any context: the graph is sized from them
                self._adapters.append((self._open_adapter(Path(file)), float(scale)))

    def _open_adapter(self, path: Path) -> Any:
        if not path.is_file():
            raise UsageError(f"no LoRA adapter at {path}")
        adapter = self._low.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise BundleError(
                f"llama.cpp could not apply the LoRA adapter {path}: {llama.last_log()}"
            )
        return adapter

    def reported_bytes(self) -> dict[str, int]:
        """What llama.cpp said it allocated while loading and making contexts: ``{"CPU_REPACK
        model": bytes, …}``.
        """
        return llama.reported_bytes()

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Text → ids without BOS. ``special`` lets control tokens in the text be control tokens;
        user text never should. Raises UsageError (a text too long to tokenize).
        """
        if special:
            return self._tokenized(text, special)
        ids: list[int] = []
        done = 0
        for match in self._text_pattern.finditer(text):
            token = self._own_token(match[0])
            if token is not None:
                ids += self._tokenized(text[done : match.start()], special)
                ids.append(token)
                done = match.end()
        return ids + self._tokenized(text[done:], special)

    def _own_token(self, spelling: str) -> int | None:
        """The id of a token that is text for Gemma and a control token for llama.cpp."""
        if spelling not in self._own_tokens:
            ids = self._tokenized(spelling, special=True)
            is_text = len(ids) == 1 and ids[0] not in self.ends | self._controls
            self._own_tokens[spelling] = ids[0] if is_text else None
        return self._own_tokens[spelling]

    def _tokenized(self, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", "surrogatepass")
        capacity = len(data) + 2
        while True:
            buffer = (ctypes.c_int32 * capacity)()
            n = self._low.llama_tokenize(
                self.vocab, data, len(data), buffer, capacity, False, special
            )
            if n >= 0:
                return buffer[:n]
            if n == -(1 << 31):
                raise UsageError(f"a text of {len(data)} bytes is too long to tokenize")
            capacity = -n

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes a token stands for; control tokens give none unless ``special``."""
        if special:
            return self._piece(token, True)
        if token in self._controls:
            return b""
        return self._piece(token, False) or self._own_text(token)

    def _own_text(self, token: int) -> bytes:
        """The bytes of a token that is text for Gemma and a control token for llama.cpp."""
        if token in self.ends:
            return b""
        spelled = self._piece(token, True)
        is_text = self._text_pattern.fullmatch(spelled.decode("utf-8", "replace"))
        return spelled if is_text else b""

    def _piece(self, token: int, special: bool) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._low.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return token in self.ends

    def sampler(self, sampling: Sampling) -> Sampler:
        """A sampler for one generation. Raises UsageError (a grammar that does not parse, a schema
        that cannot be enforced).
        """
        suppressed, constraint = self.suppressed, None
        if sampling.schema is not None and self._uses_guidance():
            constraint = self._made_guidance().constraint(sampling.schema)
        elif sampling.grammar is not None or sampling.schema is not None:
            # llama.cpp's grammar would take one of these for the end of the answer
            suppressed = (*suppressed, *self._texts.values())
        calls = None
        if sampling.call_schema is not None and self._uses_guidance():
            calls = self._call_constraint
        return Sampler(self.vocab, self.n_vocab, suppressed, sampling, constraint, calls)

    def _call_constraint(self, schema: dict) -> Constraint:
        return self._made_guidance().constraint(schema)

    def check(self, sampling: Sampling) -> None:
        """Raises UsageError where :meth:`sampler` would."""
        if sampling.schema is not None or sampling.grammar is not None:
            self.sampler(sampling).close()

    def _uses_guidance(self) -> bool:
        return self.settings.guidance and is_installed()

    def _made_guidance(self) -> Guidance:
        with self._guidance_lock:
            if self._guidance is None:
                self._guidance = Guidance(self.token_table())
                trim_heap()
        return self._guidance

    def token_table(self) -> TokenTable:
        """The whole vocabulary, read in one pass."""
        low, vocab = self._low, self.vocab
        ids = range(self.n_vocab)
        attributes = [low.llama_vocab_get_attr(vocab, token) for token in ids]
        ends = sorted(self.ends)
        is_text = low.LLAMA_TOKEN_ATTR_NORMAL | low.LLAMA_TOKEN_ATTR_USER_DEFINED
        is_text |= low.LLAMA_TOKEN_ATTR_BYTE
        controls = {token for token in ids if not attributes[token] & is_text}
        controls = (controls | self._controls).difference(self._texts.values())
        return TokenTable(
            pieces=[self._piece_of(token, attributes[token]) for token in ids],
            control_ids=sorted(controls.union(ends, self.suppressed)),
            end_ids=ends,
            tokenize=self.tokenize,
        )

    def _piece_of(self, token: int, attributes: int) -> bytes:
        """What :meth:`piece` gives with ``special``, without its call per token for most."""
        low = self._low
        if attributes & low.LLAMA_TOKEN_ATTR_NORMAL:
            return low.llama_vocab_get_text(self.vocab, token).replace(_SPACE_MARK, b" ")
        return self.piece(token, special=True)

    def context(
        self,
        settings: Settings | None = None,
        *,
        n_outputs: int | None = None,
        on_tensor: Callable[[int, bool], bool] | None = None,
    ) -> Context:
        """A KV cache with compute buffers; see :class:`Context`. Raises RuntimeFailure when
        llama.cpp cannot make it.
        """
        context = Context(
            self._loaded(),
            settings or self.settings,
            n_outputs=n_outputs,
            on_tensor=on_tensor,
            on_close=self._contexts.discard,
            rescorer=None if on_tensor else self.rescorer,
        )
        self._contexts.add(context)
        return context

    def embedder(self, settings: Settings | None = None) -> Embedder:
        """What makes vectors of texts; see :class:`Embedder`. Raises RuntimeFailure when llama.cpp
        cannot make it.
        """
        embedder = Embedder(self._loaded(), settings or self.settings)
        self._embedders.append(embedder)
        return embedder

    def _loaded(self) -> LoadedModel:
        return LoadedModel(
            self._model, self.n_vocab, self.n_embd, self.n_swa, tuple(self._adapters)
        )

    def close(self) -> None:
        """Free the contexts that were made, then the weights."""
        self._guidance = None
        for context in list(self._contexts):
            context.close()
        for embedder in self._embedders:
            embedder.close()
        if self._model:
            for adapter, _ in self._adapters:
                self._low.llama_adapter_lora_free(adapter)
            self._adapters = []
            with llama.interrupts_held():
                self._low.llama_model_free(self._model)
                self._model = None
