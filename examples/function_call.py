"""Let the model call a function of yours: python examples/function_call.py BUNDLE "QUESTION"

The schema allows nothing but a call; the program decides what is run.
"""

import sys
from datetime import datetime
from zoneinfo import ZoneInfo

import edge_gemma
from edge_gemma import FunctionCall, Sampling, tool_schema

ZONES = ["Europe/Rome", "Asia/Tokyo", "America/Lima"]
CLOCK = {
    "name": "time_in",
    "description": "The time of day in a time zone.",
    "parameters": {
        "type": "object",
        "properties": {"zone": {"enum": ZONES}},
        "required": ["zone"],
    },
}


def run(call: FunctionCall) -> str:
    return datetime.now(ZoneInfo(call.parameters["zone"])).strftime("%H:%M")


def main(bundle: str, question: str) -> None:
    with edge_gemma.load(bundle) as model, model.chat(tools=[CLOCK]) as chat:
        only_a_call = Sampling(max_tokens=100, schema=tool_schema([CLOCK]))
        list(chat.send(question, only_a_call))
        (call,) = chat.reply.calls
        print(f"{call.name}({call.parameters}) = {run(call)}")
        for chunk in chat.send(run(call), Sampling(max_tokens=60), role="tool"):
            print(chunk.text, end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
