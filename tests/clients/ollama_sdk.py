"""Run by test_serve_clients.py in an environment of its own: the ollama package against a server.

python ollama_sdk.py TASK URL MODEL TOKEN [FILE]     prints one JSON object
"""

import json
import sys
import time

import ollama

task, url, model, token, *files = sys.argv[1:]
client = ollama.Client(url, headers={"Authorization": f"Bearer {token}"})
HELLO = [{"role": "user", "content": "Hello"}]
SHORT = {"num_predict": 8, "temperature": 0}
LONG = {"num_predict": 200, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def light(on: bool) -> str:
    """Switch a light."""
    return "done"


def models():
    shown, [loaded] = client.show(model), client.ps().models
    [listed] = client.list().models
    return {
        "ids": [listed.model, loaded.model],
        "capabilities": shown.capabilities,
        "pulled": client.pull(model).status,
    }


def chat():
    answer = client.chat(model, HELLO, options=SHORT, keep_alive="5m", think=False)
    return {"text": answer.message.content, "reason": answer.done_reason}


def stream():
    lines = list(client.chat(model, HELLO, options=SHORT, stream=True))
    return {"text": "".join(line.message.content for line in lines), "eval": lines[-1].eval_count}


def generate():
    return {"text": client.generate(model, "Hello", options=SHORT).response}


def tools():
    call = {
        "type": "object",
        "properties": {
            "name": {"const": "light"},
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}},
                "required": ["on"],
            },
        },
        "required": ["name", "parameters"],
    }
    answer = client.chat(model, HELLO, tools=[light], format=call, options=LONG)
    [found] = answer.message.tool_calls
    result = light(**found.function.arguments)
    talk = [*HELLO, answer.message, {"role": "tool", "tool_name": "light", "content": result}]
    second = client.chat(model, talk, tools=[light], options=SHORT)
    return {"arguments": dict(found.function.arguments), "reason": second.done_reason}


def json_schema():
    answer = client.chat(model, HELLO, format=SCHEMA, options=LONG)
    return {"answer": json.loads(answer.message.content)}


def embeddings():
    texts = ["a river", "a bridge"]
    found = client.embed(model, texts)
    old = client.embeddings(model, texts[0])
    return {"vectors": [list(each) for each in found.embeddings], "old": list(old.embedding)}


def keep_alive():
    gone = client.chat(model, [], keep_alive=0).done_reason
    end_s = time.monotonic() + 30
    while client.ps().models and time.monotonic() < end_s:
        time.sleep(0.02)
    n_loaded = len(client.ps().models)
    answer = client.chat(model, HELLO, options=SHORT, keep_alive=-1)
    return {
        "gone": [gone, n_loaded],
        "text": answer.message.content,
        "load_s": answer.load_duration / 1e9,
        "loaded": len(client.ps().models),
    }


def image():
    message = {"role": "user", "content": "What?", "images": [files[0]]}
    return {"text": client.chat(model, [message], options=SHORT).message.content}


def errors():
    try:
        client.chat("other", HELLO)
    except ollama.ResponseError as error:
        return {"status": error.status_code, "error": error.error}


print(json.dumps(globals()[task]()))
