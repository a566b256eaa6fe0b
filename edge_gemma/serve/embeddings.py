"""Texts → vectors by both protocols: /v1/embeddings, and Ollama's /api/embed and /api/embeddings.

In: texts. Out: vectors of length 1, as the model's own library makes them. Only a bundle that
embeds has them; another refuses.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_gemma.bundles.manifest import require_embedding
from edge_gemma.serve.bodies import Server, decoded, json_response, unless_gone, warn_ignored
from edge_gemma.serve.refusals import Refusal

MAX_TEXTS = 2048  # OpenAI's own bound
_NS = 1_000_000_000


class OpenAIBody(msgspec.Struct):
    model: str
    input: str | list[str | int | list[int]]
    dimensions: int | None = None
    encoding_format: str | None = None


class OllamaBody(msgspec.Struct):
    model: str
    input: str | list[str] = []
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: float | str | None = None
    options: dict[str, object] | None = None


class OldOllamaBody(msgspec.Struct):
    model: str
    prompt: str = ""
    keep_alive: float | str | None = None
    options: dict[str, object] | None = None


class Embeddings:
    def __init__(self, server: Server):
        self._server = server

    def routes(self) -> list[Route]:
        return [
            Route("/v1/embeddings", self.openai, methods=["POST"]),
            Route("/api/embed", self.ollama, methods=["POST"]),
            Route("/api/embeddings", self.old_ollama, methods=["POST"]),
        ]

    async def openai(self, request: Request) -> Response:
        body = decoded(await request.body(), OpenAIBody)
        texts = _texts(body.input)
        if body.encoding_format not in (None, "float", "base64"):
            raise Refusal(
                400,
                f"encoding_format is {body.encoding_format[:100]!r}; expected float or base64",
                param="encoding_format",
            )
        vectors = await self._embed(request, body.model, texts, body.dimensions, truncate=False)
        as_base64 = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _base64(vector) if as_base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        n_tokens = self._n_tokens(texts)
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        answer = {"object": "list", "data": data, "model": self._server.name, "usage": usage}
        return json_response(answer)

    async def ollama(self, request: Request) -> Response:
        began = time.perf_counter()
        body = decoded(await request.body(), OllamaBody)
        warn_ignored("/api/embed", list(body.options or ()))
        texts = [body.input] if isinstance(body.input, str) else body.input
        truncate = body.truncate is not False
        vectors = await self._embed(
            request,
            body.model,
            texts,
            body.dimensions,
            truncate=truncate,
            may_be_empty=True,
            keep_alive=body.keep_alive,
        )
        return json_response(
            {
                "model": self._server.name,
                "embeddings": vectors.tolist(),
                "total_duration": int((time.perf_counter() - began) * _NS),
                "load_duration": 0,
                "prompt_eval_count": self._n_tokens(texts),
            }
        )

    async def old_ollama(self, request: Request) -> Response:
        body = decoded(await request.body(), OldOllamaBody)
        warn_ignored("/api/embeddings", list(body.options or ()))
        texts = [body.prompt] if body.prompt else []
        vectors = await self._embed(
            request,
            body.model,
            texts,
            None,
            truncate=True,
            may_be_empty=True,
            keep_alive=body.keep_alive,
        )
        return json_response({"embedding": vectors[0].tolist() if len(vectors) else []})

    async def _embed(
        self,
        request: Request,
        model: str,
        texts: Sequence[str],
        dimensions: int | None,
        *,
        truncate: bool,
        may_be_empty: bool = False,  # an empty list asks Ollama to load the model
        keep_alive: float | str | None = None,
    ) -> np.ndarray:
        await self._server.have_model(model, keep_alive)
        part = require_embedding(self._server.manifest)
        if len(texts) > MAX_TEXTS or not (texts or may_be_empty):
            raise Refusal(
                400, f"{len(texts)} texts; expected 1 … {MAX_TEXTS} a request", param="input"
            )
        if not texts:
            return np.empty((0, part.width), np.float32)
        self._server.service.check_texts(texts)
        embedding = self._server.service.embed(texts, dimensions=dimensions, truncate=truncate)
        return await unless_gone(request, embedding)

    def _n_tokens(self, texts: Sequence[str]) -> int:
        decoder = self._server.service.model.decoder
        return sum(len(decoder.tokenize(text, True)) for text in texts)


def _texts(given: str | list[str | int | list[int]]) -> list[str]:
    if isinstance(given, str):
        return [given]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise Refusal(
            400,
            "input holds token ids; a client makes them with OpenAI's tokenizer, and they mean "
            "other texts here: send text (langchain: check_embedding_ctx_length=False)",
            param="input",
        )
    return texts


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
