"""Function calls: every way that a model writes one is read into one form, and written from it."""

from __future__ import annotations

import msgspec
import pytest
from ggufs import CONTROL, Parts, with_tokens
from hypothesis import given
from hypothesis import strategies as st
from prompts import GEMMA3, TEMPLATE, manifest

import edge_gemma
from edge_gemma import FunctionCall, Message, PlanRequest
from edge_gemma.bundles.token_roles import FUNCTION_TOKENS
from edge_gemma.engines.llama.sampler import Sampler
from edge_gemma.errors import UsageError
from edge_gemma.prompts import function_gemma
from edge_gemma.prompts.calls import call_of, parse_calls
from edge_gemma.prompts.prompt import Prompt
from edge_gemma.store.importer import import_gguf

CALL = '{"name": "light", "parameters": {"on": true}}'
LIGHT = FunctionCall("light", {"on": True})
NOW = FunctionCall("now")


def written(what: str, text: str, *calls: FunctionCall):
    happens = "read" if calls else "no call"
    mark = pytest.mark.compat(kind="calls", what=what, happens=happens)
    return pytest.param(text, list(calls), marks=mark, id=what)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        written("two objects on one line", f"{CALL} {CALL}", LIGHT, LIGHT),
        written("two objects without a space", f"{CALL}{CALL}", LIGHT, LIGHT),
        written("two objects with a comma between", f"{CALL}, {CALL}", LIGHT, LIGHT),
        written("two objects with a semicolon between", f"{CALL};{CALL};", LIGHT, LIGHT),
        written("two objects with a comma, on two lines", f"{CALL},\n{CALL}", LIGHT, LIGHT),
        written(
            "a call after another fence",
            f"```python\nprint({CALL})\n```\n```json\n{CALL}\n```",
            LIGHT,
        ),
        written("a bare call after another fence", f"```text\nnone\n```\n{CALL}", LIGHT),
        written("a call inside a fence of code", f"```python\n{CALL}\n```"),
        written("a fence without a line break", f"```json{CALL}```", LIGHT),
        written("a fence with a space and no line break", f"``` {CALL} ```", LIGHT),
        written("a fence behind a sentence", f"Sure: ```json\n{CALL}\n```", LIGHT),
        written("parameters missing", '{"name": "now"}', NOW),
        written("parameters null", '{"name": "now", "parameters": null}', NOW),
        written("arguments instead of parameters", CALL.replace("parameters", "arguments"), LIGHT),
        written("arguments as text", '{"name": "light", "arguments": "{\\"on\\": true}"}', LIGHT),
        written("arguments as an empty text", '{"name": "now", "arguments": ""}', NOW),
        written(
            "OpenAI's wrapping",
            '{"type": "function", "function": {"name": "light", "arguments": {"on": true}}}',
            LIGHT,
        ),
        written("a list named tool_calls", f'{{"tool_calls": [{CALL}]}}', LIGHT),
        written("arguments that are no object", '{"name": "light", "arguments": "on"}'),
        written("some object with a name", '{"name": "Ann", "age": 3}'),
        written("numbers that JSON does not know", '{"name": "a", "parameters": {"x": NaN}}'),
        written("a call inside a sentence", f"I would say {CALL} here"),
    ],
)
def test_ways_to_write_a_call(text, calls):
    assert parse_calls(text) == calls


def test_any_form_of_a_call_is_read_into_the_one():
    forms = [
        LIGHT,
        {"name": "light", "parameters": {"on": True}},
        {"id": "1", "type": "function", "function": {"name": "light", "arguments": '{"on":true}'}},
    ]
    assert [call_of(form) for form in forms] == [LIGHT] * 3
    assert call_of({"name": 3}) is None and call_of("light") is None
    with pytest.raises(UsageError, match="a tool call is a name and parameters"):
        Prompt(manifest(), lambda text, special: []).spans(
            [Message("user", "x"), {"role": "assistant", "tool_calls": [{"name": 3}]}]
        )


# ---- FunctionGemma

