"""Who may call, how often and how much at once: API keys, rates, concurrency, the queue, sizes, host names.

Keys are compared in constant time, each with every known one, so that time tells nothing about them.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from openglm.server.config import LOOPBACK_NAMES, ServeConfig
from openglm.server.errors import ApiError, error_response

__all__ = ["Gate", "HostCheck", "Lease", "Turns", "read_body", "read_bytes"]

_BODY_S = 60.0  # a request's body must be here by then
_MAX_CALLERS = 4096  # whose rates are remembered


@dataclass
class _Caller:
    """tokens: of a bucket that fills at the allowed rate."""

    tokens: float
    at: float
    running: int = 0


class Lease:
    """A caller's place among the requests that run at once. To be given back once; doing it again is harmless."""

    def __init__(self, client: str, give_back: Callable[[], None]) -> None:
        self.client, self._give_back = client, give_back

    def release(self) -> None:
        give_back, self._give_back = self._give_back, lambda: None
        give_back()


class Gate:
    """clock: seconds, for tests."""

    def __init__(self, config: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._keys = [key.encode() for key in config.api_keys]
        self._callers: OrderedDict[str, _Caller] = OrderedDict()

    def identify(self, request: Request) -> str:
        """Whose request it is: a key's number, or an address where no keys are set. 401 without a valid key."""
        if not self._keys:
            return request.client.host if request.client else "local"
        given = _given_key(request)
        found = None
        for number, key in enumerate(self._keys):
            if hmac.compare_digest(given, key):
                found = number
        if found is None:
            what = "this API key is not valid" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(what, None, 401, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        return f"key{found}"

    def enter(self, request: Request) -> Lease:
        """Let a request in that makes the model work: 401, or 429 with Retry-After."""
        name, now, config = self.identify(request), self._clock(), self._config
        caller = self._callers.pop(name, None)
        if caller is None:
            caller = _Caller(float(config.requests_per_minute), now)
        self._callers[name] = caller
        if config.concurrency and caller.running >= config.concurrency:
            raise ApiError(
                f"{caller.running} requests of this caller are running, and no more may at once: wait for one to end",
                None, 429, "concurrency_limit_exceeded", {"Retry-After": "1"},
            )  # fmt: skip
        if config.requests_per_minute:
            rate = config.requests_per_minute / 60.0
            filled = min(caller.tokens + (now - caller.at) * rate, float(config.requests_per_minute))
            caller.tokens, caller.at = filled, now
            if filled < 1.0:
                wait = math.ceil((1.0 - filled) / rate)
                raise ApiError(
                    f"more than {config.requests_per_minute} requests in a minute: try again in {wait} s",
                    None, 429, "rate_limit_exceeded", {"Retry-After": str(wait)},
                )  # fmt: skip
            caller.tokens -= 1.0
        caller.running += 1
        self._forget()
        return Lease(name, lambda: self._leave(caller))

    def _leave(self, caller: _Caller) -> None:
        caller.running -= 1

    def _forget(self) -> None:
        """Addresses come and go: the longest unseen are dropped, unless they have something running."""
        if len(self._callers) > _MAX_CALLERS:
            for name in [n for n, c in self._callers.items() if not c.running][: len(self._callers) - _MAX_CALLERS]:
                del self._callers[name]


class Turns:
    """One at a time, in the order of arrival, and at most so many waiting: 429 beyond. `async with turns: ...`"""

    def __init__(self, max_waiting: int) -> None:
        self._lock, self._max, self.n_inside = asyncio.Lock(), max_waiting, 0

    async def __aenter__(self) -> None:
        if self.n_inside > self._max:
            text = f"{self.n_inside} requests are running or waiting, and no more may: try again shortly"
            raise ApiError(text, None, 429, "queue_full", {"Retry-After": "5"})
        self.n_inside += 1
        try:
            await self._lock.acquire()
        except BaseException:
            self.n_inside -= 1
            raise

    async def __aexit__(self, *error: object) -> None:
        self.n_inside -= 1
        self._lock.release()


def _given_key(request: Request) -> bytes:
    """The key of a request, as OpenAI's clients send it or as Anthropic's do."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = request.headers.get("x-api-key", "")
    return key.strip().encode("utf-8", "surrogateescape")


async def read_body(request: Request, limit: int) -> bytes:
    """The body; 413 for one of more than `limit` bytes, 408 for one that does not come, 415 if it is not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError("the body must be JSON, with the header Content-Type: application/json", None, 415)
    return await read_bytes(request, limit)


async def read_bytes(request: Request, limit: int) -> bytes:
    """The body, whatever it is; 413 for one of more than `limit` bytes, 408 for one that does not come."""
    too_large = ApiError(f"the body is larger than {limit} bytes", None, 413, "request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(f"the body was not here within {_BODY_S:.0f} s", None, 408) from None
    return bytes(body)


class HostCheck:
    """ASGI middleware: an open server that only this machine can reach answers under names of this machine alone.

    Otherwise any web page could reach it through a name of its own that points here.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        names = {*LOOPBACK_NAMES, "127.0.0.1", "[::1]", config.host, *config.allowed_hosts}
        self._names = names if config.is_loopback and not config.api_keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._names is not None and scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name.lower() not in self._names:
                text = f"this server does not answer under the name {name!r}: start it with --allow-host {name}"
                await error_response(ApiError(text, None, 403), scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)
