"""A wake word as a gate in front of the detector of utterances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_gemma.errors import MissingExtra, UsageError


def wake_word(name: str) -> Callable[[np.ndarray], bool]:
    """A fresh wake word detector: samples float32 → whether the word was just completed.

    ``name`` is one that pymicro-wakeword ships (okay_nabu, hey_jarvis, hey_mycroft, alexa) or the
    path of a microWakeWord ``.json``. Raises UsageError, MissingExtra.
    """
    try:
        from pymicro_wakeword import MicroWakeWord, MicroWakeWordFeatures, Model
    except ImportError:
        raise MissingExtra("A wake word", "voice") from None
    known = [model.value for model in Model]
    try:
        model = (
            MicroWakeWord.from_builtin(Model(name))
            if name in known
            else MicroWakeWord.from_config(name)
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{name!r} is no wake word ({type(error).__name__}); choose one of "
            f"{', '.join(known)}, or a microWakeWord .json"
        ) from None
    features = MicroWakeWordFeatures()

    def heard(samples: np.ndarray) -> bool:
        pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
        found = [bool(model.process_streaming(row)) for row in features.process_streaming(pcm)]
        if any(found):
            model.reset()
        return any(found)

    return heard
