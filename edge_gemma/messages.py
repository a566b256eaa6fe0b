"""What a conversation is made of: messages with text, pictures, sounds and function calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_gemma.sources import FileSource
from edge_gemma.spans import Rows

# a path, a file's bytes, pixels, a Pillow image, or an opened seeing.picture.Picture
PictureSource = Any


@dataclass(frozen=True, eq=False)
class Image:
    """A picture in a message: a path, a data URI, a file's bytes, an open file, pixels
    ``[h, w, 3]`` uint8 or a Pillow image; or its soft tokens ``[n, n_embd]`` float32 at once.

    >>> Image(rows=np.zeros((256, 8), np.float32)).kind
    'image'
    """

    source: PictureSource = None
    size: int | None = None  # the encoder's input size in pixels, where it offers several
    rows: np.ndarray | None = None
    kind = "image"


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound in a message: a path, a data URI, a file's bytes, an open file, or mono samples at
    16 kHz ``[n]`` float32; or its soft tokens ``[n, n_embd]`` float32 at once.

    ``Audio()`` alone is a clip still to be spoken: see :meth:`Prompt.listening`.
    """

    source: FileSource | np.ndarray | None = None
    rows: np.ndarray | None = None
    kind = "audio"


@dataclass(frozen=True)
class FunctionCall:
    """One call the model asks for: the one form that every model's own way of writing a call is
    read into and written from.

    >>> FunctionCall("light", {"on": True}).to_json()
    '{"name": "light", "parameters": {"on": true}}'
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "parameters": self.parameters}, ensure_ascii=False)


class TextItem(str):
    """A text with more keys that the chat template reads, such as TranslateGemma's
    ``source_lang_code`` and ``target_lang_code``.

    >>> TextItem("Hello", {"source_lang_code": "en"}).fields
    {'source_lang_code': 'en'}
    """

    fields: Mapping[str, Any]

    def __new__(cls, text: str, fields: Mapping[str, Any]) -> TextItem:
        made = super().__new__(cls, text)
        made.fields = dict(fields)
        return made


Part = str | Image | Audio | Rows | FunctionCall


@dataclass(frozen=True)
class Message:
    """One turn's words.

    ``role`` is system, user, assistant (or model) or tool; ``content`` text or a list of parts. An
    assistant's parts may be FunctionCalls; the tool messages behind it answer them in order.

    >>> Message("user", ["What is this?", Image("cat.jpg")]).role
    'user'
    """

    role: str
    content: str | Sequence[Part]
