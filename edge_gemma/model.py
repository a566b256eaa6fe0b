"""The front door: ``load`` a bundle inside a budget, get a :class:`Model`, generate.

In: a bundle (folder or installed name) and a request. Out: a context manager that owns weights, one
KV cache and, when they are needed, the encoders. Conversations live in conversation/; this module
plans, opens, lends and closes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Unpack

import msgspec
import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import Manifest, require_embedding, require_generation
from edge_gemma.conversation.batch import Batch
from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.prompt_cache import PromptCache
from edge_gemma.conversation.prompt_files import PromptFiles, prompt_scope
from edge_gemma.conversation.sequences import Sequences
from edge_gemma.conversation.session import Session
from edge_gemma.conversation.stream import Chunk
from edge_gemma.embedding import TextEmbedder
from edge_gemma.engines.engine import EVALUATE_ROWS
from edge_gemma.engines.llama.weights import repacked_here
from edge_gemma.engines.opening import open_weights
from edge_gemma.errors import UsageError
from edge_gemma.machine.device import Device
from edge_gemma.machine.probe import find_device, machine_for
from edge_gemma.machine.repack import repacks_for
from edge_gemma.messages import Image, Message, Part, PictureSource
from edge_gemma.options import Sampling, SamplingChanges
from edge_gemma.plan.ladder import make_plan
from edge_gemma.plan.records import EngineChoice, Level, Plan, PlanRequest
from edge_gemma.prompts.prompt import Prompt, read_special_rows
from edge_gemma.seeing.video import Video
from edge_gemma.senses import Content, Senses
from edge_gemma.spans import Rows, Span, Tokens
from edge_gemma.store.installed import resolve
from edge_gemma.tuning import plan_here
from edge_gemma.units import parse_bytes

PromptLike = str | Sequence[Part | Video | Tokens]


def load(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    budget: int | str | None = None,
    device: str | Device = "auto",
    n_ctx: int | None = None,
    level: Level | None = None,
    engine: EngineChoice | None = None,
    request: PlanRequest = PlanRequest(),
    lora: Sequence[tuple[str | Path, float]] = (),
    prompt_folder: str | os.PathLike[str] | None = "auto",
    on_progress: Callable[[float], bool | None] | None = None,
) -> Model:
    """Plan, then load.

    ``budget`` in bytes or as text ("2GiB"); ``device`` a profile's name or "auto"; ``level``:
    "efficiency", "balanced" or "performance", with how much context the plan begins; ``engine``:
    "llama" (the GGUF), "onnx" (``decoder.onnx``, where the bundle holds one) or "auto"; ``request``
    the rest. Where it asks for a prompt cache, ``prompt_folder`` is its place on disk ("auto":
    ~/.cache/edge-gemma/prompts); None: it is in memory alone.

    Raises PlanRefused before anything is allocated, BundleError, UsageError.

    >>> with load("my-gemma", n_ctx=512) as model:
    ...     model.plan.fits
    True
    """
    bundle = _opened(bundle)
    request = _request(request, budget, n_ctx, level, engine)
    if lora:
        sizes = (Path(file).stat().st_size for file, _ in lora if Path(file).is_file())
        request = dataclasses.replace(request, lora_bytes=sum(sizes))
    machine = machine_for(device)
    if device == "auto":
        made = plan_here(bundle, machine, request).require()
    else:
        made = make_plan(bundle.manifest, machine, request, repacked_here).require()
    return Model(bundle, made, lora=lora, prompt_folder=prompt_folder, on_progress=on_progress)


def plan_bundle(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    budget: int | str | None = None,
    device: str | Device = "auto",
    n_ctx: int | None = None,
    level: Level | None = None,
    engine: EngineChoice | None = None,
    request: PlanRequest = PlanRequest(),
) -> Plan:
    """What a bundle will take, without loading it: on this machine ("auto"), or on a board by its
    profile's name ("pi-5-4gb"), which need not be here.

    Nothing is raised for what does not fit: see ``plan.fits`` and ``plan.refusal``. Raises
    BundleError, UsageError.

    >>> plan_bundle("my-gemma", device="pi-5-4gb", n_ctx=512).fits
    True
    """
    bundle = _opened(bundle)
    found = find_device(device) if isinstance(device, str) else device
    request = _request(request, budget, n_ctx, level, engine)
    if device == "auto":
        return plan_here(bundle, found, request)
    return make_plan(bundle.manifest, found, request, repacks_for(found))


def _opened(bundle: str | os.PathLike[str] | Bundle) -> Bundle:
    return bundle if isinstance(bundle, Bundle) else Bundle.open(resolve(bundle))


def _request(
    request: PlanRequest,
    budget: int | str | None,
    n_ctx: int | None,
    level: Level | None,
    engine: EngineChoice | None,
) -> PlanRequest:
    if budget is not None:
        request = dataclasses.replace(request, budget_bytes=parse_bytes(budget))
    if n_ctx is not None:
        request = dataclasses.replace(request, n_ctx=n_ctx)
    if level is not None:
        request = dataclasses.replace(request, level=level)
    if engine is not None:
        request = dataclasses.replace(request, engine=engine)
    return request


def bundle_sampling(manifest: Manifest, **changes: Unpack[SamplingChanges]) -> Sampling:
    """How a bundle's authors sample it (its generation_config.json), with ``changes``. Where they
    say nothing, Sampling's own defaults. Raises UsageError.
    """
    defaults = {} if manifest.sampling is None else msgspec.structs.asdict(manifest.sampling)
    given = {name: value for name, value in defaults.items() if value is not None}
    return dataclasses.replace(Sampling(**given), **changes)


class Model:
    """A loaded bundle.

    Made by :func:`load`; close it, or use it as a context manager. Sessions share its cache.

    >>> model.detokenize(model.tokenize("a b"))
    'a b'
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        *,
        lora: Sequence[tuple[str | Path, float]] = (),
        prompt_folder: str | os.PathLike[str] | None = None,
        on_progress: Callable[[float], bool | None] | None = None,
    ):
        self.bundle, self.plan = bundle, plan
        manifest = bundle.manifest
        self.weights = open_weights(bundle, plan, lora, on_progress)
        try:
            self.decoder = self.weights.decoder
            identity = self.weights.identity
            self._sequences: Sequences | None = None
            self._prompts: PromptCache | None = None
            self._embedder: TextEmbedder | None = None
            if manifest.embedding is None:
                self._prompts = self._prompt_cache(identity, lora, prompt_folder)
                sampling = bundle_sampling(manifest)
                self._sequences = Sequences(
                    self.weights,
                    identity,
                    sampling,
                    self._prompts,
                    n_draft=plan.settings.n_draft,
                )
            else:
                self._embedder = TextEmbedder(manifest, self.weights)
            self.prompt = Prompt(manifest, self.decoder.tokenize, read_special_rows(bundle))
        except BaseException:
            self.weights.close()
            raise
        self.senses = Senses(bundle, plan.settings, self.weights)
        self._scratch_session: Session | None = None

    def _prompt_cache(
        self,
        identity: str,
        lora: Sequence[tuple[str | Path, float]],
        folder: str | os.PathLike[str] | None,
    ) -> PromptCache | None:
        settings = self.plan.settings
        if not settings.prompt_cache_bytes:
            return None
        files = None
        if folder is not None:
            scope = prompt_scope(identity, settings, self.weights.version, lora)
            files = PromptFiles(scope, None if folder == "auto" else Path(folder))
        return PromptCache(settings.prompt_cache_bytes, files)

    @property
    def sequences(self) -> Sequences:
        """The KV cache that conversations share. Raises UnsupportedModel for an embedding bundle,
        which has none.
        """
        require_generation(self.bundle.manifest)
        assert self._sequences is not None
        return self._sequences

    @property
    def _scratch(self) -> Session:
        """The session of :meth:`generate`."""
        if self._scratch_session is None:
            self._scratch_session = Session(self.sequences)
        return self._scratch_session

    # text

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Text → ids, without begin-of-sequence. ``special``: control tokens written in the text
        count as such.
        """
        return self.decoder.tokenize(text, special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        return b"".join(self.decoder.piece(token, special) for token in ids).decode(
            "utf-8", "replace"
        )

    def spans(self, prompt: PromptLike) -> list[Span]:
        """A text, parts or spans → spans. Before text and parts comes begin-of-sequence; pictures
        and clips are encoded. Raises UsageError for an empty prompt, MediaError, UnsupportedModel.
        """
        if not isinstance(prompt, str | Sequence) or not len(prompt):
            raise UsageError(
                "the prompt is empty; give some text, or spans with at least one position"
            )
        if isinstance(prompt, str):
            return self.prompt.raw(prompt)
        spans = [part for part in prompt if isinstance(part, Tokens | Rows)]
        if len(spans) == len(prompt):
            return list(spans)
        parts = [part for part in prompt if not isinstance(part, Tokens)]
        if len(parts) < len(prompt):
            raise UsageError("a prompt is made of parts or of spans; token ids stand among parts")
        return self.prompt.raw(self.senses.encoded(parts))

    # generating

    def sampling(self, **changes: Unpack[SamplingChanges]) -> Sampling:
        """How this model is sampled when nothing else is asked for, with ``changes``: its authors'
        temperature, top_k, top_p … where the bundle holds them. Raises UsageError.

        >>> model.sampling(max_tokens=16).max_tokens
        16
        """
        return bundle_sampling(self.bundle.manifest, **changes)

    def generate(
        self, prompt: PromptLike, sampling: Sampling | None = None
    ) -> Generator[Chunk, None, None]:
        """Continue a text, parts (text, Image, Audio …) or spans; what it shares with the last such
        prompt is reused from the cache.

        >>> chunks = list(model.generate("abc", Sampling(max_tokens=3, temperature=0)))
        >>> chunks[-1].finish_reason, chunks[-1].usage.completion_tokens
        ('length', 3)
        """
        scratch = self._scratch
        scratch.replace(self.spans(prompt))
        yield from scratch.generate(sampling)

    def session(self) -> Session:
        """A conversation in spans; see :class:`Session`.

        >>> with model.session() as session:
        ...     session.append([Tokens([2, 300])])
        """
        return Session(self.sequences)

    def chat(
        self,
        *,
        system: str | None = None,
        tools: Sequence[Mapping] = (),
        pad_audio: bool = True,
        pan_and_scan: bool = False,
    ) -> Chat:
        """A conversation in turns; see :class:`Chat`.

        >>> with model.chat() as chat:
        ...     text = "".join(c.text for c in chat.send("Hi", Sampling(max_tokens=2, seed=3)))
        """
        return Chat(
            self.sequences,
            self.prompt,
            self.senses,
            system=system,
            tools=tools,
            pad_audio=pad_audio,
            pan_and_scan=pan_and_scan,
        )

    def generate_batch(
        self, prompts: Sequence[PromptLike], sampling: Sampling | None = None
    ) -> Batch:
        """Several prompts in one decode per step: an iterator of ``(index, chunk)`` as they come,
        as many at a time as ``n_seq_max`` holds; see :class:`Batch`, which can be cancelled.

        >>> batch = model.generate_batch(["a", "b"], Sampling(max_tokens=2))
        >>> sorted(index for index, chunk in batch if chunk.finish_reason)
        [0, 1]
        """
        spans = [self.spans(prompt) for prompt in prompts]
        return Batch(self.sequences, spans, sampling or self.sequences.sampling)

    async def agenerate(
        self, prompt: PromptLike, sampling: Sampling | None = None
    ) -> AsyncIterator[Chunk]:
        """:meth:`generate` without blocking the event loop; leaving the loop early stops the
        decoding.

        >>> import asyncio
        >>> async def chunks():
        ...     return [chunk async for chunk in model.agenerate("abc", Sampling(max_tokens=2))]
        >>> len(asyncio.run(chunks())) >= 2
        True
        """
        async for chunk in in_thread(self.generate(prompt, sampling), self._scratch.cancel):
            yield chunk

    def evaluate(self, spans: PromptLike, rows: str | range = "all") -> Iterator[np.ndarray]:
        """Logits of a prompt for measuring, in blocks ``[k, n_vocab]`` float32 of at most 64 rows.

        ``rows`` is "all", "last" or a range of positions. A second context is made for it and freed
        at the end; the sessions keep theirs. Raises UsageError, RuntimeFailure (no memory for it).

        >>> [block.shape[0] for block in model.evaluate("abcd", rows="last")]
        [1]
        """
        require_generation(self.bundle.manifest)
        spans = self.spans(spans)
        n = sum(len(span) for span in spans)
        if not 0 < n <= self.decoder.n_ctx_train:
            raise UsageError(
                f"{n} positions were given to evaluate; expected 1 … {self.decoder.n_ctx_train}"
            )
        if rows not in ("all", "last") and not isinstance(rows, range):
            raise UsageError(f"rows is {rows!r}; expected 'all', 'last' or a range of positions")
        blocks = [len(span) for span in spans if isinstance(span, Rows) and not span.causal]
        block = max(blocks, default=0)  # such rows are decoded together
        wanted = rows if isinstance(rows, range) else None
        n_outputs = n_ubatch = max(EVALUATE_ROWS, block)
        if rows == "last":
            wanted, n_outputs = range(n - 1, n), 1
            n_ubatch = max(self.plan.settings.n_ubatch, block)
        settings = dataclasses.replace(
            self.plan.settings, n_ctx=max(n, 64), n_seq_max=1, n_ubatch=n_ubatch
        )
        self.weights.wake()
        context = self.decoder.context(settings, n_outputs=n_outputs)
        try:
            yield from context.evaluate(spans, wanted, step=n_ubatch)
        finally:
            context.close()
            self.weights.trim()

    def classify(self, content: Content, labels: Sequence[str] = ("Yes", "No")) -> dict[str, float]:
        """How likely an answer to ``content`` (text or parts) begins with each label, so that all
        labels together make 1: the softmax over the logits of their first tokens. ShieldGemma's
        score is that of "Yes".

        Instruct bundles get the content as a user's turn, base bundles continue it. Raises
        UsageError where two labels begin with the same token, ContextFull.

        >>> scores = model.classify("Is this safe?")
        >>> list(scores), round(sum(scores.values()), 6)
        (['Yes', 'No'], 1.0)
        """
        firsts = [self.tokenize(label)[:1] for label in labels]
        tokens = [token for first in firsts for token in first]
        if isinstance(labels, str) or not labels or len(set(tokens)) != len(labels):
            raise UsageError(
                f"the labels {labels!r} begin with the tokens {tokens}; expected texts that each "
                "begin with another token"
            )
        if self.bundle.manifest.instruct:
            parts = content if isinstance(content, str) else self.senses.encoded(content)
            spans = self.prompt.spans([Message("user", parts)])
        else:
            parts = [content] if isinstance(content, str) else self.senses.encoded(content)
            spans = self.prompt.raw(parts)
        self._scratch.replace(spans)
        logits = self._scratch.logits()[tokens].astype(np.float64)
        odds = np.exp(logits - logits.max())
        return dict(zip(labels, (odds / odds.sum()).tolist(), strict=True))

    # embedding

    def embed(
        self,
        texts: Sequence[str],
        *,
        kind: str | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """Texts → vectors ``[n, width]`` float32 of length 1, as sentence-transformers makes them.

        ``kind`` names the prompt that is put in front of each text: "query", "document", or another
        of the bundle's. ``dimensions`` cuts the vectors to one of the widths the model was trained
        for (768, 512, 256 or 128). A text of more tokens than fit is an error, or is cut at its end
        with ``truncate``, as sentence-transformers does. Raises UsageError, UnsupportedModel (a
        bundle that generates text).

        >>> with load("my-embedding-gemma") as model:
        ...     model.embed(["a river", "a bridge"], kind="document", dimensions=128).shape
        (2, 128)
        """
        require_embedding(self.bundle.manifest)
        assert self._embedder is not None
        return self._embedder.embed(texts, kind=kind, dimensions=dimensions, truncate=truncate)

    # media

    def encode_audio(self, source: str | os.PathLike[str] | np.ndarray) -> np.ndarray:
        """A sound file, or mono samples at 16 kHz ``[n]`` float32 in [−1, 1] → soft tokens ``[k,
        n_embd]`` float32, real rows only. Raises UnsupportedModel, MediaError.
        """
        return self.senses.encode_audio(source)

    def encode_image(self, image: Image | PictureSource) -> np.ndarray:
        """A picture (Image, path, bytes, array ``[h, w, 3]`` uint8 or Pillow image) → soft tokens
        ``[k, n_embd]`` float32, real rows only. Raises UnsupportedModel, MediaError.
        """
        return self.senses.encode_image(image if isinstance(image, Image) else Image(image))

    def close(self) -> None:
        if self._embedder is not None:
            self._embedder.close()
        if self._sequences is not None:
            self._sequences.close()
        self.senses.close()
        self.weights.close()
        if self._prompts is not None:
            self._prompts.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_) -> None:
        self.close()


async def in_thread(
    chunks: Generator[Chunk, None, None], cancel: Callable[[], None]
) -> AsyncIterator[Chunk]:
    """Drive a blocking iterator from a worker thread, one item at a time; ``cancel`` unblocks it
    when the consumer leaves.
    """
    end = object()
    running: asyncio.Future | None = None
    try:
        while True:
            running = asyncio.ensure_future(asyncio.to_thread(next, chunks, end))
            item = await asyncio.shield(running)
            running = None
            if item is end:
                return
            yield item
    finally:
        if (
            running is not None
        ):  # cancelled while a token was being decoded: stop it and let it land
            cancel()
            await asyncio.wait([running])
        chunks.close()
