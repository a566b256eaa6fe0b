"""Turns with calls in them. A scripted decoder stands in for the model (scripted.py); that real
weights choose the right tool is not shown here.
"""

from __future__ import annotations

import threading

import pytest
from scripted import ScriptedDecoder

import edge_gemma
from edge_gemma import FunctionCall, Message, Sampling
from edge_gemma.assistant.phrases import Phrases, known_languages, may_say_stop, says_stop, says_yes
from edge_gemma.assistant.tool import dangerous
from edge_gemma.assistant.tool_loop import ToolLoop
from edge_gemma.assistant.tools import Tool, Toolbox, ToolError

opened: list[str] = []


@pytest.fixture(scope="module")
def model(tiny_bundle):
    """Room enough for descriptions: the tiny vocabulary has few long tokens."""
    request = edge_gemma.PlanRequest(n_ctx=4096, n_threads=1)
    with edge_gemma.load(tiny_bundle, request=request) as loaded:
        yield loaded


def add(a: int, b: int = 1) -> int:
    "Add two numbers."
    return a + b


@dangerous
def unlock(door: str) -> str:
    "Unlock a door."
    opened.append(door)
    return f"{door} is open"


def broken() -> None:
    "Always fails."
    raise ToolError("the lamp does not answer")


def big() -> str:
    "10 MB."
    return "x" * 10_000_000


TOOLBOX = Toolbox([add, unlock, broken, big])
ADD, UNLOCK = FunctionCall("add", {"a": 2}), FunctionCall("unlock", {"door": "front"})


@pytest.fixture(autouse=True)
def locked():
    opened.clear()


def talk(model, script, toolbox=TOOLBOX, **options):
    """A chat, its loop, the scripted decoder, and a function that says something to it."""
    chat = model.chat(tools=toolbox.specs)
    decoder = ScriptedDecoder(chat, script)
    loop = ToolLoop(chat, toolbox, **options)
    told: list[str] = []

    def say(text):
        return "".join(chunk.text for chunk in loop.send(text, Sampling(seed=1), tell=told.append))

    return chat, loop, decoder, say, told


def last_roles(chat):
    return [message.role for message in chat.messages]


def test_a_call_its_result_and_the_answer(model):
    chat, _, decoder, say, told = talk(model, [ADD, "It is 3.", "Good."])
    with chat:
        assert say("2 and 1?") == "It is 3."
        assert told == ["add (a: 2) → 3"]
        assert last_roles(chat) == ["user", "assistant", "tool", "assistant"]
        assert chat.messages[2].content == "3"
        assert all(s.call_schema["anyOf"] for s in decoder.samplings)
        assert say("Thanks") == "Good."


def test_words_before_a_call_are_said_and_the_call_is_not(model):
    both = f"Let me see.\n{ADD.to_json()}"
    chat, _, _, say, _ = talk(model, [both, "It is 3.", '{"a": "no call"}'])
    with chat:
        assert say("2 and 1?") == "Let me see.\nIt is 3."
        assert say("JSON?") == '{"a": "no call"}'


def test_several_calls_at_once(model):
    calls = "[" + ", ".join([ADD.to_json(), FunctionCall("add", {"a": 5}).to_json()]) + "]"
    chat, _, _, say, told = talk(model, [calls, "3 and 6."])
    with chat:
        assert say("Both?") == "3 and 6." and len(told) == 2
        assert [m.content for m in chat.messages if m.role == "tool"] == ["3", "6"]


