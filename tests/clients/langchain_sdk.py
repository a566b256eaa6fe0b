"""Run by test_serve_clients.py in an environment of its own: langchain's chat models.

python langchain_sdk.py TASK URL MODEL TOKEN     prints one JSON object
"""

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

task, url, model, token = sys.argv[1:]
openai = ChatOpenAI(
    base_url=f"{url}/v1", api_key=token, model=model, temperature=0, max_tokens=8, timeout=120
)
headers = {"headers": {"Authorization": f"Bearer {token}"}}
ollama = ChatOllama(
    base_url=url,
    model=model,
    temperature=0,
    num_predict=8,
    client_kwargs=headers,
    validate_model_on_init=True,
)


@tool
def light(on: bool) -> str:
    """Switch a light."""
    return f"it is {on}"


class Answer(BaseModel):
    ok: bool


def text():
    return {
        "openai": openai.invoke("Hello").content,
        "streamed": "".join(piece.content for piece in openai.stream("Hello")),
        "ollama": ollama.invoke("Hello").content,
    }


def loop():
    """A tool's call, its result, and the answer behind it."""
    asking = openai.bind_tools([light], tool_choice="light").bind(max_tokens=200)
    talk = [HumanMessage("Hello")]
    called = asking.invoke(talk)
    [call] = called.tool_calls
    result = ToolMessage(light.invoke(call["args"]), tool_call_id=call["id"])
    ended = openai.bind_tools([light]).invoke([*talk, called, result])
    return {"call": call["name"], "reason": ended.response_metadata["finish_reason"]}


def structured():
    longer = openai.model_copy(update={"max_tokens": 90})
    asking = longer.with_structured_output(Answer, method="json_schema")
    longer = ollama.model_copy(update={"num_predict": 90})
    by_ollama = longer.with_structured_output(Answer, method="json_schema")
    return {"openai": asking.invoke("Hello").ok, "ollama": by_ollama.invoke("Hello").ok}


def embeddings():
    from langchain_ollama import OllamaEmbeddings
    from langchain_openai import OpenAIEmbeddings

    by_openai = OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key=token, model=model, check_embedding_ctx_length=False
    )
    by_ollama = OllamaEmbeddings(base_url=url, model=model, client_kwargs=headers)
    texts = ["a river", "a bridge"]
    return {
        "openai": by_openai.embed_documents(texts),
        "ollama": by_ollama.embed_documents(texts),
    }


print(json.dumps(globals()[task]()))
