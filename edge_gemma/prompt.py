"""Turns → spans: what was said, shown and played, as token ids and embedding rows in the order the decoder reads them.

In: messages, a bundle's manifest and special rows, and a tokenizer ``tokenize(text, special) -> list[int]``. Out: a list of spans.
This room does not know llama.cpp, encoders or sessions; whoever calls brings soft tokens, or an ``encode`` that makes them.

The bundle's own chat template decides the text, in a jinja2 sandbox. It never sees the difference between text and control:
user text goes in between marks, and only what the template itself wrote around them is read for control tokens. A user who
types ``<end_of_turn>`` therefore sends eleven letters and no end of turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bundle import Bundle, Manifest
from .calls import FunctionCall, parse_calls, tool_schema, tools_text
from .errors import BundleError, UsageError
from .spans import Rows, Span, Tokens
from .template import GEMMA_TEMPLATE, render

__all__ = ["Audio", "FunctionCall", "Image", "Message", "Prompt", "parse_calls", "read_special_rows", "tool_schema"]

AUDIO_ROWS = 188  # soft tokens of 30 s; transformers always sends that many, the rest being padding
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "model": "assistant", "tool": "tool"}
_TOKEN_LIKE = re.compile(r"<[^<>\s]{1,64}>")


@dataclass(frozen=True, eq=False)
class Image:
    """A picture in a message: anything ``encode`` understands, or its soft tokens ``[n, n_embd]`` float32 at once.

    >>> Image(rows=np.zeros((256, 8), np.float32)).kind
    'image'
    """

    source: Any = None
    size: int | None = None  # the encoder's input size in pixels, where it offers several
    rows: np.ndarray | None = None
    kind = "image"


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound in a message: a file or samples for ``encode``, or its soft tokens ``[n, n_embd]`` float32 at once.

    ``Audio()`` alone is a clip still to be spoken: see :meth:`Prompt.listening`.
    """

    source: Any = None
    rows: np.ndarray | None = None
    kind = "audio"


Part = str | Image | Audio | Rows


@dataclass(frozen=True)
class Message:
    """One turn's words. ``role`` is system, user, assistant (or model) or tool; ``content`` text or a list of parts.

    >>> Message("user", ["What is this?", Image("cat.jpg")]).role
    'user'
    """

    role: str
    content: str | Sequence[Part]


