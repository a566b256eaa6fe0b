"""Run by test_serve_clients.py in an environment of its own: the openai package against a server.

python openai_sdk.py TASK URL MODEL TOKEN [FILE]     prints one JSON object
"""

import base64
import json
import sys

import openai

task, url, model, token, *files = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0, timeout=120)
HELLO = [{"role": "user", "content": "Hello"}]
SHORT = {"model": model, "messages": HELLO, "max_tokens": 8, "temperature": 0}
LIGHT = {
    "type": "function",
    "function": {
        "name": "light",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def models():
    return {"ids": [found.id for found in client.models.list()]}


def chat():
    answer = client.chat.completions.create(**SHORT)
    return {"text": answer.choices[0].message.content, "usage": answer.usage.total_tokens}


def stream():
    options = {"include_usage": True}
    with client.chat.completions.create(**SHORT, stream=True, stream_options=options) as chunks:
        seen = list(chunks)
    texts = [piece.choices[0].delta.content or "" for piece in seen if piece.choices]
    return {"text": "".join(texts), "usage": seen[-1].usage.total_tokens}


def tools():
    asked = SHORT | {"tools": [LIGHT], "tool_choice": "required", "max_tokens": 200}
    message = client.chat.completions.create(**asked).choices[0].message
    [call] = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    follow = SHORT | {"messages": [*HELLO, message, result], "tools": [LIGHT]}
    second = client.chat.completions.create(**follow)
    arguments = json.loads(call.function.arguments)
    return {"arguments": arguments, "finish_reason": second.choices[0].finish_reason}


def json_schema():
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(**SHORT | {"response_format": form, "max_tokens": 90})
    return {"answer": json.loads(answer.choices[0].message.content)}


def responses():
    asked = {"model": model, "input": "Hello", "temperature": 0}
    whole = client.responses.create(**asked, max_output_tokens=8)
    with client.responses.stream(**asked, max_output_tokens=8) as events:
        seen = list(events)
    deltas = [event.delta for event in seen if event.type == "response.output_text.delta"]
    form = {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}
    held = client.responses.create(**asked, max_output_tokens=90, text={"format": form})
    tool = {"type": "function", "strict": False} | LIGHT["function"]
    asked |= {"tools": [tool], "max_output_tokens": 200}
    [call] = client.responses.create(**asked, tool_choice="required").output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    talk = [{"role": "user", "content": "Hello"}, call, result]
    second = client.responses.create(**asked | {"input": talk, "max_output_tokens": 8})
    return {
        "texts": [whole.output_text, "".join(deltas), seen[-1].response.output_text],
        "answer": json.loads(held.output_text),
        "call": [call.name, list(json.loads(call.arguments))],
        "second": second.status,
    }


def embeddings():
    texts = ["a river", "a bridge"]
    found = client.embeddings.create(model=model, input=texts)  # in base64, by default
    plain = client.embeddings.create(model=model, input=texts, encoding_format="float")
    return {
        "vectors": [each.embedding for each in found.data],
        "plain": [each.embedding for each in plain.data],
    }


def speech():
    asked = {"model": "tts-1", "voice": "alloy", "input": "Good morning."}
    whole = client.audio.speech.create(**asked, response_format="wav").content
    with client.audio.speech.with_streaming_response.create(**asked) as answer:
        mp3 = b"".join(answer.iter_bytes())
    return {"wav": whole[:4].decode(), "wav_bytes": len(whole), "mp3_bytes": len(mp3)}


def image():
    data = base64.b64encode(open(files[0], "rb").read()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What?"},
    ]
    asked = SHORT | {"messages": [{"role": "user", "content": parts}]}
    return {"text": client.chat.completions.create(**asked).choices[0].message.content}


def input_audio():
    data = base64.b64encode(open(files[0], "rb").read()).decode()
    parts = [
        {"type": "text", "text": "What?"},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
    ]
    asked = SHORT | {"messages": [{"role": "user", "content": parts}]}
    return {"text": client.chat.completions.create(**asked).choices[0].message.content}


def transcriptions():
    def create(**more):
        with open(files[0], "rb") as file:
            return client.audio.transcriptions.create(
                model=model, file=file, language="en", temperature=0, **more
            )

    verbose = create(response_format="verbose_json")
    streamed = list(create(stream=True))
    return {
        "text": create().text,
        "srt": create(response_format="srt"),
        "segments": [[segment.start, segment.end] for segment in verbose.segments],
        "duration": verbose.duration,
        "deltas": "".join(event.delta for event in streamed[:-1]),
        "done": streamed[-1].text,
    }


def errors():
    """The exceptions that the package makes of refusals."""
    found = []
    for body in (
        SHORT | {"model": "other"},
        SHORT | {"n": 2},
        SHORT | {"messages": [{"role": "user", "content": "word " * 3000}]},
    ):
        try:
            client.chat.completions.create(**body)
        except openai.APIStatusError as error:
            found.append([type(error).__name__, error.code])
    try:
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
    except openai.AuthenticationError as error:
        found.append([type(error).__name__, error.code])
    return {"errors": found}


print(json.dumps(globals()[task]()))
