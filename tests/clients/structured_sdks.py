"""Run by test_serve_clients.py in an environment of its own: who asks for structured output.

python structured_sdks.py TASK URL MODEL TOKEN     prints one JSON object
"""

import json
import sys

import instructor
import openai
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.output import NativeOutput
from pydantic_ai.providers.openai import OpenAIProvider

task, url, model, token = sys.argv[1:]


class Answer(BaseModel):
    ok: bool


def by_instructor():
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=token, timeout=120)
    found = {}
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        asking = instructor.from_openai(client, mode=mode)
        answer = asking.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Hello"}],
            response_model=Answer,
            max_tokens=200,
            temperature=0,
            max_retries=0,
        )
        found[mode.value] = answer.ok
    return found


def by_pydantic_ai():
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key=token)
    settings = {"max_tokens": 200, "temperature": 0}
    board = OpenAIChatModel(model, provider=provider)
    native = Agent(board, output_type=NativeOutput(Answer), model_settings=settings)
    by_tool = Agent(board, output_type=Answer, model_settings=settings)
    return {
        "native": native.run_sync("Hello").output.ok,
        "tool": by_tool.run_sync("Hello").output.ok,
    }


print(json.dumps(globals()[task]()))
