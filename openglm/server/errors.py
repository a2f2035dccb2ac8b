"""Errors as clients of OpenAI and Anthropic expect them, each naming the field that is wrong.

{"error": {"message": "...", "type": "invalid_request_error", "param": "messages[0].role", "code": null}}
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

__all__ = ["ApiError", "add_handlers", "error_response"]

log = logging.getLogger("openglm.server")
ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                   413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
OUR_FAULT = "the server failed on this request; its log says why"


class ApiError(Exception):
    """What a client is told. param: the field, such as "messages[0].content". status: of HTTP."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's: it tells by status and code what else there is to tell."""
        if self.status == 429:
            return "requests"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        named = f"{self.param}: {self.message}" if self.param and self.param not in self.message else self.message
        return {"type": "error", "error": {"type": kind, "message": named}}


def error_response(error: ApiError, path: str = "") -> JSONResponse:
    """In the shape that clients of this path expect."""
    body = error.anthropic_body() if path.startswith("/v1/messages") else error.body()
    return JSONResponse(body, error.status, error.headers)


def add_handlers(app: FastAPI) -> None:
    """Whatever is raised anywhere becomes one of the above."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error, request.url.path)

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        text = {404: f"there is nothing at {path}", 405: f"{path} does not take {request.method}"}
        message = text.get(error.status_code, str(error.detail))
        return error_response(ApiError(message, None, error.status_code, headers=error.headers), path)

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(ApiError(OUR_FAULT, None, 500), request.url.path)

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, unexpected)
