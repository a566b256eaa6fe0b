"""The front door: ``load`` a bundle inside a budget, get a :class:`Model`, generate.

In: a bundle (folder or installed name) and a request. Out: a context manager that owns weights, one
KV cache and, when they are needed, the encoders. Conversations live in session.py and chat.py; this
room plans, opens, lends the cache and closes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import Sense, require
from edge_gemma.conversation.batch import _Lane
from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.sequences import Cache
from edge_gemma.conversation.session import Session
from edge_gemma.conversation.stream import Chunk
from edge_gemma.engines.llama.decoder import EVALUATE_ROWS
from edge_gemma.engines.llama.weights import Weights, repacked_here
from edge_gemma.errors import UsageError
from edge_gemma.machine.device import Device
from edge_gemma.machine.probe import machine_for
from edge_gemma.messages import Audio, Image
from edge_gemma.options import Sampling
from edge_gemma.plan.ladder import make_plan
from edge_gemma.plan.records import Plan, PlanRequest
from edge_gemma.prompts.prompt import Prompt, read_special_rows
from edge_gemma.spans import Span, Tokens
from edge_gemma.units import parse_bytes

PromptLike = str | Sequence[Span]


def load(
    bundle: str | os.PathLike | Bundle,
    *,
    budget: int | str | None = None,
    device: str | Device = "auto",
    n_ctx: int | None = None,
    request: PlanRequest = PlanRequest(),
    lora: Sequence[tuple[str | Path, float]] = (),
    on_progress: Callable[[float], bool | None] | None = None,
) -> Model:
    """Plan, then load.

    ``budget`` in bytes or as text ("2GiB"); ``device`` a profile's name or "auto"; ``request`` the
    rest.

    Raises PlanRefused before anything is allocated, BundleError, UsageError.

    >>> with load(getfixture("tiny_bundle"), n_ctx=512) as model:
    ...     model.plan.fits
    True
    """
    if not isinstance(bundle, Bundle):
        from edge_gemma.store.installed import resolve

        bundle = Bundle.open(resolve(bundle))
    changes = {"budget_bytes": None if budget is None else parse_bytes(budget), "n_ctx": n_ctx}
    request = dataclasses.replace(
        request, **{name: value for name, value in changes.items() if value is not None}
    )
    if lora:
        request = dataclasses.replace(
            request,
            lora_bytes=sum(Path(file).stat().st_size for file, _ in lora if Path(file).is_file()),
        )
    plan = make_plan(bundle.manifest, machine_for(device), request, repacked_here).require()
    return Model(bundle, plan, lora=lora, on_progress=on_progress)


class Model:
    """A loaded bundle.

    Made by :func:`load`; close it, or use it as a context manager. Sessions share its cache.

    >>> model = getfixture("tiny_model")
    >>> model.detokenize(model.tokenize("a b"))
    'a b'
    """

    def __init__(
        self,
        bundle: Bundle,
        plan: Plan,
        *,
        lora: Sequence[tuple[str | Path, float]] = (),
        on_progress=None,
    ):
        self.bundle, self.plan = bundle, plan
        manifest = bundle.manifest
        self.weights = Weights(bundle, plan, lora=lora, on_progress=on_progress)
        try:
            self.decoder = self.weights.decoder
            self.cache = Cache(self.weights, manifest.files[manifest.decoder.file].sha256)
            self.prompt = Prompt(manifest, self.decoder.tokenize, read_special_rows(bundle))
        except BaseException:
            self.weights.close()
            raise
        self._encoders: dict[str, object] = {}
        self._scratch = Session(self.cache)

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
        """A plain text (begin-of-sequence is added) or spans, as spans. Raises UsageError for an
        empty one.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if not prompt:
            raise UsageError(
                "the prompt is empty; give some text, or spans with at least one position"
            )
        return self.prompt.raw(prompt)

    # generating

    def generate(self, prompt: PromptLike, options: Sampling = Sampling()) -> Iterator[Chunk]:
        """Continue a text or spans; what it shares with the last such prompt is reused from the
        cache.

        >>> chunks = list(getfixture("tiny_model").generate("abc", Sampling(max_tokens=3, temperature=0)))
        >>> chunks[-1].finish_reason, chunks[-1].usage.completion_tokens
        ('length', 3)
        """
        self._scratch.replace(self.spans(prompt))
        yield from self._scratch.generate(options)

    def session(self) -> Session:
        """A conversation in spans; see :class:`Session`.

        >>> with getfixture("tiny_model").session() as session:
        ...     session.append([Tokens([2, 300])])
        """
        return Session(self.cache)

    def chat(
        self, *, system: str | None = None, tools: Sequence[Mapping] = (), pad_audio: bool = True
    ) -> Chat:
        """A conversation in turns; see :class:`Chat`.

        >>> with getfixture("tiny_model").chat() as chat:
        ...     text = "".join(c.text for c in chat.send("Hi", Sampling(max_tokens=2, seed=3)))
        """
        return Chat(self, system=system, tools=tools, pad_audio=pad_audio)

    def generate_batch(
        self, prompts: Sequence[PromptLike], options: Sampling = Sampling()
    ) -> Iterator[tuple[int, Chunk]]:
        """Several prompts in one decode per step:

        ``(index, chunk)`` as they come. As many at a time as ``n_seq_max`` holds.

        >>> ends = [i for i, chunk in getfixture("tiny_model").generate_batch(["a", "b"], Sampling(max_tokens=2)) if chunk.finish_reason]
        >>> sorted(ends)
        [0, 1]
        """
        waiting = list(enumerate(self.spans(p) for p in prompts))
        active: list[_Lane] = []
        self.cache.context.clear_cancel()
        try:
            while waiting or active:
                while waiting and len(active) < self.plan.settings.n_seq_max:
                    active.append(_Lane(self, *waiting.pop(0), options))
                with self.cache.context.lock:
                    new = [lane for lane in active if not lane.ids]
                    # a prompt is prefilled by itself; its first token is sampled from its own
                    # logits
                    for lane in new:
                        lane.session._prefill(lane.session.length, outputs="last")
                        lane.next_id(0)
                    ready = [
                        lane for lane in active if lane.ids and not lane.done and lane not in new
                    ]
                    if ready:
                        self.cache.context.decode_step(
                            [
                                (lane.session._sequence, lane.session.length - 1, lane.ids[-1])
                                for lane in ready
                            ]
                        )
                        for row, lane in enumerate(ready):
                            lane.session._cached = lane.session.length
                            lane.next_id(row)
                for lane in active:
                    yield from ((lane.index, chunk) for chunk in lane.take())
                for lane in [lane for lane in active if lane.done]:
                    active.remove(lane)
                    lane.close()
        finally:
            for lane in active:
                lane.close()
            self.weights.trim()

    async def agenerate(
        self, prompt: PromptLike, options: Sampling = Sampling()
    ) -> AsyncIterator[Chunk]:
        """:meth:`generate` without blocking the event loop; leaving the loop early stops the
        decoding.

        >>> async def text(model):
        ...     return [chunk async for chunk in model.agenerate("abc", Sampling(max_tokens=2))]
        >>> len(asyncio.run(text(getfixture("tiny_model")))) >= 2
        True
        """
        async for chunk in in_thread(self.generate(prompt, options), self._scratch.cancel):
            yield chunk

    def evaluate(self, spans: PromptLike, rows: str | range = "all") -> Iterator[np.ndarray]:
        """Logits of a prompt for measuring, in blocks ``[k, n_vocab]`` float32 of at most 64 rows.

        ``rows`` is "all", "last" or a range of positions. A second context is made for it and freed
        at the end; the sessions keep theirs. Raises UsageError, RuntimeFailure (no memory for it).

        >>> [block.shape[0] for block in getfixture("tiny_model").evaluate("abcd", rows="last")]
        [1]
        """
        spans = self.spans(spans)
        n = sum(len(span) for span in spans)
        if not 0 < n <= self.decoder.n_ctx_train:
            raise UsageError(
                f"{n} positions were given to evaluate; expected 1 … {self.decoder.n_ctx_train}"
            )
        if rows not in ("all", "last") and not isinstance(rows, range):
            raise UsageError(f"rows is {rows!r}; expected 'all', 'last' or a range of positions")
        wanted = None if rows == "all" else range(n - 1, n) if rows == "last" else rows
        block = max(
            [len(s) for s in spans if not isinstance(s, Tokens) and not s.causal], default=0
        )
        n_outputs = 1 if rows == "last" else max(EVALUATE_ROWS, block)
        n_ubatch = max(self.plan.settings.n_ubatch if rows == "last" else EVALUATE_ROWS, block)
        settings = dataclasses.replace(
            self.plan.settings, n_ctx=max(n, 64), n_seq_max=1, n_ubatch=n_ubatch
        )
        context = self.decoder.context(settings, n_outputs=n_outputs)
        try:
            yield from context.evaluate(spans, wanted, step=n_ubatch)
        finally:
            context.close()
            self.weights.trim()

    # media

    def encode_audio(self, samples: np.ndarray) -> np.ndarray:
        """Mono samples at 16 kHz, float32 in [−1, 1] → soft tokens ``[n, n_embd]`` float32, real
        rows only.
        """
        return self.encoder("audio").encode(samples)

    def encode_image(self, image) -> np.ndarray:
        """A picture (path, bytes, array ``[h, w, 3]`` uint8 or Pillow image) → soft tokens ``[n,
        n_embd]`` float32, real rows only.
        """
        return self.encoder("vision")(image)

    def media(self, parts: Sequence, *, pan_and_scan: bool = False, used_tokens: int = 0) -> list:
        """A message's parts with videos cut into frames and pictures checked, before anything is
        encoded; see :func:`edge_gemma.seeing.soft_tokens.prepare`.
        """
        from edge_gemma.seeing.soft_tokens import prepare

        manifest = self.bundle.manifest
        return prepare(
            parts,
            manifest.vision,
            self.plan.settings.n_ctx - used_tokens,
            pan_and_scan=pan_and_scan,
            name=manifest.name,
        )

    def encode(self, part: Image | Audio) -> np.ndarray:
        """A part of a message → its soft tokens."""
        if isinstance(part, Image):
            return self.encode_image(part)
        if isinstance(part.source, str | os.PathLike):
            from edge_gemma.hearing.sound import read_audio

            return self.encode_audio(read_audio(part.source))
        return self.encode_audio(part.source)

    def encoder(self, name: Sense):
        """The open encoder "audio" or "vision", opened now if need be; where the plan holds one at
        a time, the other is closed.
        """
        if name not in self._encoders:
            require(self.bundle.manifest, name)
            if self.plan.settings.encoders == "one at a time":
                self.release_encoders()
            n_threads = self.plan.settings.n_threads
            if name == "audio":
                from edge_gemma.hearing.encoder import AudioEncoder

                self._encoders[name] = AudioEncoder(self.bundle, n_threads=n_threads)
            else:
                from edge_gemma.seeing.cache import SoftTokenCache
                from edge_gemma.seeing.soft_tokens import Look

                keep = self.plan.settings.encoders == "resident"
                self._encoders[name] = Look(
                    self.bundle, n_threads=n_threads, keep=keep, cache=SoftTokenCache()
                )
        return self._encoders[name]

    def release_encoders(self) -> None:
        """Close what is open; it opens again when it is needed."""
        while self._encoders:
            self._encoders.popitem()[1].close()

    def close(self) -> None:
        self.release_encoders()
        self.weights.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_) -> None:
        self.close()


async def in_thread(chunks: Iterator[Chunk], cancel: Callable[[], None]) -> AsyncIterator[Chunk]:
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