@pytest.mark.compat(
    kind="talk",
    what="a tool that fails, one that does not exist, wrong arguments",
    happens="the model is told and answers; a line is shown; the conversation goes on",
)
def test_calls_that_fail(model):
    script = [
        FunctionCall("broken"),
        "It does not answer.",
        FunctionCall("lamp", {"on": True}),
        "There is none.",
        FunctionCall("add", {"a": "two"}),
        "I need a number.",
        FunctionCall("big"),
        "So much.",
    ]
    chat, _, _, say, told = talk(model, script)
    with chat:
        assert say("a") == "It does not answer."
        assert say("b") == "There is none." and say("c") == "I need a number."
        assert say("d") == "So much."
        results = [m.content for m in chat.messages if m.role == "tool"]
        assert results[0] == "Error: the lamp does not answer"
        assert results[1].startswith("Error: there is no tool 'lamp'; there are: add")
        assert results[2].startswith("Error: add was not called: Expected `int`")
        assert len(results[3]) < 4200
        assert told[0] == "broken → the lamp does not answer" and "4000 are used" in told[3]


@pytest.mark.compat(
    kind="talk",
    what="a model that calls tools without end",
    happens="stopped after 4 rounds in one turn, with a sentence; the chat goes on",
)
def test_rounds_are_counted(model):
    chat, _, decoder, say, told = talk(model, [ADD] * 3 + ["Good."], max_rounds=2)
    with chat:
        assert say("Go") == Phrases.of("en").say("rounds")
        assert len(told) == 2 and decoder.script == ["Good."]
        assert chat.messages[-2].content == "Error: too many calls for one question"
        assert say("Well?") == "Good."


@pytest.mark.compat(
    kind="talk",
    what="a call of a tool that is marked dangerous",
    happens="asked first; done only after a clear yes in the next turn",
)
def test_a_yes(model):
    chat, loop, decoder, say, told = talk(model, [UNLOCK, "It is open.", "Good."])
    with chat:
        question = say("Unlock the front door")
        assert question == "Shall I really do this: unlock (door: front)? Say yes or no."
        assert loop.asks and not opened and not told
        assert last_roles(chat) == ["user", "assistant", "tool", "assistant"]
        assert say("Yes, please.") == "It is open."
        assert opened == ["front"] and not loop.asks
        # as if nobody had asked
        assert last_roles(chat) == ["user", "assistant", "tool", "assistant"]
        assert [m.content for m in chat.messages][-2:] == ["front is open", "It is open."]
        assert say("Thanks") == "Good."


@pytest.mark.parametrize("answer", ["No.", "", "What?", "Yes. No, wait!", "yes " * 30])
def test_anything_else_is_a_no(model, answer):
    chat, loop, _, say, told = talk(model, [UNLOCK, "All right."])
    with chat:
        say("Unlock the front door")
        assert say(answer) == "All right."
        assert not opened and not loop.asks and len(told) == 1
        assert chat.messages[-2].content.startswith('not done: the user was asked and said "')


@pytest.mark.compat(
    kind="talk",
    what="no answer to the question of a dangerous tool",
    happens="not done, and said so after 15 s; what is said later is a turn like any other",
)
def test_no_answer_is_a_no(model):
    chat, loop, _, say, _ = talk(model, [UNLOCK, "Hello."], confirm_within_s=-1)
    with chat:
        say("Unlock the front door")
        assert loop.overdue() == Phrases.of("en").say("undone")
        assert loop.overdue() is None and not loop.asks
        assert chat.messages[-1] == Message("assistant", Phrases.of("en").say("undone"))
        assert say("Yes") == "Hello." and not opened
    chat, loop, _, say, _ = talk(model, [UNLOCK, "Hello."], confirm_within_s=-1)
    with chat:
        say("Unlock the front door")
        assert say("Yes") == "Hello." and not opened  # too late, and nobody looked before


def test_a_dangerous_call_among_others(model):
    calls = "[" + ", ".join(c.to_json() for c in (ADD, UNLOCK, UNLOCK, ADD)) + "]"
    chat, _, _, say, told = talk(model, [calls, "Done."])
    with chat:
        for answer in ("Do it all", "Yes"):
            assert "Say yes or no" in say(answer)
        assert opened == ["front"]  # each is asked for itself
        assert say("No") == "Done."
        results = [m.content for m in chat.messages if m.role == "tool"]
        assert results[:2] == ["3", "front is open"] and results[3] == "3"
        assert results[2].startswith("not done") and opened == ["front"] and len(told) == 4