IDS = {name: 300 + i for i, name in enumerate(FUNCTION_TOKENS)}
SPELLED = {text: IDS[name] for name, text in FUNCTION_TOKENS.items()}
TURNS = {"<start_of_turn>": 105, "<end_of_turn>": 106, "<bos>": 2}
TOOLS = [
    {
        "name": "weather",
        "description": "The weather <end_of_turn> somewhere.",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["c", "f"]},
                "city": {"type": ["string", "null"], "description": "City"},
            },
            "required": ["city"],
        },
    }
]
DECLARATION = (
    "<start_function_declaration>declaration:weather{description:<escape>The weather "
    "‹end_of_turn› somewhere.<escape>,parameters:{properties:{city:{description:<escape>City"
    "<escape>,type:<escape>STRING<escape>},unit:{description:<escape><escape>,enum:[<escape>c"
    "<escape>,<escape>f<escape>],type:<escape>STRING<escape>}},required:[<escape>city<escape>],"
    "type:<escape>OBJECT<escape>}}<end_function_declaration>"
)
ROME = FunctionCall("weather", {"unit": "c", "city": 'Rome, <escape> "{}"', "days": 3})
ROME_WRITTEN = (
    '<start_function_call>call:weather{city:<escape>Rome, ‹escape› "{}"<escape>,days:3,'
    "unit:<escape>c<escape>}<end_function_call>"
)


def tokenize(text: str, special: bool) -> list[int]:
    """Control tokens where they may be; every other letter by its code point."""
    known = SPELLED | TURNS
    if special and text in known:
        return [known[text]]
    return [1000 + ord(letter) for letter in text]


def read_back(spans) -> str:
    """Ids as text; what only looks like a control token stands between ‹ and ›."""
    names = {id: text for text, id in (SPELLED | TURNS).items()}
    ids = [id for span in spans for id in span.ids]
    text = "".join("\0" + names[id] + "\0" if id in names else chr(id - 1000) for id in ids)
    pieces = text.split("\0")
    plain = [piece.replace("<", "‹").replace(">", "›") for piece in pieces[::2]]
    return "".join(p + (pieces[2 * i + 1 :] or [""])[0] for i, p in enumerate(plain))


def function_gemma_prompt(template: str | None) -> Prompt:
    tokens = {**GEMMA3, **IDS}
    made = msgspec.structs.replace(manifest(), special_tokens=tokens, chat_template=template)
    return Prompt(made, tokenize)


CHAT = [
    Message("system", "Be brief."),
    Message("user", "How is <start_function_call> it?"),
    Message("assistant", [ROME]),
    Message("tool", '{"temperature": 15, "sky": "clear"}'),
]
RESULT = (
    "<start_function_response>response:weather{sky:<escape>clear<escape>,temperature:15}"
    "<end_function_response>"
)


