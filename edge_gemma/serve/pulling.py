"""Ollama's /api/pull: what is installed is there already; a download only where it was allowed.

In: a name. Out: JSON lines with how far the download is. The server goes on with its own model:
what was pulled is installed beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.serve.bodies import ClosingStream, Server, encoded
from edge_gemma.serve.refusals import Refusal, refusal_of
from edge_gemma.store.installed import ls

NDJSON = "application/x-ndjson"


def is_there(server: Server, name: str) -> bool:
    """Whether the model is served, or installed in the store."""
    plain = name.removesuffix(":latest")
    return plain == server.name or any(entry.name == plain for entry in ls())


def pulled(name: str) -> ClosingStream:
    """The events of a download, which goes on when its reader leaves. Raises Refusal (a name that
    the hub could not have).
    """
    from edge_gemma.store.reference import parse_reference

    try:
        parse_reference(name)
    except EdgeGemmaError as error:
        raise Refusal(400, str(error)) from None
    return ClosingStream(_events(name), NDJSON, lambda: None)


async def _events(name: str) -> AsyncIterator[bytes]:
    from edge_gemma.store.pull import pull

    loop = asyncio.get_running_loop()
    news: asyncio.Queue[dict[str, object]] = asyncio.Queue()

    def tell(what: str, done: int, total: int) -> None:
        line = {"status": f"pulling {what}", "completed": done, "total": total}
        loop.call_soon_threadsafe(news.put_nowait, line)

    yield _line({"status": "pulling manifest"})
    fetching = asyncio.ensure_future(asyncio.to_thread(pull, name, on_progress=tell))
    while not fetching.done():
        waiting = asyncio.ensure_future(news.get())
        await asyncio.wait((fetching, waiting), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            yield _line(waiting.result())
        waiting.cancel()
    try:
        bundle = fetching.result()
    except EdgeGemmaError as error:
        yield _line({"error": str(refusal_of(error))})
        return
    yield _line({"status": f"installed as {bundle.folder.name}; this server goes on with its own"})
    yield _line({"status": "success"})


def _line(value: dict[str, object]) -> bytes:
    return encoded(value) + b"\n"
