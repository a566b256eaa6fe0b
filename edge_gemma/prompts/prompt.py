"""Turns → spans: what was said, shown and played, as token ids and embedding rows in the order the
decoder reads them.

In: messages, a bundle's manifest and special rows, and a tokenizer ``tokenize(text, special) ->
list[int]``. Out: a list of spans. This room does not know llama.cpp, encoders or sessions; whoever
calls brings soft tokens, or an ``encode`` that makes them.

The bundle's own chat template decides the text, in a jinja2 sandbox. It never sees the difference
between text and control: user text goes in between marks, and only what the template itself wrote
around them is read for control tokens. A user who types ``<end_of_turn>`` therefore sends eleven
letters and no end of turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import Manifest
from edge_gemma.errors import BundleError, UsageError
from edge_gemma.messages import Audio, Image, Message, Part
from edge_gemma.prompts.template import GEMMA_TEMPLATE, render
from edge_gemma.prompts.turns import _checked, _folded, _Marks, _turns
from edge_gemma.spans import Rows, Span, Tokens

AUDIO_ROWS = 188  # soft tokens of 30 s; transformers always sends that many, the rest being padding
_TOKEN_LIKE = re.compile(r"<[^<>\s]{1,64}>")


def read_special_rows(bundle: Bundle) -> dict[str, np.ndarray]:
    """``special_rows.npy`` of a bundle by name: ``{"end_of_audio": [n_embd] float32, …}``. Raises
    BundleError.
    """
    names, width = bundle.manifest.special_rows, bundle.manifest.decoder.n_embd
    if not names:
        return {}
    path = bundle.path("special_rows.npy")
    if path.stat().st_size > 4096 + len(names) * width * 4:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes; {len(names)} rows of {width} float32 "
            "were expected"
        )
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    if (
        not isinstance(rows, np.ndarray)
        or rows.dtype != np.float32
        or rows.shape != (len(names), width)
        or not np.isfinite(rows).all()
    ):
        found = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else "no array"
        raise BundleError(f"{path} holds {found}; expected finite float32 {[len(names), width]}")
    return dict(zip(names, rows, strict=True))


class Prompt:
    """Makes spans for one bundle. ``special_rows`` comes from :func:`read_special_rows`.

    >>> from types import SimpleNamespace
    >>> prompt = Prompt(SimpleNamespace(special_tokens={"bos": 2}), lambda text, special: list(text.encode()))
    >>> prompt.raw("Hi")
    [Tokens(ids=(2, 72, 105))]
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenize: Callable[[str, bool], list[int]],
        special_rows: Mapping[str, np.ndarray] | None = None,
    ):
        self.manifest, self._tokenize, self._special_rows = manifest, tokenize, special_rows or {}
        self._bos = manifest.special_tokens.get("bos")
        self._control_ids = {id for name, id in manifest.special_tokens.items() if name != "unk"}
        self._controls: dict[str, int | None] = {}

    # ---- what callers use

    def spans(
        self,
        messages: Iterable[Message | Mapping],
        *,
        tools: Sequence[Mapping] = (),
        continued: bool = False,
        generate: bool = True,
        pad_audio: bool = True,
        encode: Callable[[Image | Audio], np.ndarray] | None = None,
    ) -> list[Span]:
        """The spans of a whole conversation, or with ``continued`` only what follows its last
        answer.

        An append-only chat prefills the first turn whole and then each new one with ``continued``:
        these spans begin with the ``<end_of_turn>`` that closes the answer (which is in the cache
        as it was generated, without that token), so that all together are the full rendering.
        ``generate`` opens the model's turn. ``pad_audio`` fills each clip to 188 rows as
        transformers does; without, prefill is shorter and the answer may differ. ``encode`` turns
        parts into soft tokens ``[n, n_embd]``. Raises UsageError, BundleError (the template).
        """
        return self._fill(self._pieces(messages, tools, continued, generate), pad_audio, encode)

    def listening(
        self,
        messages: Iterable[Message | Mapping],
        *,
        tools: Sequence[Mapping] = (),
        continued: bool = False,
        pad_audio: bool = True,
    ) -> tuple[list[Span], Callable[[int], list[Span]]]:
        """Around a clip still being spoken: (the spans before its first soft token, ``after(n_rows)
        -> `` the spans that follow).

        ``messages`` hold exactly one ``Audio()``; pictures and clips of earlier turns bring their
        soft tokens. Its rows are causal: append them as ``Rows`` while the encoder yields them.
        """
        pieces = self._pieces(messages, tools, continued, True)
        live = [
            i
            for i, piece in enumerate(pieces)
            if isinstance(piece, Audio) and piece.source is None and piece.rows is None
        ]
        if len(live) != 1:
            raise UsageError(
                "listening takes messages with exactly one Audio() that is still to be "
                f"spoken; found {len(live)} of them"
            )
        before, behind = pieces[: live[0]], pieces[live[0] + 1 :]

        def after(n_rows: int) -> list[Span]:
            return _merge(
                [*self._audio_end(n_rows, pad_audio), *self._fill(behind, pad_audio, None)]
            )

        return _merge(
            [*self._fill(before, pad_audio, None), Tokens([self._token("start_of_audio", "hear")])]
        ), after

    def between_clips(self, n_rows: int, *, pad_audio: bool = True) -> list[Span]:
        """While listening: what stands between a clip of ``n_rows`` soft tokens and the next one of
        the same turn.
        """
        run = _Run(self)
        run.user("\n\n\n\n")  # the blank lines behind the one and before the other
        run.control([self._token("start_of_audio", "hear")])
        return _merge([*self._audio_end(n_rows, pad_audio), Tokens(run.done())])

    def raw(
        self,
        parts: str | Sequence[Part],
        *,
        pad_audio: bool = True,
        encode: Callable[[Image | Audio], np.ndarray] | None = None,
    ) -> list[Span]:
        """Text and media without turns, for base weights: begin of sequence, then the parts as they
        come.
        """
        run = _Run(self)
        run.control([] if self._bos is None else [self._bos])
        for part in [parts] if isinstance(parts, str) else parts:
            run.part(_checked(part))
        return self._fill(run.done(), pad_audio, encode)

    # ---- rendering

    def _pieces(
        self, messages, tools, continued: bool, generate: bool
    ) -> list[int | Image | Audio | Rows]:
        turns = _turns(messages, tools)
        if continued:
            last = max(
                (i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None
            )
            if last is None or last == len(turns) - 1:
                raise UsageError(
                    "a continued prompt needs an answered conversation and a new message "
                    "after the last answer"
                )
            # the cache holds the answer as generated: whatever the template would trim must not be
            # looked for behind it
            turns[last] = Message(
                "assistant",
                [part.strip() if isinstance(part, str) else part for part in turns[last].content],
            )
        elif generate and turns[-1].role == "assistant":
            raise UsageError("the last message is the model's own; add a user message to answer")
        rendered, marks = self._render(turns, generate)
        run, found = _Run(self), re.split(rf"{marks.key}([tcm])([0-9]+)\ue001", rendered)
        texts, kinds, numbers = (
            found[0::3],
            ["", *found[1::3]],
            [-1, *map(int, found[2::3])],
        )  # each text with the mark before it
        first = 0
        if continued:  # what lies before is in the cache: skip to behind the last answer's end
            first = max(
                i
                for i, kind in enumerate(kinds)
                if kind == "c" and marks.turns_after[numbers[i]] == len(turns) - 1 - last
            )
        for i in range(first, len(texts)):
            if kinds[i] == "m":
                run.part(marks.media[numbers[i]])
            run.user(texts[i]) if kinds[i] == "t" else run.template(texts[i])
        pieces = run.done()
        if not continued and self._bos is not None and pieces[:1] != [self._bos]:
            pieces.insert(0, self._bos)
        return pieces

    def _render(self, turns: list[Message], generate: bool) -> tuple[str, _Marks]:
        """Try the messages as they are; then with the system text folded into the first user turn;
        then each as one string.
        """
        source = self.manifest.chat_template or GEMMA_TEMPLATE
        first_error: Exception | None = None
        variants = [turns, _folded(turns)] if self.manifest.chat_template else [_folded(turns)]
        for flat in (False, True):
            for variant in variants:
                marks = _Marks(variant, source)
                try:
                    text = render(source, marks.messages(flat), generate)
                except UsageError as error:
                    first_error = first_error or error
                    continue
                if re.findall(rf"{marks.key}([tcm][0-9]+)\ue001", text) == marks.order:
                    return text, marks
                first_error = first_error or UsageError(
                    "the bundle's chat template drops, repeats or reorders what the messages "
                    "say; it cannot be used for this conversation"
                )
        raise first_error

    def _fill(self, pieces, pad_audio: bool, encode) -> list[Span]:
        spans: list[Span] = []
        for piece in pieces:
            if isinstance(piece, int):
                spans.append(Tokens([piece]))
            elif isinstance(piece, Rows):
                spans.append(self._rows(piece))
            else:
                rows = piece.rows
                if rows is None:
                    if piece.source is None:
                        raise UsageError(
                            f"a message holds an empty {type(piece).__name__}(); give it a "
                            "file or soft tokens (a live clip goes through listening)"
                        )
                    if encode is None:
                        raise UsageError(
                            f"a message holds {type(piece).__name__}({piece.source!r}) but "
                            "there is no encoder here; pass its soft tokens as rows"
                        )
                    rows = encode(piece)
                spans += (
                    self._image(rows) if piece.kind == "image" else self._audio(rows, pad_audio)
                )
        return _merge(spans)

    # ---- media, exactly as transformers' processors write it (specs of Gemma 3 and 3n); the "\n\n" around belongs to the text

    def _image(self, rows: np.ndarray) -> list[Span]:
        expected = self.manifest.vision.n_soft_tokens if self.manifest.vision else 256
        if np.shape(rows)[:1] != (expected,):
            raise UsageError(
                f"an image has soft tokens of shape {list(np.shape(rows))}; this model takes "
                f"{expected} rows per image"
            )
        start = Tokens([self._token("start_of_image", "see")])
        if self.manifest.family == "gemma3":
            return [
                start,
                self._rows(Rows(rows, causal=False)),
                Tokens([self._token("end_of_image", "see")]),
            ]
        return [start, self._rows(rows), self._rows(self._special("end_of_image", "see"))]

    def _audio(self, rows: np.ndarray, pad: bool) -> list[Span]:
        start = Tokens([self._token("start_of_audio", "hear")])
        return [start, *([self._rows(rows)] if len(rows) else []), *self._audio_end(len(rows), pad)]

    def _audio_end(self, n_rows: int, pad: bool) -> list[Span]:
        if n_rows > AUDIO_ROWS:
            raise UsageError(
                f"a clip has {n_rows} soft tokens; the model takes at most {AUDIO_ROWS} (30 "
                "s) per clip, so cut it"
            )
        tail = [self._special("audio_padding", "hear")] * (AUDIO_ROWS - n_rows) if pad else []
        return [self._rows(np.concatenate([*tail, self._special("end_of_audio", "hear")]))]

    def _rows(self, rows: np.ndarray | Rows) -> Rows:
        span = rows if isinstance(rows, Rows) else Rows(rows)
        if span.rows.shape[1] != self.manifest.decoder.n_embd:
            raise UsageError(
                f"embedding rows have shape {list(span.rows.shape)}; this model takes [n, "
                f"{self.manifest.decoder.n_embd}]"
            )
        return span

    def _special(self, name: str, verb: str) -> np.ndarray:  # [1, n_embd] float32
        if name not in self._special_rows:
            raise UsageError(
                f"this bundle cannot {verb}: it has no {name!r} row. Make one with "
                "`edge-gemma convert` from the checkpoint"
            )
        return self._special_rows[name][None]

    def _token(self, name: str, verb: str) -> int:
        if name not in self.manifest.special_tokens:
            raise UsageError(f"this bundle cannot {verb}: its vocabulary has no {name!r} token")
        return self.manifest.special_tokens[name]

    # ---- text → ids

    def _control(self, text: str) -> int | None:
        """The id of a control token written out in a template, or None for what only looks like
        one.
        """
        if text not in self._controls:
            ids = self._tokenize(text, True)
            self._controls[text] = ids[0] if len(ids) == 1 else None
        return self._controls[text]

    def _plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token, whatever it looks like.

        Some of Gemma's control tokens are ordinary entries for the tokenizer
        (``<start_of_image>``): those are cut behind the ``<``, so that they become letters.
        """
        ids = self._tokenize(text, False)
        if self._control_ids.isdisjoint(ids):
            return ids
        cut = _TOKEN_LIKE.sub(
            lambda m: (
                m[0]
                if self._control_ids.isdisjoint(self._tokenize(m[0], False))
                else m[0][0] + "\0" + m[0][1:]
            ),
            text,
        )
        ids = [id for piece in cut.split("\0") for id in self._tokenize(piece, False)]
        return (
            ids
            if self._control_ids.isdisjoint(ids)
            else [id for letter in text for id in self._tokenize(letter, False)]
        )


class _Run:
    """Collects ids and media in order. Neighbouring text is tokenized in one piece, as it would be
    in the full rendering.
    """

    def __init__(self, prompt: Prompt):
        self._prompt, self._text = prompt, ""
        self._pieces: list[int | Image | Audio | Rows] = []

    def user(self, text: str) -> None:
        self._text += text

    def template(self, text: str) -> None:
        position = 0
        for match in _TOKEN_LIKE.finditer(text):
            if (id := self._prompt._control(match[0])) is not None:
                self._text += text[position : match.start()]
                self.control([id])
                position = match.end()
        self._text += text[position:]

    def control(self, ids: Sequence[int]) -> None:
        if self._text:
            self._pieces += self._prompt._plain(self._text)
            self._text = ""
        self._pieces += ids

    def part(self, part: Part) -> None:
        if isinstance(part, str):
            return self.user(part)
        if isinstance(part, Rows):
            self.control([])
            self._pieces.append(part)
            return
        self._text += "\n\n"
        self.control([])
        self._pieces.append(part)
        self._text = "\n\n"

    def done(self) -> list[int | Image | Audio | Rows]:
        self.control([])
        return self._pieces


def _merge(spans: Iterable[Span]) -> list[Span]:
    """Neighbouring token spans become one."""
    merged: list[Span] = []
    ids: list[int] = []
    for span in spans:
        if isinstance(span, Tokens):
            ids += span.ids
            continue
        if ids:
            merged.append(Tokens(ids))
            ids = []
        merged.append(span)
    return [*merged, Tokens(ids)] if ids else merged
