"""POST /v1/embeddings: the mean of a text's hidden states, of length 1."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from openglm.server.errors import ApiError
from openglm.server.limits import Lease
from openglm.server.protocol import Model, TokenId, load_json, parse
from openglm.server.service import Service
from openglm.server.sse import while_connected

__all__ = ["EmbeddingsRequest", "embeddings"]

_MAX_INPUTS = 256


class EmbeddingsRequest(Model):
    """Texts to vectors of length 1."""

    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None


async def embeddings(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(EmbeddingsRequest, load_json(body))
    service.check_name(asked.model)
    engine = service.model.engine
    if asked.dimensions not in (None, engine.config.dim):
        raise ApiError(f"dimensions: embeddings of this model have {engine.config.dim}", "dimensions")
    inputs = await asyncio.to_thread(_ids, service, asked)
    return await while_connected(request, _answer(service, asked, inputs))


async def _answer(service: Service, asked: EmbeddingsRequest, inputs: list[list[int]]) -> Response:
    engine, data = service.model.engine, []
    for index, ids in enumerate(inputs):
        vector = await service.worker.call(lambda ids=ids: engine.embed(ids).cpu().numpy())  # type: ignore[misc]
        value: Any = vector.tolist()
        if asked.encoding_format == "base64":
            value = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": value})
    n_tokens = sum(map(len, inputs))
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})


def _ids(service: Service, asked: EmbeddingsRequest) -> list[list[int]]:
    model, given = service.model, asked.input
    items: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not items or len(items) > _MAX_INPUTS:
        raise ApiError(f"input: 1 to {_MAX_INPUTS} texts, not {len(items)}", "input")
    found = []
    room = model.engine.config.max_seq_len - 2  # for the marks behind a text
    for i, item in enumerate(items):
        where = "input" if item is given else f"input[{i}]"
        ids = model.tokenizer.encode(item) if isinstance(item, str) else list(item)
        if not ids:
            raise ApiError(f"{where}: it is empty", where)
        if max(ids) >= model.tokenizer.vocab_size:
            raise ApiError(f"{where}: token ids are 0 to {model.tokenizer.vocab_size - 1}, not {max(ids)}", where)
        if len(ids) > room:
            raise ApiError(f"{where}: it has {len(ids)} tokens, and may have {room}", where, 400,
                           "context_length_exceeded")  # fmt: skip
        found.append(ids)
    return found
