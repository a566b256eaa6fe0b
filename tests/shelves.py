"""An assistant without sound and wall clock: blocks in place of a microphone, whose samples are the
clock; a scripted decoder; a loudspeaker that records.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scripted import ScriptedDecoder
from test_listen import loudness

from edge_gemma import Sampling
from edge_gemma.assistant.life import Habits
from edge_gemma.assistant.loudspeaker import Loudspeaker
from edge_gemma.assistant.parts import BUILTIN, Parts
from edge_gemma.assistant.personas import Instructions
from edge_gemma.assistant.settings import Home, Settings
from edge_gemma.assistant.shelf import Assistant
from edge_gemma.assistant.talk_tools import TalkTools
from edge_gemma.assistant.tools import Toolbox
from edge_gemma.conversation.transcription import ListenOptions
from edge_gemma.errors import DeviceLost
from edge_gemma.hearing.utterances import SpeechDetector, VadSettings

WAKE, STOP = 0.05, 0.07  # blocks of so much are the wake word, the stop word
RATE_HZ = 16000


def word(value):
    return np.full(511, value, np.float32)


def hears_word(value):
    """Most of the word is in one block, wherever blocks begin."""
    return lambda samples: int(np.isclose(samples, value).sum()) >= 256


class Lent:
    """A model that is not closed, and whose chats say what is scripted. What is an exception in
    the script is raised in the middle of the answer.
    """

    def __init__(self, model, script):
        self._model, self.script = model, script
        self.chats = []
        self.sequences = model.sequences
        self.n_closed = 0

    def chat(self, **options):
        chat = self._model.chat(**options)
        decoder = ScriptedDecoder(chat, [])
        decoder.script = self.script

        def generate(sampling=None):
            if self.script and isinstance(self.script[0], Exception):
                raise self.script.pop(0)
            return decoder.generate(sampling)

        chat.session.generate = generate
        self.chats.append(chat)
        return chat

    def close(self):
        self.n_closed += 1


class FakeSpeaker:
    """``lost``: nothing can be played."""

    name, n_heard, rate_hz = "fake", 0, RATE_HZ

    def __init__(self):
        self.sounds = []
        self.lost = False

    def play(self, samples, rate_hz):
        if self.lost:
            raise DeviceLost("the loudspeaker 'fake' is gone")
        if len(samples):
            self.sounds.append(len(samples))
        return True

    def wait(self):
        pass

    def stop(self):
        pass

    def close(self):
        pass


class Shelf:
    """One assistant in ``folder`` that hears ``sound`` (samples, or blocks and callables)."""

    def __init__(self, model, folder, sound, script, *, settings=None, **changes):
        self.settings = settings or Settings(bundle="x", tools=[])
        self.model = Lent(model, list(script))
        self.speaker, self.shown, self.said, self.states = FakeSpeaker(), [], [], []
        self._sound, self._changes = sound, changes
        self.home = Home(folder, self.settings)
        self.assistant = Assistant(
            self.home, show=self.shown.append, on_state=self._on_state, make=self._parts
        )

    def _on_state(self, state):
        self.states.append((state, round(self.assistant.heard_s, 1) if self.states else 0.0))

    def _blocks(self):
        if not isinstance(self._sound, np.ndarray):
            yield from self._sound
            return
        for k in range(0, len(self._sound), 512):
            yield self._sound[k : k + 512]

    def _synthesize(self, text):
        self.said.append(text)
        return np.zeros(16, np.float32), RATE_HZ

    def _parts(self, home, timers, tell):
        self.timers = timers
        # without the built-in tools themselves, whose descriptions are long
        tools = TalkTools(Toolbox(), timers) if BUILTIN in home.settings.tools else None
        parts = Parts(
            load=lambda on_progress: self.model,
            source=self._blocks,
            loudspeaker=Loudspeaker(self.speaker, {"en": self._synthesize}, tell=tell, retry_s=0.0),
            options=ListenOptions(
                sampling=Sampling(seed=1), shortest_s=0.2, vad=VadSettings(end_s=0.5)
            ),
            briefing=Instructions("Be brief.", ""),
            habits=Habits(follow_s=home.settings.follow_up_s),
            languages=("en",),
            tools=tools,
            wake=hears_word(WAKE),
            stop_word=hears_word(STOP),
            detector=SpeechDetector(VadSettings(end_s=0.5), probability=loudness),
            clock=lambda: self.assistant.heard_s if hasattr(self, "assistant") else 0.0,
        )
        return replace(parts, **self._changes)

    def run(self):
        with self.assistant:
            self.assistant.run()
        return self

    def of(self, kind):
        return [getattr(s, "text", None) or s for s in self.shown if s.kind == kind]

    @property
    def turns(self):
        return [s.text for s in self.shown if s.kind == "turn"]

    @property
    def notes(self):
        return [s.text for s in self.shown if s.kind == "note"]

    @property
    def path(self):
        """The states in their order."""
        return " ".join(state for state, _ in self.states)
