"""When an assistant listens: the state machine by table, without sound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.assistant.life import Event, Habits, Life
from edge_gemma.errors import UsageError

WAKE, SLEEP = "wake tone", "sleep tone"
# each line: an event or seconds that pass → the state then, and what is done
STORIES = {
    "a question, another one without the word, and it sleeps": [
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("end", "answering"),
        (30, "answering"),
        ("over", "following"),
        (7.9, "following"),
        ("speech", "hearing"),
        ("end", "answering"),
        ("over", "following"),
        (8.1, "asleep", SLEEP),
        (3600, "asleep"),
    ],
    "nothing is heard without the word": [
        ("speech", "asleep"),
        ("end", "asleep"),
        ("over", "asleep"),
        ("stop", "asleep"),
        ("late", "asleep"),
    ],
    "the word, and then nobody speaks": [
        ("wake", "listening", "cut", WAKE),
        (7.9, "listening"),
        (0.2, "asleep", SLEEP),
    ],
    "the word again begins anew": [
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("end", "answering"),
        ("wake", "listening", "cut", WAKE),
        (7, "listening"),
        ("wake", "listening", "cut", WAKE),
        (7, "listening"),
    ],
    "a stop word while it answers": [
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("end", "answering"),
        ("stop", "asleep", "cut", SLEEP),
    ],
    "speech over an answer, which was a stop phrase": [
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("end", "answering"),
        ("speech", "hearing"),
        ("end", "answering"),
        ("over", "following"),
        ("stop", "asleep", "cut", SLEEP),
    ],
    "a cough": [
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("ignored", "listening"),
        (8.1, "asleep", SLEEP),
    ],
    "a radio in the window": [
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        (59, "hearing"),
        (2, "asleep", "cut", SLEEP),
    ],
    "a turn that fails before its end": [
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("over", "following"),
    ],
    "the button": [
        ("press", "listening", "cut", WAKE),
        ("press", "asleep", "cut", SLEEP),
        ("press", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("press", "asleep", "cut", SLEEP),
        ("press", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("end", "answering"),
        ("press", "asleep", "cut", SLEEP),
    ],
    "a timer rings while it sleeps, and somebody speaks to it": [
        ("ring", "ringing"),
        ("over", "following"),
        ("ring", "ringing"),
        ("speech", "hearing"),
        ("end", "answering"),
        ("over", "following"),
        (8.1, "asleep", SLEEP),
    ],
    "a timer rings, and the button ends it": [("ring", "ringing"), ("press", "asleep", "cut")],
    "the button between two rings": [
        ("ring", "ringing"),
        ("over", "following"),
        ("press", "asleep", "cut", SLEEP),
    ],
    "the microphone goes while it sleeps": [
        ("lost", "away"),
        ("wake", "away"),
        (3600, "away"),
        ("ring", "ringing"),
        ("over", "away"),
        ("back", "asleep"),
    ],
    "the microphone goes in the middle of an utterance, which is answered": [
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("lost", "away"),
        ("end", "answering"),
        ("over", "away"),
        ("back", "asleep"),
    ],
    "the microphone goes and comes back while it answers": [
        ("wake", "listening", "cut", WAKE),
        ("speech", "hearing"),
        ("end", "answering"),
        ("lost", "answering"),
        ("back", "answering"),
        ("over", "following"),
    ],
}


def told(life, story, now=0.0):
    for number, (what, state, *actions) in enumerate(story):
        if isinstance(what, str):
            done = life.on(what, now)
        else:
            now += what
            done = life.tick(now)
        assert (life.state, list(done)) == (state, actions), (number, what)


@pytest.mark.parametrize("name", STORIES)
def test_a_story(name):
    told(Life(Habits()), STORIES[name])


def test_without_a_wake_word_it_is_always_awake():
    life = Life(Habits(sleeps=False))
    told(
        life,
        [
            (3600, "listening"),
            ("speech", "hearing"),
            ("end", "answering"),
            ("over", "listening"),
            ("speech", "hearing"),
            ("end", "answering"),
            ("press", "listening", "cut"),
            ("stop", "listening", "cut"),
            ("speech", "hearing"),
            (61, "listening", "cut"),
            ("lost", "away"),
            ("back", "listening"),
        ],
    )


def test_without_a_window_every_question_needs_the_word():
    life = Life(Habits(follow_s=0))
    story = [("wake", "listening", "cut", WAKE), ("speech", "hearing"), ("end", "answering")]
    told(life, [*story, ("over", "following"), (0, "asleep", SLEEP)])


def test_a_question_of_its_own_holds_the_window_open():
    life = Life(Habits(follow_s=2))
    told(life, [("wake", "listening", "cut", WAKE), ("speech", "hearing"), ("end", "answering")])
    life.on("over", 0.0, at_least_s=15.0)
    told(life, [(14.9, "following"), (0.2, "asleep", SLEEP)])


@pytest.mark.parametrize("barge_in", [True, False])
def test_when_it_hears(barge_in):
    life = Life(Habits(barge_in=barge_in))
    heard = [life.hears]
    for event in ("wake", "speech", "end", "over"):
        life.on(event, 0.0)
        heard.append(life.hears)
    assert heard == [False, True, True, barge_in, True]
    life.on("lost", 0.0)
    assert not life.hears


@given(st.lists(st.sampled_from(Event.__args__), max_size=30), st.booleans())
def test_whatever_happens_it_comes_to_rest(events, sleeps):
    """And is never deaf for ever: the word is heard as soon as everything is there."""
    life = Life(Habits(sleeps=sleeps))
    for now, event in enumerate(events):
        actions = life.on(event, float(now))
        assert "cut" in actions or not (actions and event in ("wake", "press", "stop"))
    life.on("back", 100.0)
    for state, event in (("hearing", "end"), ("answering", "over"), ("ringing", "over")):
        if life.state == state:
            life.on(event, 100.0)
    life.tick(1000.0)
    assert life.state == ("asleep" if sleeps else "listening")


@pytest.mark.parametrize("wrong", [{"follow_s": -1}, {"listen_s": 0}, {"longest_s": 0}])
def test_habits_that_make_no_sense(wrong):
    with pytest.raises(UsageError, match="expected positive seconds"):
        Habits(**wrong)