def read_special_rows(bundle: Bundle) -> dict[str, np.ndarray]:
    """``special_rows.npy`` of a bundle by name: ``{"end_of_audio": [n_embd] float32, …}``. Raises BundleError."""
    names, width = bundle.manifest.special_rows, bundle.manifest.decoder.n_embd
    if not names:
        return {}
    path = bundle.path("special_rows.npy")
    if path.stat().st_size > 4096 + len(names) * width * 4:
        raise BundleError(f"{path} has {path.stat().st_size} bytes; {len(names)} rows of {width} float32 were expected")
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, np.ndarray) or rows.dtype != np.float32 or rows.shape != (len(names), width) or not np.isfinite(rows).all():
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

    def __init__(self, manifest: Manifest, tokenize: Callable[[str, bool], list[int]], special_rows: Mapping[str, np.ndarray] | None = None):
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
        """The spans of a whole conversation, or with ``continued`` only what follows its last answer.

        An append-only chat prefills the first turn whole and then each new one with ``continued``: these spans begin with the
        ``<end_of_turn>`` that closes the answer (which is in the cache as it was generated, without that token), so that all
        together are the full rendering. ``generate`` opens the model's turn. ``pad_audio`` fills each clip to 188 rows as
        transformers does; without, prefill is shorter and the answer may differ. ``encode`` turns parts into soft tokens
        ``[n, n_embd]``. Raises UsageError, BundleError (the template).
        """
        return self._fill(self._pieces(messages, tools, continued, generate), pad_audio, encode)

    def listening(
        self, messages: Iterable[Message | Mapping], *, tools: Sequence[Mapping] = (), continued: bool = False, pad_audio: bool = True
    ) -> tuple[list[Span], Callable[[int], list[Span]]]:
        """Around a clip still being spoken: (the spans before its first soft token, ``after(n_rows) -> `` the spans that follow).

        ``messages`` hold exactly one ``Audio()``; pictures and clips of earlier turns bring their soft tokens. Its rows are causal: append
        them as ``Rows`` while the encoder yields them.
        """
        pieces = self._pieces(messages, tools, continued, True)
        live = [i for i, piece in enumerate(pieces) if isinstance(piece, Audio) and piece.source is None and piece.rows is None]
        if len(live) != 1:
            raise UsageError(f"listening takes messages with exactly one Audio() that is still to be spoken; found {len(live)} of them")
        before, behind = pieces[: live[0]], pieces[live[0] + 1 :]

        def after(n_rows: int) -> list[Span]:
            return _merge([*self._audio_end(n_rows, pad_audio), *self._fill(behind, pad_audio, None)])

        return _merge([*self._fill(before, pad_audio, None), Tokens([self._token("start_of_audio", "hear")])]), after

    def between_clips(self, n_rows: int, *, pad_audio: bool = True) -> list[Span]:
        """While listening: what stands between a clip of ``n_rows`` soft tokens and the next one of the same turn."""
        run = _Run(self)
        run.user("\n\n\n\n")  # the blank lines behind the one and before the other
        run.control([self._token("start_of_audio", "hear")])
        return _merge([*self._audio_end(n_rows, pad_audio), Tokens(run.done())])

    def raw(self, parts: str | Sequence[Part], *, pad_audio: bool = True, encode: Callable[[Image | Audio], np.ndarray] | None = None) -> list[Span]:
        """Text and media without turns, for base weights: begin of sequence, then the parts as they come."""
        run = _Run(self)
        run.control([] if self._bos is None else [self._bos])
        for part in [parts] if isinstance(parts, str) else parts:
            run.part(_checked(part))
        return self._fill(run.done(), pad_audio, encode)

    # ---- rendering

    def _pieces(self, messages, tools, continued: bool, generate: bool) -> list[int | Image | Audio | Rows]:
        turns = _turns(messages, tools)
        if continued:
            last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
            if last is None or last == len(turns) - 1:
                raise UsageError("a continued prompt needs an answered conversation and a new message after the last answer")
            # the cache holds the answer as generated: whatever the template would trim must not be looked for behind it
            turns[last] = Message("assistant", [part.strip() if isinstance(part, str) else part for part in turns[last].content])
        elif generate and turns[-1].role == "assistant":
            raise UsageError("the last message is the model's own; add a user message to answer")
        rendered, marks = self._render(turns, generate)
        run, found = _Run(self), re.split(rf"{marks.key}([tcm])([0-9]+)\ue001", rendered)
        texts, kinds, numbers = found[0::3], ["", *found[1::3]], [-1, *map(int, found[2::3])]  # each text with the mark before it
        first = 0
        if continued:  # what lies before is in the cache: skip to behind the last answer's end
            first = max(i for i, kind in enumerate(kinds) if kind == "c" and marks.turns_after[numbers[i]] == len(turns) - 1 - last)
        for i in range(first, len(texts)):
            if kinds[i] == "m":
                run.part(marks.media[numbers[i]])
            run.user(texts[i]) if kinds[i] == "t" else run.template(texts[i])
        pieces = run.done()
        if not continued and self._bos is not None and pieces[:1] != [self._bos]:
            pieces.insert(0, self._bos)
        return pieces

    def _render(self, turns: list[Message], generate: bool) -> tuple[str, "_Marks"]:
        """Try the messages as they are; then with the system text folded into the first user turn; then each as one string."""
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
                    "the bundle's chat template drops, repeats or reorders what the messages say; it cannot be used for this conversation"
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
                        raise UsageError(f"a message holds an empty {type(piece).__name__}(); give it a file or soft tokens (a live clip goes through listening)")
                    if encode is None:
                        raise UsageError(f"a message holds {type(piece).__name__}({piece.source!r}) but there is no encoder here; pass its soft tokens as rows")
                    rows = encode(piece)
                spans += self._image(rows) if piece.kind == "image" else self._audio(rows, pad_audio)
        return _merge(spans)

    # ---- media, exactly as transformers' processors write it (specs of Gemma 3 and 3n); the "\n\n" around belongs to the text

    def _image(self, rows: np.ndarray) -> list[Span]:
        expected = self.manifest.vision.n_soft_tokens if self.manifest.vision else 256
        if np.shape(rows)[:1] != (expected,):
            raise UsageError(f"an image has soft tokens of shape {list(np.shape(rows))}; this model takes {expected} rows per image")
        start = Tokens([self._token("start_of_image", "see")])
        if self.manifest.family == "gemma3":
            return [start, self._rows(Rows(rows, causal=False)), Tokens([self._token("end_of_image", "see")])]
        return [start, self._rows(rows), self._rows(self._special("end_of_image", "see"))]

    def _audio(self, rows: np.ndarray, pad: bool) -> list[Span]:
        start = Tokens([self._token("start_of_audio", "hear")])
        return [start, *([self._rows(rows)] if len(rows) else []), *self._audio_end(len(rows), pad)]

    def _audio_end(self, n_rows: int, pad: bool) -> list[Span]:
        if n_rows > AUDIO_ROWS:
            raise UsageError(f"a clip has {n_rows} soft tokens; the model takes at most {AUDIO_ROWS} (30 s) per clip, so cut it")
        tail = [self._special("audio_padding", "hear")] * (AUDIO_ROWS - n_rows) if pad else []
        return [self._rows(np.concatenate([*tail, self._special("end_of_audio", "hear")]))]

    def _rows(self, rows: np.ndarray | Rows) -> Rows:
        span = rows if isinstance(rows, Rows) else Rows(rows)
        if span.rows.shape[1] != self.manifest.decoder.n_embd:
            raise UsageError(f"embedding rows have shape {list(span.rows.shape)}; this model takes [n, {self.manifest.decoder.n_embd}]")
        return span

    def _special(self, name: str, verb: str) -> np.ndarray:  # [1, n_embd] float32
        if name not in self._special_rows:
            raise UsageError(f"this bundle cannot {verb}: it has no {name!r} row. Make one with `edge-gemma convert` from the checkpoint")
        return self._special_rows[name][None]

    def _token(self, name: str, verb: str) -> int:
        if name not in self.manifest.special_tokens:
            raise UsageError(f"this bundle cannot {verb}: its vocabulary has no {name!r} token")
        return self.manifest.special_tokens[name]

    # ---- text → ids

    def _control(self, text: str) -> int | None:
        """The id of a control token written out in a template, or None for what only looks like one."""
        if text not in self._controls:
            ids = self._tokenize(text, True)
            self._controls[text] = ids[0] if len(ids) == 1 else None
        return self._controls[text]

    def _plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token, whatever it looks like.

        Some of Gemma's control tokens are ordinary entries for the tokenizer (``<start_of_image>``): those are cut behind the
        ``<``, so that they become letters.
        """
        ids = self._tokenize(text, False)
        if self._control_ids.isdisjoint(ids):
            return ids
        cut = _TOKEN_LIKE.sub(lambda m: m[0] if self._control_ids.isdisjoint(self._tokenize(m[0], False)) else m[0][0] + "\0" + m[0][1:], text)
        ids = [id for piece in cut.split("\0") for id in self._tokenize(piece, False)]
        return ids if self._control_ids.isdisjoint(ids) else [id for letter in text for id in self._tokenize(letter, False)]


class _Run:
    """Collects ids and media in order. Neighbouring text is tokenized in one piece, as it would be in the full rendering."""

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


class _Marks:
    """Messages with every text between marks and every medium replaced by one, so that the rendering can be taken apart again."""

    def __init__(self, turns: list[Message], template: str):
        self._turns = turns
        self.texts = [part for turn in turns for part in turn.content if isinstance(part, str)]
        n = 0
        while any(f"\ue000{n}" in text for text in (*self.texts, template)):
            n += 1
        self.key = f"\ue000{n}"
        self.order: list[str] = []  # the marks as they must appear: t3 opens text 3, c3 closes it, m0 is medium 0
        self.turns_after: list[int] = []  # of each text; counted from the end, since folding moves the front
        self.media: list[Image | Audio | Rows] = []

    def messages(self, flat: bool) -> list[dict]:
        self.order, self.turns_after, self.media, result = [], [], [], []
        for number, turn in enumerate(self._turns):
            items = [{"type": "text", "text": self._mark(part, len(self._turns) - 1 - number)} for part in turn.content]
            plain = flat or (len(items) == 1 and isinstance(turn.content[0], str))
            result.append({"role": turn.role, "content": "".join(item["text"] for item in items) if plain else items})
        return result

    def _mark(self, part: Part, turns_after: int) -> str:
        if not isinstance(part, str):
            self.order.append(f"m{len(self.media)}")
            self.media.append(part)
            return f"{self.key}{self.order[-1]}\ue001"
        n = len(self.turns_after)
        self.turns_after.append(turns_after)
        self.order += [f"t{n}", f"c{n}"]
        start, end = len(part) - len(part.lstrip()), len(part.rstrip())
        if isinstance(part, _Folded):
            start, end = 0, len(part)
        if start >= end:
            start = end = len(part)
        # white space stays outside the marks, where the template may trim it
        return f"{part[:start]}{self.key}t{n}\ue001{part[start:end]}{self.key}c{n}\ue001{part[end:]}"


class _Folded(str):
    """System text inside a user turn: its blank line is part of it and not to be trimmed."""


# ---- messages


def _turns(messages: Iterable[Message | Mapping], tools: Sequence[Mapping]) -> list[Message]:
    """Checked messages with tuple contents: tool results become user turns, tools join the system text, roles alternate."""
    turns: list[Message] = []
    results = False  # whether the last turn so far is made of tool results
    for message in messages:
        role, content = _read(message)
        if role == "system" and turns:
            raise UsageError("a system message comes first or not at all; found one later in the conversation")
        if role == "tool":
            content = ("```tool_output\n" + "".join(part if isinstance(part, str) else "" for part in content) + "\n```",)
            role, is_result = "user", True
        else:
            is_result = False
        if turns and turns[-1].role == role == "user" and (is_result or results):
            turns[-1] = Message("user", _joined(turns[-1].content, content))
        else:
            expected = "assistant" if turns and turns[-1].role == "user" else "user"
            if role != "system" and role != expected:
                raise UsageError(f"the roles must alternate between user and assistant; message {len(turns) + 1} is from {role!r}, expected {expected!r}")
            turns.append(Message(role, content))
        if role == "user" and not any(not isinstance(part, str) or part.strip() for part in content):
            raise UsageError("a user message is empty: give it text, an image or a clip")
        results = is_result
    if tools:
        text = tools_text(tools)
        if turns and turns[0].role == "system":
            turns[0] = Message("system", (*turns[0].content, "\n\n" + text))
        else:
            turns.insert(0, Message("system", (text,)))
    if turns and turns[0].role == "system":
        if not all(isinstance(part, str) for part in turns[0].content):
            raise UsageError("a system message holds media; put them into a user message")
        text = "".join(turns[0].content)
        turns[0:1] = [Message("system", (text,))] if text.strip() else []
    if not turns or turns[-1].role == "system":
        raise UsageError("the prompt is empty: give at least one user message")
    return turns


def _joined(before: tuple[Part, ...], after: tuple[Part, ...]) -> tuple[Part, ...]:
    """Two contents as one turn, on lines of their own."""
    if before and after and isinstance(before[-1], str) and isinstance(after[0], str):
        return (*before[:-1], before[-1] + "\n" + after[0], *after[1:])
    return (*before, *after)


def _read(message: Message | Mapping) -> tuple[str, tuple[Part, ...]]:
    if isinstance(message, Mapping):
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if calls and not content:
            content = "\n".join(call.to_json() if isinstance(call, FunctionCall) else json.dumps(call, ensure_ascii=False) for call in calls)
    elif isinstance(message, Message):
        role, content = message.role, message.content
    else:
        raise UsageError(f"a message is a Message or a dict with role and content; found {type(message).__name__}")
    if not isinstance(role, str) or role not in _ROLES:
        raise UsageError(f"unknown role {role!r}; known are {', '.join(_ROLES)}")
    if isinstance(content, str | Image | Audio | Rows):
        content = (content,)
    if not isinstance(content, Sequence):
        raise UsageError(f"a message's content is text or a list of parts; found {type(content).__name__}")
    return _ROLES[role], tuple(_checked(part) for part in content)


def _checked(part: Any) -> Part:
    if isinstance(part, Mapping) and part.get("type") == "text":
        part = part.get("text")
    if not isinstance(part, str | Image | Audio | Rows):
        raise UsageError(f"a part of a message is text, Image, Audio or Rows; found {type(part).__name__}")
    if isinstance(part, str):
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"the text holds half of a surrogate pair at position {error.start}, which is not valid Unicode") from None
        part = part.replace("\0", "\ufffd")
    return part


def _folded(turns: list[Message]) -> list[Message]:
    """The system text at the head of the first user turn, one blank line between: how Gemma was tuned."""
    if turns[0].role != "system":
        return turns
    system, user, *rest = turns
    first, *others = user.content
    if isinstance(first, str):
        first = first.lstrip()
    return [Message("user", (_Folded("".join(system.content) + "\n\n"), first, *others)), *rest]


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
