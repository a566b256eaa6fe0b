"""The assistant does not hear itself: a virtual room joins loudspeaker and microphone."""

import shutil
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest

from edge_gemma.assistant.tones import wake_tone
from edge_gemma.benchmarks.room import RATE_HZ, Room, as_loud_as, own_speech, placed, said
from edge_gemma.errors import MediaError, MissingExtra, UsageError
from edge_gemma.hearing.echo import EchoCanceller, noise_filter
from edge_gemma.hearing.utterances import SpeechDetector

pytestmark = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is not installed (make system)"
)
REACTION = 1600  # samples from a start to silence at the loudspeaker: 100 ms


@dataclass
class Heard:
    """What came out of one run: starts and ends in samples, and both sounds."""

    canceller: EchoCanceller
    starts: list[int] = field(default_factory=list)  # when it was known
    clean: np.ndarray | None = None
    utterance: np.ndarray | None = None  # what an encoder would be given
    began: int = 0  # the sample that it begins with


def hear(room, played, user, stop_at_start=False):
    canceller, detector = EchoCanceller(), SpeechDetector()
    heard, clean, pieces, n = Heard(canceller), [], [], 0

    def stopped():
        return stop_at_start and bool(heard.starts) and n >= heard.starts[0] + REACTION

    for out, into in room.live(played, user, stopped):
        canceller.played(out, RATE_HZ)
        left = canceller.clean(into)
        clean.append(left)
        n += len(into)
        n_detected = sum(map(len, clean)) // 512 * 512
        for event in detector.push(left):
            if event.kind == "start":
                heard.starts.append(n)
            if len(heard.starts) == 1:
                heard.began = heard.began or n_detected - len(event.samples)
                pieces.append(event.samples)
    heard.clean = np.concatenate(clean)
    heard.utterance = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return heard


def signal_to_rest_db(wanted, got):
    """By windows of 100 ms in which something was said: how much of ``got`` is ``wanted``."""
    n = min(len(wanted), len(got)) // 1600 * 1600
    wanted, got = (x[:n].reshape(-1, 1600).astype(np.float64) for x in (wanted, got))
    power = np.mean(np.square(wanted), axis=1)
    rest = np.mean(np.square(got - wanted), axis=1)
    return 10 * np.log10(power / (rest + 1e-12))[power > 0.05 * power.mean()]


@pytest.mark.parametrize("delay_s", [0.04, 0.25])
def test_own_speech_is_no_barge_in_and_a_user_is_heard_over_it(delay_s):
    """Ten seconds: the room is learned in the first four, somebody speaks over the voice at six."""
    room, played = Room(delay_s), own_speech(10)
    alone = hear(room, played, np.zeros_like(played))
    assert alone.starts == [] and alone.canceller.state == "cancelling"
    assert alone.canceller.delay_s == pytest.approx(delay_s + 0.032, abs=0.034)  # a block is 32 ms
    assert alone.canceller.echo_left_db < -25

    voice = as_loud_as(said("Stop please, what time is it in Lisbon?", "en+f3"), room.echo(played))
    user = placed(voice, 6.0, len(played))
    heard = hear(room, played, user, stop_at_start=True)
    assert len(heard.starts) >= 1
    assert 0 < heard.starts[0] - 6 * RATE_HZ < 0.3 * RATE_HZ
    # from 200 ms on what the encoder gets is the user, and nothing of it is missing
    begin = int(6.2 * RATE_HZ)
    wanted = user[begin:]
    got = heard.utterance[begin - heard.began :]
    spoken = len(voice) - int(0.2 * RATE_HZ)
    assert len(got) >= spoken
    ratios = signal_to_rest_db(wanted[:spoken], got[:spoken])
    assert ratios.min() > 0 and np.median(ratios) > 10


def test_a_microphone_without_echo_passes_unchanged():
    """Headphones: after four seconds of own speech without an echo, a user is heard at once."""
    played = own_speech(8)
    user = placed(said("What time is it?", "en+f3"), 6.0, len(played))
    heard = hear(Room(0.1, gain_db=-np.inf), played, user)
    assert heard.canceller.state == "no echo" and heard.canceller.delay_s is None
    n = len(heard.clean)
    room_noise = Room(0.1).noise(len(played))
    late = slice(5 * RATE_HZ, n)
    assert np.array_equal(heard.clean[late], (user + room_noise)[late])


@pytest.mark.parametrize("size", [1, 77, 512, 4800])
def test_silence_at_the_loudspeaker_changes_no_sample(size):
    rng = np.random.default_rng(1)
    sound = rng.standard_normal(9000).astype(np.float32) * 0.1
    canceller, out = EchoCanceller(), []
    for at in range(0, len(sound), size):
        block = sound[at : at + size]
        canceller.played(np.zeros_like(block), RATE_HZ)
        out.append(canceller.clean(block))
    clean = np.concatenate(out)
    assert len(sound) - len(clean) < 256 and np.array_equal(clean, sound[: len(clean)])


