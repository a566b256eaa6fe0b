"""Errors → HTTP statuses and bodies in the shape each protocol has for them.

OpenAI: ``{"error": {"message", "type", "param", "code"}}``; Ollama: ``{"error": message}``.
"""

from __future__ import annotations

import logging
import math

import msgspec
from starlette.responses import Response

from edge_gemma.errors import (
    ContextFull,
    EdgeGemmaError,
    MediaError,
    PlanRefused,
    ServiceBusy,
    UnsupportedModel,
    UsageError,
)

log = logging.getLogger("edge_gemma.serve")
_BAD_REQUEST = (UsageError, MediaError, UnsupportedModel, PlanRefused)


class Refusal(EdgeGemmaError):
    """A request that is answered with an HTTP error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.retry_after_s = retry_after_s


def refusal_of(error: BaseException) -> Refusal:
    """What a client is told of an error; the text of a fault of ours stays in the log."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ServiceBusy):
        status = 503 if error.retry_after_s is None else 429
        return Refusal(status, str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, ContextFull):
        return Refusal(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, _BAD_REQUEST):
        return Refusal(400, str(error))
    if isinstance(error, EdgeGemmaError):
        return Refusal(500, str(error))
    log.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed on this request; see its log")


def speaks_ollama(path: str) -> bool:
    return path == "/" or path.startswith("/api")


def error_object(path: str, refusal: Refusal) -> dict[str, object]:
    """The body of an error in the protocol of ``path``."""
    message = str(refusal)
    if speaks_ollama(path):
        return {"error": message}
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    detail = {
        "message": message,
        "type": kinds.get(refusal.status, kind),
        "param": refusal.param,
        "code": refusal.code,
    }
    return {"error": detail}


def refusal_response(path: str, refusal: Refusal) -> Response:
    headers = {}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refusal.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(refusal.retry_after_s))
    body = msgspec.json.encode(error_object(path, refusal))
    return Response(body, refusal.status, headers, "application/json")
