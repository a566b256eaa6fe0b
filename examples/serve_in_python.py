"""One model for many tasks of an event loop: python examples/serve_in_python.py BUNDLE QUESTION…"""

import asyncio
import sys

import edge_gemma
from edge_gemma import GenerationRequest, Message, PlanRequest, Sampling, Service


async def ask(service: Service, question: str) -> None:
    request = GenerationRequest(
        [Message("user", question)],
        sampling=Sampling(max_tokens=64),
        truncate=True,
    )
    async with service.submit(request) as answer:
        text = "".join([chunk.text async for chunk in answer])
    print(f"{question}\n  {text.strip()}")


async def talk(model: edge_gemma.Model, questions: list[str]) -> None:
    service = Service(model, max_waiting=16)
    await asyncio.gather(*(ask(service, question) for question in questions))
    print(service.health())
    await service.close()


def main(bundle: str, *questions: str) -> None:
    request = PlanRequest(n_seq_max=2)  # two answers at a time; the others wait
    with edge_gemma.load(bundle, n_ctx=1024, request=request) as model:
        asyncio.run(talk(model, list(questions)))


if __name__ == "__main__":
    main(*sys.argv[1:])
