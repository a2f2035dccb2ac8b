"""The ASGI application: every endpoint, with its limits, errors and description.

uvicorn.run(create_app(Service(openglm.load())))
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, RedirectResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openglm import __version__
from openglm.server import (
    agent_api,
    completions_api,
    embeddings_api,
    fill_api,
    images_api,
    messages_api,
    responses_api,
    text_api,
)
from openglm.server.errors import ApiError, add_handlers
from openglm.server.files import add_files
from openglm.server.limits import HostCheck, Lease, read_body
from openglm.server.metrics import CONTENT_TYPE
from openglm.server.protocol import ChatRequest, CompletionRequest, Model
from openglm.server.responses_input import ResponsesRequest
from openglm.server.service import Service
from openglm.server.sse import ClientGone, EventStream
from openglm.server.static import REFERENCE, WEB, Page

__all__ = ["POSTS", "create_app"]

Handler = Callable[[Service, Request, bytes, Lease], Awaitable[Response]]
# (path, handler, model of the body, whether it makes the model work)
POSTS: tuple[tuple[str, Handler, type[Model]], ...] = (
    ("/v1/chat/completions", agent_api.chat_completions, ChatRequest),
    ("/v1/responses", responses_api.responses, ResponsesRequest),
    ("/v1/completions", completions_api.completions, CompletionRequest),
    ("/v1/embeddings", embeddings_api.embeddings, embeddings_api.EmbeddingsRequest),
    ("/v1/images/generations", images_api.generations, images_api.ImagesRequest),
    ("/v1/messages", messages_api.messages, messages_api.MessagesRequest),
    ("/v1/messages/count_tokens", messages_api.count_tokens, messages_api.CountRequest),
    ("/fill", fill_api.fill, fill_api.FillRequest),
    ("/v1/agent/approvals", agent_api.approvals, agent_api.ApprovalRequest),
    ("/tokenize", text_api.tokenize, text_api.TokenizeRequest),
    ("/detokenize", text_api.detokenize, text_api.DetokenizeRequest),
    ("/render", text_api.render, text_api.RenderRequest),
)
CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that went away; no one sees it but the metrics


def create_app(service: Service, web: Path | None = WEB) -> FastAPI:
    """web: folder of the page at /; None, or one that does not exist: no page."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.start())
        yield
        await service.stop()
        if not loading.done():
            loading.cancel()

    app = FastAPI(title="OpenGLM", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    add_handlers(app)
    for path, handler, kind in POSTS:
        _add_post(app, service, path, handler, kind)
    _add_gets(app, service)
    add_files(app, service.files, service.gate.identify, ERRORS)
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]
    app.add_route("/docs", lambda request: RedirectResponse("docs/"), include_in_schema=False)
    app.mount("/docs", Page(REFERENCE), name="docs")
    if web is not None and (web / "index.html").is_file():
        _add_page(app, Page(web))
    app.add_middleware(Watch, service=service)
    if service.config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.config.cors_origins), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # clients in a browser send many of their own, such as x-stainless-lang
            expose_headers=["x-request-id", "request-id", "retry-after"],
        )  # fmt: skip
    app.add_middleware(HostCheck, config=service.config)
    return app


def _add_page(app: FastAPI, page: Page) -> None:
    """What no route is for is a file of the page. (A mount at / would hide that a path wants another method.)"""
    nothing = app.router.default

    async def default(scope: Scope, receive: Receive, send: Send) -> None:
        await (page if scope["type"] == "http" else nothing)(scope, receive, send)

    app.router.default = default


def _add_post(app: FastAPI, service: Service, path: str, handler: Handler, kind: type[Model]) -> None:
    async def endpoint(request: Request) -> Response:
        lease = service.gate.enter(request)
        try:
            body = await read_body(request, service.config.max_body_bytes)
            await service.ready()
            response = await handler(service, request, body, lease)
        except ValueError as error:  # of the layers below: what the user asked for cannot be done
            lease.release()
            raise ApiError(" ".join(str(error).split()), _param_in(str(error), kind)) from None
        except ClientGone:
            lease.release()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException:
            lease.release()
            raise
        if isinstance(response, EventStream):
            response.on_close(lease.release)
        else:
            lease.release()
        return response

    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    app.add_api_route(
        path, endpoint, methods=["POST"], name=handler.__name__, summary=(kind.__doc__ or path).strip(),
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
        responses=ERRORS, response_class=JSONResponse,
    )  # fmt: skip


def _param_in(message: str, kind: type[Model]) -> str | None:
    """The field that an error of a lower layer is about, by its first word."""
    word = message.split(" ", 1)[0].rstrip(":,")
    if word in kind.model_fields:
        return word
    known = {"max_new_tokens": ("max_tokens", "max_output_tokens"), "min_new_tokens": ("min_tokens",),
             "stop_strings": ("stop", "stop_sequences")}  # fmt: skip
    return next((name for name in known.get(word, ()) if name in kind.model_fields), None)


_ERROR = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field is wrong; `param` names it.", **_ERROR},
    401: {"description": "No valid API key.", **_ERROR},
    404: {"description": "No such model.", **_ERROR},
    408: {"description": "The body did not come.", **_ERROR},
    413: {"description": "The body is too large.", **_ERROR},
    415: {"description": "The body is not JSON.", **_ERROR},
    429: {"description": "Too many requests; Retry-After says when to come again.", **_ERROR},
    503: {"description": "Loading, or stopping.", **_ERROR},
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _add_gets(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", summary="The served model")
    async def list_models(request: Request) -> Response:
        service.gate.identify(request)
        return await text_api.models(service, None, "anthropic-version" in request.headers)

    @app.get("/v1/models/{name:path}", summary="The served model, by name")
    async def one_model(request: Request, name: str) -> Response:
        service.gate.identify(request)
        return await text_api.models(service, name, "anthropic-version" in request.headers)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="Whether requests are answered")
    async def health() -> Response:
        return await text_api.health(service)

    @app.get("/metrics", summary="Figures for Prometheus")
    async def metrics(request: Request) -> Response:
        service.gate.identify(request)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _description(app: FastAPI) -> dict[str, Any]:
    """openapi.json: FastAPI's, with the models of the bodies that we read ourselves."""
    if app.openapi_schema is None:
        value = get_openapi(title=app.title, version=app.version, routes=app.routes)
        template = "#/components/schemas/{model}"
        _, models = models_json_schema([(kind, "validation") for _, _, kind in POSTS], ref_template=template)
        schemas = value.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(models["$defs"])
        schemas["Error"] = ERROR_SCHEMA
        app.openapi_schema = value
    return app.openapi_schema


class Watch:
    """ASGI middleware: a number for each request, and its share of the metrics."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                anthropic = scope["path"].startswith("/v1/messages")
                name = "Request-Id" if anthropic else "X-Request-Id"  # as either's clients look for it
                MutableHeaders(scope=message).append(name, f"req_{secrets.token_hex(8)}")
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "page"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - start)
