"""bench talk on a tiny bundle and a short room: it runs, and its parts add up."""

import shutil

import pytest

from edge_gemma.benchmarks import talk
from edge_gemma.benchmarks.turn_taking import turn_taking

pytestmark = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is not installed (make system)"
)


def test_the_steps_from_speech_to_sound_add_up(hearing_model):
    # one thread: this decoder is so small that threads would wait for each other
    found = talk.talk([hearing_model.bundle.folder], repeats=1, n_threads=1)
    ways = {row["way"]: row for row in found.rows}
    assert set(ways) == set(talk.WAYS)
    for row in found.rows:
        assert row["total_s"] == pytest.approx(sum(row[step] for step in talk.STEPS))
        assert 0.5 < row["pause_s"] < 1.5 and all(row[step] >= 0 for step in talk.STEPS)
    assert any("forced" in note for note in found.notes)


def test_the_room_and_the_wake_words_in_short():
    (row,) = talk.hearing_itself(delays_s=(0.1,), minutes=0.2, n_users=1).rows
    assert row["false_barge_ins"] == 0 and row["heard_ms"] < 400
    rows = talk.wake_words(minutes=0.1).rows
    assert {row["name"] for row in rows} == set(talk.WAKE_WORDS)
    assert all(0 <= row["missed"] <= row["spoken"] for row in rows)


def test_pauses_in_short():
    pauses, speakers = turn_taking(
        turn_over=lambda text: float("ten" in text),
        sentences=["Set a timer for|ten minutes"],
        voices=["en"],
        pauses_s=(0.4, 0.8),
    )
    rows = {row["rule"]: row for row in pauses.rows}
    assert rows["fixed 0.32 s"]["words_cut"] == 1 and rows["fixed 1.2 s"]["words_cut"] == 0
    told = rows["adaptive, by what was said"]
    assert told["words_cut"] == 0 and told["wait_s"] < rows["fixed 0.6 s"]["wait_s"]
    assert [row["pause_s"] for row in speakers.rows] == [0.4, 0.8]
    assert pauses.markdown() and speakers.markdown()
