"""What a caller may ask of the guard: its own usage."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_gemma.serve.guard.usage import UsageBook
from edge_gemma.serve.visit import NOBODY, current_visit


def usage_routes(book: UsageBook) -> list[Route]:
    async def usage(request: Request) -> Response:
        """The caller's own totals, nobody else's."""
        visit = current_visit.get()
        name = visit.caller if visit else NOBODY
        found = {"object": "usage", "name": name, **msgspec.structs.asdict(book.of(name))}
        return Response(msgspec.json.encode(found), media_type="application/json")

    return [Route("/v1/usage", usage, methods=["GET"])]
