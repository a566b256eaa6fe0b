"""Sound and pictures → soft tokens, once for everything that generates.

In: a bundle, settings that a plan approved, the parts of a message. Out: the same parts as soft
tokens. The encoders are opened when they are needed, and one at a time where the plan says so.
Where it hears first, an open encoder and the decoder's mapped weights are never in memory together:
the weights rest as long as one is open, and whoever decodes next closes it. This module does not
know prompts, templates or the KV cache.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.engines.engine import Weights
from edge_gemma.errors import MediaError, UsageError
from edge_gemma.hearing.encoder import AudioEncoder
from edge_gemma.hearing.sound import read_audio
from edge_gemma.machine.footprint import drop_cached
from edge_gemma.messages import Audio, Image, Part
from edge_gemma.plan.records import Settings
from edge_gemma.prompts.turns import checked_part
from edge_gemma.seeing.cache import SoftTokenCache
from edge_gemma.seeing.picture import Picture
from edge_gemma.seeing.soft_tokens import PictureEncoder, prepare
from edge_gemma.seeing.video import Video
from edge_gemma.sources import FileSource, is_file_source
from edge_gemma.spans import Rows

# a mapping is a text with more keys for the chat template: {"type": "text", "text": …, …}
Content = str | Image | Audio | Video | Rows | Sequence[Part | Video | Mapping[str, Any]]


class Senses:
    """The encoders of one bundle, beside the decoder's ``weights``. Close it.

    >>> model.senses.encoded("only text")
    ['only text']
    """

    def __init__(self, bundle: Bundle, settings: Settings, weights: Weights | None = None):
        self._bundle, self._settings, self._weights = bundle, settings, weights
        # a server encodes in one thread and decodes, which may close an encoder, in another
        self._lock = threading.RLock()
        self._audio: AudioEncoder | None = None
        self._pictures: PictureEncoder | None = None

    @property
    def one_at_a_time(self) -> bool:
        """Whether the plan holds at most one encoder, and only while it is in use."""
        return self._settings.encoders != "resident"

    @property
    def hears_first(self) -> bool:
        """Whether what is heard and seen waits until no encoder is open: a decode closes it, so a
        turn that is still being spoken is not prefilled.
        """
        return self._settings.encoders == "hear first"

    @property
    def n_embd(self) -> int:
        """The width of a row of soft tokens."""
        return self._bundle.manifest.decoder.n_embd

    def encoded(
        self, content: Content, *, pan_and_scan: bool = False, used_tokens: int = 0
    ) -> list[Part]:
        """A message's parts, with every picture, clip and video as soft tokens.

        Everything is opened and counted before anything is encoded; ``used_tokens`` of the context
        are not for pictures. ``pan_and_scan`` adds Gemma 3's crops. Raises MediaError,
        UnsupportedModel (the bundle has no such encoder), PlanRefused (too many pictures for the
        context), UsageError, RuntimeFailure.
        """
        manifest = self._bundle.manifest
        prepared = prepare(
            _parts(content),
            manifest.vision,
            self._settings.n_ctx - used_tokens,
            pan_and_scan=pan_and_scan,
            name=manifest.name,
        )
        was_open = self.open_encoders
        try:
            return [self._encoded(part) for part in prepared]
        finally:
            if self.one_at_a_time and not was_open:  # the plan counts it while it is in use only
                self.release()

    def _encoded(self, part: Part) -> Part:
        if isinstance(part, Image) and part.rows is None:
            return Image(rows=self.encode_image(part))
        if isinstance(part, Audio) and part.rows is None:
            return Audio(rows=self.encode_audio(part.source))
        return part

    def encode_image(self, image: Image) -> np.ndarray:
        """A picture → soft tokens ``[n_soft_tokens, n_embd]`` float32, real rows only."""
        if image.rows is not None:
            return image.rows
        source = image.source
        picture = source if isinstance(source, Picture) else Picture(source)
        return self.pictures().encode(picture, image.size)

    def encode_audio(self, source: FileSource | np.ndarray | None) -> np.ndarray:
        """A sound file (path, data URI, bytes, open file), or mono samples at 16 kHz ``[n]``
        float32 in [−1, 1], of at most 30 s → soft tokens ``[n, n_embd]`` float32, real rows only.
        """
        if source is None:
            raise UsageError(
                "an empty Audio() is a clip still to be spoken; give it a file or samples"
            )
        encoder = self.audio()
        if is_file_source(source):
            return encoder.encode(read_audio(source))
        samples = np.asarray(source)
        if not samples.size:
            raise MediaError("the sound holds no samples; there is nothing to hear in it")
        return encoder.encode(samples)

    def audio(self) -> AudioEncoder:
        """The audio encoder, opened now if need be. Raises UnsupportedModel, BundleError."""
        with self._lock:
            if self._audio is None:
                self._make_room()
                self._audio = AudioEncoder(self._bundle, n_threads=self._settings.n_threads)
            return self._audio

    def pictures(self) -> PictureEncoder:
        """The vision encoder, which loads its weights with the first picture. Raises
        UnsupportedModel.
        """
        with self._lock:
            if self._pictures is None:
                self._make_room()
                self._pictures = PictureEncoder(
                    self._bundle,
                    n_threads=self._settings.n_threads,
                    keep=not self.one_at_a_time,
                    cache=SoftTokenCache(),
                )
            return self._pictures

    def _make_room(self) -> None:
        if self.one_at_a_time:
            self.release()
        if self.hears_first and self._weights is not None:
            self._weights.rest(self.release)

    def _forget_files(self) -> None:
        """Where the plan hears first, the page cache is for the decoder: the encoder's file, read
        once a turn, would push out weights that every token reads.
        """
        if self.hears_first:
            manifest = self._bundle.manifest
            parts = [part for part in (manifest.audio, manifest.vision) if part is not None]
            files = [name for part in parts for name in (part.file, f"{part.file}.data")]
            drop_cached(self._bundle.folder / name for name in files)

    @property
    def open_encoders(self) -> tuple[str, ...]:
        """Which encoders are open: "audio", "vision"."""
        both = (("audio", self._audio), ("vision", self._pictures))
        return tuple(name for name, encoder in both if encoder is not None)

    def release(self) -> None:
        """Close what is open; it opens again when it is needed."""
        with self._lock:
            if self._audio is not None:
                self._audio.close()
                self._audio = None
                self._forget_files()
            if self._pictures is not None:
                self._pictures.close()
                self._pictures = None
                self._forget_files()

    close = release


def _parts(content: Content) -> list[Part | Video]:
    if isinstance(content, str | Image | Audio | Video | Rows):
        return [content]
    return [checked_part(part) if isinstance(part, Mapping) else part for part in content]
