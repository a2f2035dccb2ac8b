"""Answers that flow: server-sent events, and the watch for clients that go away.

A client that disconnects ends its request at once, streamed or not. A reader that takes nothing for `stall_s` seconds
counts as gone; no other reader notices, since each has its own connection, outlet and task.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from openglm.server.errors import OUR_FAULT, ApiError

__all__ = ["DONE", "ClientGone", "EventStream", "encode", "sse", "while_connected"]

log = logging.getLogger("openglm.server")
T = TypeVar("T")
_PING_S = 15.0  # silence after which a comment tells proxies and clients that the stream is alive
_PING = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"  # OpenAI's last event
HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientGone(Exception):
    """The client closed the connection: there is no one to answer."""


def encode(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def sse(value: Any, event: str | None = None) -> bytes:
    """One server-sent event. value: JSON, or a text as it is."""
    text = value if isinstance(value, str) else encode(value)
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {text}\n\n".encode()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled and ClientGone raised when the client goes away first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for waiting in (task, watch):
            if not waiting.done():
                waiting.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """chunks: pieces to send. error: how an ApiError in mid-stream is told. close: called once, however it ends."""

    def __init__(
        self, chunks: AsyncIterator[bytes], error: Callable[[ApiError], bytes], stall_s: float,
        close: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.status_code, self.background = 200, None
        self.raw_headers = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
        self._chunks, self._error, self._stall_s, self._closes = chunks, error, stall_s, [close]

    def on_close(self, close: Callable[[], None]) -> None:
        self._closes.append(close)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send_all(send))
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for close in self._closes:
                close()
            for task in (work, watch):
                if not task.done():
                    task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for piece in _with_pings(self._chunks):
                async with asyncio.timeout(self._stall_s):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": self._error(error), "more_body": True})
        except TimeoutError:
            log.warning("a reader took nothing for %.0f s and was dropped", self._stall_s)
            raise
        except Exception as error:
            log.error("a stream failed", exc_info=error)
            failure = self._error(ApiError(OUR_FAULT, None, 500))
            await send({"type": "http.response.body", "body": failure, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _with_pings(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The chunks, with a comment wherever none came for a while."""
    following: asyncio.Future[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(_next(chunks))
            done, _ = await asyncio.wait({following}, timeout=_PING_S)
            if not done:
                yield _PING
                continue
            try:
                piece = following.result()
            except _End:
                return
            following = None
            yield piece
    finally:
        if following is not None:
            following.cancel()


class _End(Exception):
    """The chunks are at their end: a future cannot hold a StopAsyncIteration."""


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    try:
        return await anext(chunks)
    except StopAsyncIteration:
        raise _End from None