@pytest.mark.parametrize("harmless", [True, False])
def test_a_tone_silences_nobody_while_the_room_is_unknown(harmless):
    """Who speaks right behind the wake word's tone is heard from the first sample."""
    tone = wake_tone()
    played = np.zeros(2 * RATE_HZ, np.float32)
    played[8000 : 8000 + len(tone)] = tone
    user = placed(said("What time is it?", "en+f3"), 0.7, len(played))
    canceller, clean = EchoCanceller(), []
    heard = Room(0.1).echo(played) + user
    for at in range(0, len(played), 512):
        canceller.played(played[at : at + 512], RATE_HZ, harmless=harmless)
        clean.append(canceller.clean(heard[at : at + 512]))
    got = np.concatenate(clean)
    word = slice(int(0.75 * RATE_HZ), int(1.2 * RATE_HZ))
    assert np.array_equal(got[word], heard[word]) == harmless
    assert np.abs(got[word]).max() > 0.01 or not harmless


def test_a_loudspeaker_that_is_opened_anew_counts_anew():
    """While it was away the microphone went on counting."""
    played = own_speech(4)
    for reopened in (True, False):
        canceller, detector, starts = EchoCanceller(), SpeechDetector(), 0
        canceller.played(np.zeros(512, np.float32), RATE_HZ)
        for _ in range(100):  # 3 s in which nothing is played or counted
            canceller.clean(np.zeros(512, np.float32))
        if reopened:
            canceller.reopened()
        echo = Room(0.1).echo(played)
        for at in range(0, len(played), 512):
            canceller.played(played[at : at + 512], RATE_HZ)
            events = detector.push(canceller.clean(echo[at : at + 512]))
            starts += sum(event.kind == "start" for event in events)
        assert (starts == 0) == reopened


def test_a_loudspeaker_at_another_rate():
    """Played at 44.1 kHz: what counts is what it gave out, resampled."""
    import soxr

    room, played = Room(0.1), own_speech(7)
    at_44 = soxr.resample(played, RATE_HZ, 44100)
    canceller, detector, starts = EchoCanceller(), SpeechDetector(), 0
    echo = room.echo(played) + room.noise(len(played))
    for number in range(len(played) // 1600):
        canceller.played(at_44[number * 4410 : (number + 1) * 4410], 44100)
        events = detector.push(canceller.clean(echo[number * 1600 : (number + 1) * 1600]))
        starts += sum(event.kind == "start" for event in events)
    assert canceller.state == "cancelling" and starts == 0


def test_a_delay_that_changes_is_found_again():
    """A loudspeaker that was opened anew: silent until the new path is known, never fooled."""
    played = own_speech(16)
    half = len(played) // 2
    before, after = Room(0.06).echo(played), Room(0.2).echo(played)
    echo = np.concatenate([before[:half], after[half:]]) + Room(0.1).noise(len(played))
    canceller = EchoCanceller()
    for at in range(0, len(played) - 511, 512):
        canceller.played(played[at : at + 512], RATE_HZ)
        canceller.clean(echo[at : at + 512])
    assert canceller.state == "cancelling"
    assert canceller.delay_s == pytest.approx(0.232, abs=0.034)


@pytest.mark.parametrize("n", [0, 1, 159, 160, 5000])
def test_noise_suppression_loses_no_sample_but_the_last_10_ms(n):
    filtered = noise_filter(2, 5)
    out = filtered(np.zeros(n, np.float32))
    assert n - len(out) < 160 and len(filtered(np.zeros(320, np.float32))) >= 160


def test_noise_suppression_lowers_noise():
    noise = Room(0.1, noise_dbfs=-30).noise(3 * RATE_HZ)
    out = noise_filter(4)(noise)
    assert np.sqrt(np.mean(out[RATE_HZ:] ** 2)) < 0.3 * np.sqrt(np.mean(noise**2))


@pytest.mark.parametrize("suppression, gain", [(5, 0), (-1, 0), (0, 32), ("2", 0), (0, 1.5)])
def test_noise_suppression_out_of_its_range_is_refused(suppression, gain):
    with pytest.raises(UsageError, match="expected 0 .off. to"):
        noise_filter(suppression, gain)


def test_broken_samples_are_refused_at_both_doors():
    for door in (EchoCanceller().clean, noise_filter(1)):
        with pytest.raises(MediaError):
            door(np.full(512, np.nan, np.float32))
    canceller = EchoCanceller()
    canceller.played(np.full(512, np.nan, np.float32), RATE_HZ)  # from a voice that is broken
    assert np.isfinite(canceller.clean(np.zeros(512, np.float32))).all()


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyaec", None)
    monkeypatch.setitem(sys.modules, "webrtc_noise_gain", None)
    for make in (EchoCanceller, lambda: noise_filter(1)):
        with pytest.raises(MissingExtra, match=r"edge-gemma\[voice\]"):
            make()


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.04, 0.12, 0.25])
def test_ten_minutes_of_own_speech_are_no_barge_in(delay_s):
    played = own_speech(600)
    heard = hear(Room(delay_s), played, np.zeros_like(played))
    assert heard.starts == [], [round(at / RATE_HZ, 2) for at in heard.starts]
    print(f"delay {delay_s} s: {heard.canceller.echo_left_db} dB of the echo left")