@pytest.mark.compat(
    kind="family",
    what="FunctionGemma without a template, or with one that does not know tools",
    happens="declarations, calls and results are written with its own tokens",
)
def test_function_gemmas_format_is_written():
    text = read_back(function_gemma_prompt(None).spans(CHAT, tools=TOOLS))
    assert text == (
        "<bos><start_of_turn>developer\nBe brief.\nYou can do function calling with the following "
        f"functions:{DECLARATION}<end_of_turn>\n<start_of_turn>user\nHow is ‹start_function_call› "
        f"it?<end_of_turn>\n<start_of_turn>model\n{ROME_WRITTEN}{RESULT}"
    )
    answered = [*CHAT, Message("assistant", "15 °C."), Message("user", "Thanks")]
    text = read_back(function_gemma_prompt(None).spans(answered, tools=TOOLS))
    assert text.endswith(
        f"{RESULT}15 °C.<end_of_turn>\n<start_of_turn>user\nThanks<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    text = read_back(function_gemma_prompt(TEMPLATE).spans(CHAT, tools=TOOLS))
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\nYou can do function calling")
    assert DECLARATION in text and text.endswith(f"<start_of_turn>model\n{ROME_WRITTEN}{RESULT}")
    continued = function_gemma_prompt(None).spans(answered, tools=TOOLS, continued=True)
    assert read_back(continued) == (
        "<end_of_turn>\n<start_of_turn>user\nThanks<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_result_that_is_no_object_and_one_that_nobody_asked_for():
    chat = [*CHAT[1:3], Message("tool", "rain"), {"role": "tool", "name": "x", "content": "[1]"}]
    text = read_back(function_gemma_prompt(None).spans(chat))
    assert text.endswith(
        "response:weather{value:<escape>rain<escape>}<end_function_response>"
        "<start_function_response>response:x{value:[1]}<end_function_response>"
    )


# behaves as FunctionGemma's own: tools, calls and results come in transformers' form
OWN = """{{ bos_token }}
{%- macro value(v) -%}
    {%- if v is string -%}<escape>{{ v }}<escape>
    {%- elif v is mapping -%}{% for key, item in v | dictsort -%}
        {{ key }}:{{ value(item) }}{% if not loop.last %},{% endif %}
    {%- endfor -%}
    {%- else -%}{{ v | tojson }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last='') -%}
{%- if tools -%}<start_of_turn>developer
{{ messages[0].content | trim if messages[0].role == 'system' }}
{%- for tool in tools -%}
<start_function_declaration>declaration:{{ tool.function.name }}{description:
{{- value(tool.function.description) }}}<end_function_declaration>
{%- endfor -%}<end_of_turn>
{% endif -%}
{%- for message in messages if message.role != 'system' -%}
    {%- if message.role == 'tool' -%}
        {%- for item in (message.content if message.content is not string else ()) -%}
<start_function_response>response:{{ item['name'] }}{
{{- value(item['response']) }}}<end_function_response>
        {%- endfor -%}
    {%- elif message.tool_calls -%}
<start_of_turn>model
{% for call in message.tool_calls -%}
<start_function_call>call:{{ call.function.name }}{
{{- value(call.function.arguments) }}}<end_function_call>
        {%- endfor -%}
    {%- else -%}
        {{ '' if ns.last == 'tool' else '<start_of_turn>' ~ ('model' if message.role == 'assistant'
           else message.role) ~ '\\n' }}{{ message.content | trim }}<end_of_turn>
{% endif -%}
    {%- set ns.last = message.role -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.last != 'tool' -%}<start_of_turn>model
{% endif -%}"""


@pytest.mark.compat(
    kind="family",
    what="a chat template that uses `tools` (FunctionGemma's own)",
    happens="it is given tools, calls and results; no text in them counts as a control token",
)
def test_a_template_that_uses_tools_is_given_them():
    text = read_back(function_gemma_prompt(OWN).spans(CHAT, tools=TOOLS))
    assert text == (
        "<bos><start_of_turn>developer\nBe brief.<start_function_declaration>declaration:weather"
        "{description:<escape>The weather ‹end_of_turn› somewhere.<escape>}"
        "<end_function_declaration><end_of_turn>\n<start_of_turn>user\nHow is "
        f"‹start_function_call› it?<end_of_turn>\n<start_of_turn>model\n{ROME_WRITTEN}{RESULT}"
    )
    more = [*CHAT, Message("assistant", "Fine."), Message("user", "Thanks")]
    text = read_back(function_gemma_prompt(OWN).spans(more, tools=TOOLS))
    assert text.endswith(
        f"{RESULT}Fine.<end_of_turn>\n<start_of_turn>user\nThanks<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    without = read_back(function_gemma_prompt(OWN).spans(CHAT[1:2]))
    assert without.startswith("<bos><start_of_turn>user")


@pytest.mark.compat(
    kind="family",
    what="a chat template that uses `tools`, of a bundle without FunctionGemma's tokens",
    happens="it is given tools; results come as messages of the role tool",
)
def test_a_template_of_another_kind_is_given_tools():
    template = (
        "{% for t in tools %}[{{ t.function | tojson }}]{% endfor %}{% for m in messages %}"
        "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or () %}{{ c.function.arguments"
        " | tojson }}{% endfor %}{% endfor %}"
    )
    made = msgspec.structs.replace(manifest(), chat_template=template)
    texts = []
    spy = Prompt(made, lambda text, special: texts.append(text) or [7])
    spy.spans(CHAT, tools=TOOLS)
    text = "".join(texts)
    assert '[{"name": "weather"' in text and '"temperature": 15' in text and "days" in text


PARAMETERS = st.dictionaries(
    st.text(st.sampled_from("abc_é "), min_size=1, max_size=6).map(str.strip).filter(bool),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.sampled_from('ab{}[],:"\\<escape>\n '), max_size=12),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from("xyz"), x, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@pytest.mark.compat(
    kind="family", what="FunctionGemma's calls, with any values", happens="written, then read back"
)
@given(st.lists(PARAMETERS, min_size=1, max_size=3))
def test_calls_with_tokens_survive_writing_and_reading(several):
    calls = [FunctionCall("weather", parameters) for parameters in several]
    (span,) = function_gemma_prompt(None).spans(
        [Message("user", "x"), Message("assistant", calls)], generate=False
    )
    known = {**IDS, **GEMMA3}
    start = span.ids.index(IDS["start_function_call"])

    def piece(id: int) -> bytes:
        return b"" if id in known.values() else chr(id - 1000).encode()

    before, found = function_gemma.read_answer(span.ids[start:], piece, known)
    assert found == calls and before == ""


@pytest.mark.parametrize(
    ("body", "parameters"),
    [
        ("{city:<escape>Rome<escape>}", {"city": "Rome"}),
        ("{ city : <escape>Rome<escape> , n : -1.5 }", {"city": "Rome", "n": -1.5}),
        ("{<escape>city<escape>:Rome}", {"city": "Rome"}),
        ("{a:[1,{b:true}],}", {"a": [1, {"b": True}]}),
        ("{}", {}),
        ("{a:NaN}", {"a": "NaN"}),
        ("{a:1", None),
        ("{a:<escape>x", None),
        ("{a}", None),
        ("{" * 100, None),
        ("{a:" * 100, None),
    ],
)
def test_calls_that_a_model_might_write(body, parameters):
    ids, rest = [], f"well <start_function_call>call:f{body}<end_function_call>"
    while rest:
        spelled = next((text for text in SPELLED if rest.startswith(text)), rest[0])
        ids += tokenize(spelled, True)
        rest = rest[len(spelled) :]
    before, calls = function_gemma.read_answer(ids, lambda id: chr(id - 1000).encode(), IDS)
    assert before == "well "
    assert calls == ([] if parameters is None else [FunctionCall("f", parameters)])


FIRST = 700  # of the tiny vocabulary's 768


@pytest.fixture(scope="module")
def function_model(tiny_bundle, tmp_path_factory):
    """The tiny model with FunctionGemma's tokens in the place of seven others, imported."""
    parts = Parts.read(tiny_bundle / "decoder.gguf")
    parts = parts.with_value("tokenizer.chat_template", None)
    tokens = {FIRST + i: (text, CONTROL) for i, text in enumerate(FUNCTION_TOKENS.values())}
    folder = tmp_path_factory.mktemp("function")
    path = with_tokens(parts, tokens).write(folder / "x.gguf")
    bundle = import_gguf(path, folder / "bundle", instruct=True)
    with edge_gemma.load(bundle, n_ctx=1024, request=PlanRequest(n_threads=1)) as model:
        yield model


def says(model, text: str, monkeypatch) -> None:
    """From now on the model answers with ``text``, whose control tokens count."""
    ids = [id for span in model.prompt.spans([Message("user", "x")]) for id in span.ids]
    assert ids[0] == 2
    special = {spelled: FIRST + i for i, spelled in enumerate(FUNCTION_TOKENS.values())}
    ids, rest = [], text
    while rest:
        spelled = next((token for token in special if rest.startswith(token)), None)
        plain = rest if spelled is None and "<" not in rest else rest[: rest.find("<")]
        ids += [special[spelled]] if spelled else model.tokenize(plain)
        rest = rest[len(spelled or plain) :]
    answer = iter(ids)
    monkeypatch.setattr(Sampler, "sample", lambda self, logits: next(answer))


@pytest.mark.compat(
    kind="family",
    what="FunctionGemma's call, its stop token, and its result in a chat",
    happens="reply.calls holds the call; the answer ends at <start_function_response>",
)
def test_a_chat_with_function_gemma(function_model, monkeypatch, tmp_path):
    model = function_model
    tokens = model.bundle.manifest.special_tokens
    assert tokens["start_function_response"] in model.bundle.manifest.end_tokens
    with model.chat(tools=TOOLS) as chat:
        says(
            model,
            "<start_function_call>call:weather{city:<escape>Rome<escape>,days:2}"
            "<end_function_call><start_function_response>",
            monkeypatch,
        )
        *_, last = chat.send("How is it?")
        rome = FunctionCall("weather", {"city": "Rome", "days": 2})
        assert last.finish_reason == "stop" and chat.reply.calls == (rome,)
        assert chat.messages[-1] == Message("assistant", ["", rome])
        n_before = chat.session.length
        says(model, "Warm.<start_function_response>", monkeypatch)
        *_, last = chat.send('{"sky": "clear"}', role="tool")
        # what was generated is what is written: only the result and the answer are new
        assert last.usage.reused_tokens >= n_before - 1
        assert chat.reply.text == "Warm." and chat.reply.calls == ()
        chat.save(tmp_path / "saved")
        says(model, "Bye.<start_function_response>", monkeypatch)
        *_, last = chat.send("Thanks")
        assert chat.reply.text == "Bye."
        with model.chat(tools=TOOLS) as other:
            other.restore(tmp_path / "saved")
            assert other.messages == chat.messages[:4]


def test_a_mere_name_is_a_call_only_where_it_is_a_tools(tiny_model, monkeypatch):
    for answer, calls in (('{"name": "Ann"}', ()), ('{"name": "weather"}', (call("weather"),))):
        ids = iter([*tiny_model.tokenize(answer), tiny_model.bundle.manifest.special_tokens["eos"]])
        monkeypatch.setattr(Sampler, "sample", lambda self, logits, ids=ids: next(ids))
        with tiny_model.chat(tools=TOOLS) as chat:
            list(chat.send("Who?"))
            assert chat.reply.text == answer and chat.reply.calls == calls


def call(name: str) -> FunctionCall:
    return FunctionCall(name, {})
