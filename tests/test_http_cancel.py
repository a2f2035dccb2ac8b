"""Answers left early, at a server and in a thread; any ChatBackend under asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import openglm
from openglm.agent.http_backend import HttpBackend, stream_async
from openglm.types import ChatBackend, Event, Message, Usage
from tests.http_helpers import Reply, chunk, scripted_server, sse

HELLO = [Message("user", "Hello!")]


def endless() -> Reply:
    return Reply(pieces=[sse(chunk({"content": "x"}))[0]] * 10_000, pause_s=0.01)


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "gave up waiting"
        time.sleep(0.01)


def test_leaving_ends_the_answer_at_the_server() -> None:
    async def leave(backend: HttpBackend) -> None:
        async with aclosing(stream_async(backend, HELLO)) as events:
            async for _ in events:
                break

    async def cancel(backend: HttpBackend) -> None:
        task = asyncio.ensure_future(leave_never(backend))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def leave_never(backend: HttpBackend) -> None:
        async with aclosing(backend.astream(HELLO)) as events:
            async for _ in events:
                pass

    with scripted_server(lambda body, headers: endless()) as server:
        backend = HttpBackend(server.url, "m")
        stream = backend.stream(HELLO)
        assert next(stream).text == "x"
        stream.close()  # type: ignore[attr-defined]
        wait_for(lambda: server.left == 1)
        asyncio.run(leave(backend))
        wait_for(lambda: server.left == 2)
        asyncio.run(cancel(backend))
        wait_for(lambda: server.left == 3)


class Counting:
    """A backend without astream: n events, then perhaps an error."""

    def __init__(self, n: int, error: Exception | None = None) -> None:
        self.n, self.error, self.given, self.closed = n, error, 0, False

    def stream(self, messages: Any, tools: Any = None, **sampling: Any) -> Iterator[Event]:
        try:
            for i in range(self.n):
                self.given += 1
                yield Event(str(i))
            if self.error:
                raise self.error
        finally:
            self.closed = True


def test_a_backend_without_asyncio_runs_in_a_thread() -> None:
    async def collect(backend: ChatBackend, most: int = 1000) -> list[str]:
        seen = []
        async with aclosing(stream_async(backend, HELLO)) as events:
            async for event in events:
                seen.append(event.text)
                if len(seen) == most:
                    break
        return seen

    assert asyncio.run(collect(Counting(50))) == [str(i) for i in range(50)]
    with pytest.raises(ValueError, match="too long"):
        asyncio.run(collect(Counting(3, ValueError("too long"))))
    left = Counting(10**9)
    assert asyncio.run(collect(left, 5)) == ["0", "1", "2", "3", "4"]
    wait_for(lambda: left.closed)
    assert left.given < 100, "it does not run far ahead"


def test_a_local_model_is_a_chat_backend(tiny_checkpoint: Path) -> None:
    model = openglm.load(tiny_checkpoint, device="cpu")
    backend: ChatBackend = model
    expected = list(backend.stream(HELLO, max_new_tokens=5, seed=1))

    async def collect() -> list[Event]:
        return [e async for e in stream_async(backend, HELLO, max_new_tokens=5, seed=1)]

    assert asyncio.run(collect()) == expected
    rendered = model.require_format().render(HELLO, []).ids
    n_drawn = sum(len(e.token_ids) for e in expected)
    assert expected[-1].usage == Usage(len(rendered), n_drawn) and n_drawn > 0
