"""What a conversation is made of: messages with text, pictures and sounds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    """A sound in a message: a path, a data URI, a file's bytes, or mono samples at 16 kHz ``[n]``
    float32; or its soft tokens ``[n, n_embd]`` float32 at once.

    ``Audio()`` alone is a clip still to be spoken: see :meth:`Prompt.listening`.
    """

    source: str | os.PathLike[str] | bytes | np.ndarray | None = None
    rows: np.ndarray | None = None
    kind = "audio"


Part = str | Image | Audio | Rows


@dataclass(frozen=True)
class Message:
    """One turn's words.

    ``role`` is system, user, assistant (or model) or tool; ``content`` text or a list of parts.

    >>> Message("user", ["What is this?", Image("cat.jpg")]).role
    'user'
    """

    role: str
    content: str | Sequence[Part]