def test_a_question_of_the_tools_own(model):
    def wipe() -> None:
        "Wipe."

    wipe.dangerous = "Shall I wipe everything?"
    chat, _, _, say, _ = talk(model, [FunctionCall("wipe")], Toolbox([wipe]))
    with chat:
        assert say("Wipe") == "Shall I wipe everything?"


def test_a_turn_that_is_stopped_while_a_tool_runs(model):
    gate, stopped = threading.Event(), threading.Event()

    def run(_):
        stopped.set()
        gate.wait(60)

    toolbox = Toolbox([Tool("slow", "Slow.", {}, run, timeout_s=60)])
    chat, loop, _, say, _ = talk(model, [FunctionCall("slow"), "Good."], toolbox)
    with chat:
        said = list(loop.send("Go", stopped=stopped))
        gate.set()
        assert "".join(chunk.text for chunk in said) == ""
        assert chat.messages[-1].content.startswith("Error: the user interrupted")
        assert say("Well?") == "Good."  # the cache is right again


def test_a_yes_that_is_taken_back_while_it_is_written_down(model):
    chat, loop, _, say, _ = talk(model, [UNLOCK, "Yes.", "All right."])
    with chat:
        say("Unlock the front door")
        stopped = threading.Event()
        assert loop.instruction("") != ""

        def generate(sampling):
            yield from chat.send("(spoken)", sampling)
            stopped.set()

        list(loop.answer(generate, stopped=stopped))
        assert not opened


def test_results_that_do_not_fit_the_context(tiny_bundle):
    def long() -> str:
        "Long."
        return "word " * 800

    request = edge_gemma.PlanRequest(n_ctx=1024, n_threads=1)
    with edge_gemma.load(tiny_bundle, request=request) as model:
        script = [FunctionCall("long"), "Too long."]
        chat, _, _, say, _ = talk(model, script, Toolbox([long]))
        with chat:
            assert say("Go") == "Too long."
            result = chat.messages[-2].content
            assert "cut: the context has no more room" in result or "too long" in result


def test_tools_that_are_none(model):
    chat, _, _, say, _ = talk(model, ["Hello."], Toolbox())
    with chat:
        assert say("Hi") == "Hello."


@pytest.mark.parametrize("language", known_languages())
def test_yes_and_no_in_every_language(language):
    import tomllib
    from importlib.resources import files

    table = tomllib.loads((files("edge_gemma.assistant") / "phrases.toml").read_text("utf-8"))
    words = table[language]
    assert set(words) == set(table["en"])
    assert all(says_yes(yes.capitalize() + ".", [language]) for yes in words["yes"])
    assert not any(says_yes(no.capitalize() + "!", [language]) for no in words["no"])
    assert not any(says_yes(f"{yes}, {words['no'][0]}", [language]) for yes in words["yes"])
    for name in ("ask", "undone", "rounds", "timer", "alarm", "missed", "model_lost", "model_back"):
        said = Phrases.of(language).say(name, what="x", label=" y", time="1", ago="2")
        assert said and "{" not in said
    assert all("{n}" in span for span in words["spans"]) and len(words["spans"]) == 4


@pytest.mark.parametrize("language", known_languages())
def test_stop_phrases_in_every_language(language):
    import tomllib
    from importlib.resources import files

    table = tomllib.loads((files("edge_gemma.assistant") / "phrases.toml").read_text("utf-8"))
    for phrase in table[language]["stop"]:
        assert says_stop(phrase.capitalize() + "!", [language]) and says_stop(phrase)
        assert says_stop(f"{phrase}, {table[language]['polite'][0]}.", [language])
        assert all(may_say_stop(phrase[:n], [language]) for n in range(len(phrase)))
        assert not says_stop(phrase + " xyz", [language])
    for other in ("What time is it?", "Stop the music", "12", "…", "", "x" * 10_000):
        assert not says_stop(other, [language])
