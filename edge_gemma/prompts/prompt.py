"""Turns → spans: what was said, shown and played, as token ids and embedding rows in the order the
decoder reads them.

In: messages, a bundle's manifest and special rows, and a tokenizer ``tokenize(text, special) ->
list[int]``. Out: a list of spans. This module does not know engines, encoders or sessions; whoever
calls it brings pictures and clips as soft tokens.

The bundle's own chat template decides the text, in a jinja2 sandbox. It never sees the difference
between text and control: user text goes in between marks, and only what the template itself wrote
around them is read for control tokens. A user who types ``<end_of_turn>`` therefore sends eleven
letters and no end of turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, takewhile

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import Manifest
from edge_gemma.bundles.token_roles import CONTROL_TEXTS
from edge_gemma.errors import BundleError, UsageError
from edge_gemma.messages import Audio, FunctionCall, Image, Message, Part
from edge_gemma.prompts import function_gemma
from edge_gemma.prompts.call_styles import CallStyle, Result, TemplateCalls, TextCalls, TokenCalls
from edge_gemma.prompts.calls import check_tools
from edge_gemma.prompts.template import GEMMA_TEMPLATE, reads_tools, render
from edge_gemma.prompts.text_ids import Piece, PieceWriter, TextIds
from edge_gemma.prompts.turns import (
    Marks,
    RenderedPart,
    ResultForm,
    Turn,
    checked_part,
    folded,
    read_turns,
)
from edge_gemma.spans import Rows, Span, Tokens

AUDIO_ROWS = 188  # soft tokens of 30 s; transformers always sends that many, the rest being padding


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


@dataclass(frozen=True)
class Listening:
    """Around a clip that is still being spoken: the spans ``before`` its first soft token, and
    ``after(n_rows)``, the spans that follow when it has ``n_rows`` of them.
    """

    before: list[Span]
    after: Callable[[int], list[Span]]


class Prompt:
    """Makes spans for one bundle. ``special_rows`` comes from :func:`read_special_rows`.

    >>> from types import SimpleNamespace
    >>> manifest = SimpleNamespace(special_tokens={"bos": 2})
    >>> prompt = Prompt(manifest, lambda text, special: list(text.encode()))
    >>> prompt.raw("Hi")
    [Tokens(ids=(2, 72, 105))]
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenize: Callable[[str, bool], list[int]],
        special_rows: Mapping[str, np.ndarray] | None = None,
    ):
        self.manifest, self._special_rows = manifest, special_rows or {}
        self._bos = manifest.special_tokens.get("bos")
        named = {name: id for name, id in manifest.special_tokens.items() if name != "unk"}
        spelled = {CONTROL_TEXTS[name]: id for name, id in named.items() if name in CONTROL_TEXTS}
        self._text_ids = TextIds(tokenize, named.values(), spelled)
        self._style = call_style(manifest)

    # ---- what callers use

    def spans(
        self,
        messages: Iterable[Message | Mapping],
        *,
        tools: Sequence[Mapping] = (),
        continued: bool = False,
        generate: bool = True,
        pad_audio: bool = True,
    ) -> list[Span]:
        """The spans of a whole conversation, or with ``continued`` only what follows its last
        answer.

        An append-only chat prefills the first turn whole and then each new one with ``continued``:
        these spans begin with the ``<end_of_turn>`` that closes the answer (which is in the cache
        as it was generated, without that token), so that all together are the full rendering.
        ``generate`` opens the model's turn. ``pad_audio`` fills each clip to 188 rows as
        transformers does; without, prefill is shorter and the answer may differ. Pictures and clips
        bring their soft tokens. Raises UsageError, BundleError (the template).
        """
        return self._fill(self._pieces(messages, tools, continued, generate), pad_audio)

    def stable_length(
        self, messages: Sequence[Message | Mapping], *, tools: Sequence[Mapping] = ()
    ) -> int:
        """How many positions at the beginning come from the system text and the tools alone,
        whatever is said then; 0 without both, or where the template wants more than that.
        """
        head = [message for message in messages[:1] if _role(message) == "system"]
        if not head and not tools:
            return 0
        try:
            said = [self.spans([*head, Message("user", text)], tools=tools) for text in ("a", "0")]
        except (UsageError, BundleError):
            return 0
        ids = [[token for span in spans for token in getattr(span, "ids", ())] for spans in said]
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False)))

    def listening(
        self,
        messages: Iterable[Message | Mapping],
        *,
        tools: Sequence[Mapping] = (),
        continued: bool = False,
        pad_audio: bool = True,
    ) -> Listening:
        """What stands around a clip that is still being spoken.

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
            return _merge([*self._audio_end(n_rows, pad_audio), *self._fill(behind, pad_audio)])

        opening = Tokens((self._token("start_of_audio", "hear"),))
        return Listening(_merge([*self._fill(before, pad_audio), opening]), after)

    def between_clips(self, n_rows: int, *, pad_audio: bool = True) -> list[Span]:
        """While listening: what stands between a clip of ``n_rows`` soft tokens and the next one of
        the same turn.
        """
        writer = PieceWriter(self._text_ids)
        writer.user("\n\n\n\n")  # the blank lines behind the one and before the other
        writer.control([self._token("start_of_audio", "hear")])
        return _merge([*self._audio_end(n_rows, pad_audio), Tokens(_ids(writer.done()))])

    def before_end(self, spans: Sequence[Span]) -> tuple[list[Span], list[Span], int] | None:
        """Spans that close a turn → those before its ``<end_of_turn>``, those from it on, and its
        id; None where there is none.
        """
        end = self.manifest.special_tokens.get("end_of_turn")
        for at, span in enumerate(spans):
            if isinstance(span, Tokens) and end in span.ids:
                n = span.ids.index(end)
                head = [Tokens(span.ids[:n])] if n else []
                rest = [Tokens(span.ids[n:]), *spans[at + 1 :]]
                return [*spans[:at], *head], rest, end
        return None

    def raw(self, parts: str | Sequence[Part], *, pad_audio: bool = True) -> list[Span]:
        """Text and media without turns, for base weights: begin of sequence, then the parts as they
        come.
        """
        writer = PieceWriter(self._text_ids)
        writer.control([] if self._bos is None else [self._bos])
        for part in [parts] if isinstance(parts, str) else parts:
            writer.part(checked_part(part))
        return self._fill(writer.done(), pad_audio)

    # ---- rendering

    def _pieces(
        self,
        messages: Iterable[Message | Mapping],
        tools: Sequence[Mapping],
        continued: bool,
        generate: bool,
    ) -> list[Piece]:
        turns, last = read_turns(messages, tools, self._style), None
        is_open = generate and turns[-1].open
        if continued:
            last = _last_answer(turns)
            # the cache holds the answer as generated: whatever the template would trim must not be
            # looked for behind it
            stripped = tuple(p.strip() if type(p) is str else p for p in turns[last].content)
            turns[last] = Turn("assistant", stripped)
        elif generate and turns[-1].role == "assistant" and not is_open:
            raise UsageError("the last message is the model's own; add a user message to answer")
        rendered, marks = self._render(turns, tools, generate and not is_open)
        parts = marks.split(rendered)
        if last is not None:  # what lies before the end of the last answer is in the cache
            parts = parts[_end_of(parts, len(turns) - 1 - last) :]
        if is_open:  # the model goes on behind the last result
            parts = parts[: _end_of(parts, 0)]
        writer = PieceWriter(self._text_ids)
        for part in parts:
            if part.medium is not None:
                writer.part(part.medium)
            if part.is_user_text:
                writer.user(part.text)
            else:
                writer.template(part.text)
        pieces = writer.done()
        if not continued and self._bos is not None and pieces[:1] != [self._bos]:
            pieces.insert(0, self._bos)
        return pieces

    def _render(
        self, turns: list[Turn], tools: Sequence[Mapping], generate: bool
    ) -> tuple[str, Marks]:
        """Try the messages as they are; then with the system text folded into the first user turn;
        then each as one string.
        """
        template = self.manifest.chat_template
        source = template or self._own_template()
        first_error: UsageError | None = None
        variants = [turns, folded(turns)] if source is not GEMMA_TEMPLATE else [folded(turns)]
        given = check_tools(tools) if isinstance(self._style, TemplateCalls) else []
        for flat, variant, form in product((False, True), variants, _result_forms(source, turns)):
            marks = Marks(variant, source, given, form)
            try:
                text = render(source, marks.messages(flat), generate, marks.tools())
                marks.check(text)
                return text, marks
            except UsageError as error:
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _own_template(self) -> str:
        is_function_gemma = isinstance(self._style, TokenCalls)
        return function_gemma.TEMPLATE if is_function_gemma else GEMMA_TEMPLATE

    def answer(
        self, ids: Sequence[int], text: str, piece: Callable[[int], bytes]
    ) -> tuple[str | list[Part], list[FunctionCall]]:
        """An answer's ids and its text as printed → its content as a message, and the calls in it
        that were written with control tokens.
        """
        if not function_gemma.has_tokens(self.manifest.special_tokens):
            return text, []
        before, calls = function_gemma.read_answer(ids, piece, self.manifest.special_tokens)
        return ([before, *calls] if calls else text), calls

    def _fill(self, pieces: Iterable[Piece], pad_audio: bool) -> list[Span]:
        spans: list[Span] = []
        for piece in pieces:
            if isinstance(piece, int):
                spans.append(Tokens((piece,)))
            elif isinstance(piece, Rows):
                spans.append(self._rows(piece))
            elif piece.rows is None:
                raise UsageError(_without_rows(piece))
            elif isinstance(piece, Image):
                spans += self._image(piece.rows)
            else:
                spans += self._audio(piece.rows, pad_audio)
        return _merge(spans)

    # ---- media, exactly as transformers' processors write it; the blank lines around belong to the
    # text

    def _image(self, rows: np.ndarray) -> list[Span]:
        expected = self.manifest.vision.n_soft_tokens if self.manifest.vision else 256
        if np.shape(rows)[:1] != (expected,):
            raise UsageError(
                f"an image has soft tokens of shape {list(np.shape(rows))}; this model takes "
                f"{expected} rows per image"
            )
        start = Tokens((self._token("start_of_image", "see"),))
        if self.manifest.family == "gemma3":
            return [
                start,
                self._rows(Rows(rows, causal=False)),
                Tokens((self._token("end_of_image", "see"),)),
            ]
        return [start, self._rows(rows), self._rows(self._special("end_of_image", "see"))]

    def _audio(self, rows: np.ndarray, pad: bool) -> list[Span]:
        start = Tokens((self._token("start_of_audio", "hear"),))
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


def _role(message: Message | Mapping) -> object:
    return message.get("role") if isinstance(message, Mapping) else message.role


def call_style(manifest: Manifest) -> CallStyle:
    """How a bundle's prompts write functions: its template itself, where that reads ``tools``; with
    FunctionGemma's tokens, where its vocabulary has them; else as text.
    """
    template = getattr(manifest, "chat_template", None)
    if template and reads_tools(template):
        return TemplateCalls()
    if function_gemma.has_tokens(manifest.special_tokens):
        return TokenCalls()
    return TextCalls()


def _result_forms(template: str, turns: Sequence[Turn]) -> tuple[ResultForm, ...]:
    """What to give a template as a result, in the order to be tried."""
    has_results = any(isinstance(part, Result) for turn in turns for part in turn.content)
    if has_results and re.search(r"\bresponse\b['\"]|\.response\b", template):
        return ("list", "mapping", "text")
    return ("text",)


def _end_of(parts: Sequence[RenderedPart], n_behind: int) -> int:
    """The index of what follows the last text of the turn that has ``n_behind`` others behind."""
    ends = [i for i, part in enumerate(parts) if part.closes == n_behind]
    if not ends:
        raise UsageError("the last answer holds no text to continue behind; render all of it")
    return ends[-1]


def _last_answer(turns: Sequence[Turn]) -> int:
    """The index of the last answer, behind which something new must stand."""
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers or answers[-1] == len(turns) - 1:
        raise UsageError(
            "a continued prompt needs an answered conversation and a new message after the last "
            "answer"
        )
    return answers[-1]


def _ids(pieces: Iterable[Piece]) -> tuple[int, ...]:
    return tuple(piece for piece in pieces if isinstance(piece, int))


def _merge(spans: Iterable[Span]) -> list[Span]:
    """Neighbouring token spans become one."""
    merged: list[Span] = []
    ids: list[int] = []
    for span in spans:
        if isinstance(span, Tokens):
            ids += span.ids
            continue
        if ids:
            merged.append(Tokens(tuple(ids)))
            ids = []
        merged.append(span)
    return [*merged, Tokens(tuple(ids))] if ids else merged


def _without_rows(part: Image | Audio) -> str:
    name = type(part).__name__
    if part.source is None:
        return (
            f"a message holds an empty {name}(); give it a file or soft tokens (a clip that is "
            "still being spoken goes through listening)"
        )
    return f"a message holds {name}({part.source!r}), which was not encoded; pass its soft tokens"
