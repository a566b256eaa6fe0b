"""A wake word, which opens the way to the detector of utterances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_gemma.errors import MissingExtra, UsageError

# okay_nabu is known 0.19 s after its end (median of espeak-ng voices, docs/talk.md): so much of
# what follows is heard all the same. More would be the word itself, which must begin no utterance.
KNOWN_LATE_S = 0.16

# samples ``[n]`` float32 at 16 kHz → whether the word was completed by them
WakeWord = Callable[[np.ndarray], bool]


def wake_word(name: str) -> WakeWord:
    """A fresh detector of a wake word; it keeps state from call to call.

    ``name`` is one that pymicro-wakeword ships (okay_nabu, hey_jarvis, hey_mycroft,
    alexa) or the path of a microWakeWord ``.json``. Raises UsageError,
    MissingExtra.
    """
    try:
        from pymicro_wakeword import MicroWakeWordFeatures
    except ImportError:
        raise MissingExtra("A wake word", "voice") from None
    model = _open(name)
    features = MicroWakeWordFeatures()

    def heard(samples: np.ndarray) -> bool:
        pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
        rows = features.process_streaming(pcm)
        # every row is processed, also behind one that completes the word: the model
        # counts them
        found = any([bool(model.process_streaming(row)) for row in rows])
        if found:
            model.reset()
        return found

    return heard


def shipped() -> list[str]:
    """The words that pymicro-wakeword brings. Raises MissingExtra."""
    try:
        from pymicro_wakeword import Model
    except ImportError:
        raise MissingExtra("A wake word", "voice") from None
    return [model.value for model in Model]


def _open(name: str) -> Any:
    """The ``pymicro_wakeword.MicroWakeWord``, which has no types."""
    from pymicro_wakeword import MicroWakeWord, Model

    known = shipped()
    try:
        if name in known:
            return MicroWakeWord.from_builtin(Model(name))
        return MicroWakeWord.from_config(name)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{name!r} is no wake word ({type(error).__name__}); choose one of "
            f"{', '.join(known)}, or a microWakeWord .json"
        ) from None
