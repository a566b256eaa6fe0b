"""The page itself, and the figures that it shows beside the chat.

The file is all there is: no script or style from elsewhere, and a policy that lets a browser load
none. Nothing in it is secret, so it is given without a token; what it asks for needs one.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_gemma.machine.footprint import footprint
from edge_gemma.serve.bodies import Server, json_response
from edge_gemma.serve.page.turns import Turns

# nothing from elsewhere; hashes let the page's own script and style run, and no other.
# blob: is the microphone's worklet
_POLICY = (
    "default-src 'none'; script-src {script} blob:; style-src {style}; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def _page() -> bytes:
    return (resources.files("edge_gemma.serve.page") / "index.html").read_bytes()


@cache
def _policy() -> str:
    """What a browser may load: what the page brings with it."""
    return _POLICY.format(script=_hash("script"), style=_hash("style"))


def _hash(tag: str) -> str:
    found = re.search(rf"<{tag}>(.*)</{tag}>", _page().decode(), re.DOTALL)
    assert found is not None
    digest = hashlib.sha256(found[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def page_response() -> Response:
    """The page, for whoever asks ``/`` for HTML."""
    headers = {
        "content-security-policy": _policy(),
        "referrer-policy": "no-referrer",
        "permissions-policy": "microphone=(self), camera=(self)",
        "cache-control": "no-cache",
    }
    return Response(_page(), media_type="text/html; charset=utf-8", headers=headers)


def wants_page(accept: str) -> bool:
    """Whether a browser asks, and no client that only wants to know who is there."""
    return "text/html" in accept


def page_routes(server: Server) -> list[Route]:
    async def state(request: Request) -> Response:
        service, manifest = server.service, server.manifest
        health, now = service.health(), footprint()
        return json_response(
            {
                "model": server.name,
                "hears": manifest.audio is not None,
                "sees": manifest.vision is not None,
                "chats": manifest.embedding is None,
                "n_ctx": service.n_ctx,
                "planned_bytes": service.model.plan.total_bytes,
                "pss_bytes": now.pss_bytes,
                "n_lanes": health.n_lanes,
                "n_running": health.n_running,
                "n_waiting": health.n_waiting,
                "max_waiting": health.max_waiting,
            }
        )

    return [Route("/page/state", state, methods=["GET"]), *Turns(server).routes()]
