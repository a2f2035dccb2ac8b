"""The smaller endpoints: models, tokens and text both ways, prompts as the model sees them, health."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from openglm import __version__
from openglm.server.chat_api import to_messages
from openglm.server.errors import ApiError
from openglm.server.limits import Lease
from openglm.server.protocol import Model, RequestMessage, TokenId, Tool, load_json, parse
from openglm.server.service import Service
from openglm.types import ToolSpec

__all__ = [
    "DetokenizeRequest", "RenderRequest", "TokenizeRequest", "describe", "detokenize", "health", "models", "render",
    "tokenize",
]  # fmt: skip


class TokenizeRequest(Model):
    """The token ids of a text."""

    text: str
    model: str | None = None


class DetokenizeRequest(Model):
    """The text of token ids."""

    tokens: list[TokenId]
    model: str | None = None


class RenderRequest(Model):
    """A conversation as the model sees it, without running it."""

    messages: Annotated[list[RequestMessage], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_generation_prompt: bool | None = None
    model: str | None = None


async def tokenize(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(TokenizeRequest, load_json(body))
    service.check_name(asked.model)
    tokens = await asyncio.to_thread(service.model.tokenizer.encode, asked.text)
    return JSONResponse({"tokens": tokens, "count": len(tokens)})


async def detokenize(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(DetokenizeRequest, load_json(body))
    service.check_name(asked.model)
    tokenizer = service.model.tokenizer
    for i, token in enumerate(asked.tokens):
        if token >= tokenizer.vocab_size:
            raise ApiError(f"tokens[{i}]: ids are 0 to {tokenizer.vocab_size - 1}, not {token}", f"tokens[{i}]")
    text = await asyncio.to_thread(tokenizer.decode, asked.tokens, False)
    return JSONResponse({"text": text})


async def render(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    """ids, their text with specials by name, and which of them are training targets."""
    asked = parse(RenderRequest, load_json(body))
    service.check_name(asked.model)
    model = service.model
    messages = to_messages(asked.messages)
    functions = [tool.function for tool in asked.tools or ()]
    tools = [ToolSpec(f.name, f.description or "", f.parameters or {}) for f in functions]

    def work() -> dict[str, Any]:
        prompt = asked.add_generation_prompt is not False
        rendered = model.require_format().render(messages, tools, prompt)
        text = model.tokenizer.decode(rendered.ids, skip_special=False)
        return {"ids": rendered.ids, "text": text, "loss_mask": rendered.loss_mask, "count": len(rendered.ids)}

    return JSONResponse(await asyncio.to_thread(work))


# -------------------------------------------------------------------- what there is


def describe(service: Service) -> dict[str, Any]:
    """The served model, in OpenAI's shape and with what a client may want to know about it."""
    model = service.model
    chat_format = model.chat_format
    config = model.engine.config
    fills = config.mask == "prefix" and "[MASK]" in model.engine.special_ids and "<sop>" in model.engine.special_ids
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "openglm",
        "context_length": config.max_seq_len,
        "chat_format": None if chat_format is None else chat_format.name,
        "fills": fills,
        "thinks": chat_format is not None and chat_format.thinks_always,
        "images": service.images is not None,
        "tools": chat_format is not None and chat_format.call_style is not None,
        "all_tools": service.agents is not None,
        "server_tools": [] if service.agents is None else service.agents.names,
        "defaults": dict(model.meta.generation),
    }


async def models(service: Service, name: str | None = None, anthropic: bool = False) -> Response:
    """anthropic: in the shape of Anthropic's protocol, for clients that name its version."""
    await service.ready()
    service.check_name(name)
    found = describe(service)
    if anthropic:
        created = datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z")
        found |= {"type": "model", "display_name": service.name, "created_at": created}
        found |= {"max_input_tokens": found["context_length"]}
        whole = {"data": [found], "has_more": False, "first_id": service.name, "last_id": service.name}
        return JSONResponse(whole if name is None else found)
    return JSONResponse({"object": "list", "data": [found]} if name is None else found)


async def health(service: Service) -> Response:
    """200 when requests are answered at once, else 503 and the state: loading, failed, stopping."""
    value = {"status": service.state, "model": service.name, "version": __version__, "live": service.n_live}
    return JSONResponse(value, 200 if service.state == "ready" else 503)
