"""A load on any OpenAI-compatible server: many clients that stream at once, each answer compared with its solo answer.

    result = asyncio.run(run_load("http://127.0.0.1:8000/v1", clients=64, seconds=30.0))

Each client asks greedily, one request after the other, from a list of prompts whose answers were asked for alone
before; an answer that differs was mixed up with another, or lost.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import urllib.parse
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PROMPTS", "Load", "run_load"]

PROMPTS = tuple(
    f"{ask} {thing}."
    for thing in ("the sea", "a small town", "mathematics", "bread", "the moon", "an old clock", "winter", "a teacher")
    for ask in ("Tell me about", "Write two sentences about", "What do people like about", "Give a fact about")
)


@dataclass
class Load:
    """Seconds, except where named otherwise. between: from one piece of text to the next."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    n_requests: int = 0
    n_tokens: int = 0
    n_different: int = 0
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        return {
            "requests": self.n_requests,
            "requests_per_s": self.n_requests / self.seconds,
            "tokens_per_s": self.n_tokens / self.seconds,
            "errors": len(self.errors),
            "different": self.n_different,
            "first_error": self.errors[0] if self.errors else None,
            **{f"ttft_{name}_s": value for name, value in _percentiles(self.first).items()},
            **{f"itl_{name}_s": value for name, value in _percentiles(self.between).items()},
        }


def _percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("p50", "p95", "p99"), values[0] if values else 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


async def run_load(
    base_url: str, clients: int = 64, seconds: float = 30.0, max_tokens: int = 32, model: str | None = None,
    key: str = "", compare: bool = True,
) -> Load:  # fmt: skip
    """compare: ask every prompt alone first, and count answers that differ under load."""
    load, solo = Load(), {}
    if compare:
        for prompt in PROMPTS:
            solo[prompt] = await _answer(base_url, prompt, max_tokens, model, key, Load())
    start = time.perf_counter()
    await asyncio.gather(
        *(_client(base_url, i, start + seconds, max_tokens, model, key, load, solo) for i in range(clients))
    )
    load.seconds = time.perf_counter() - start
    return load


async def _client(
    base_url: str, number: int, end: float, max_tokens: int, model: str | None, key: str, load: Load,
    solo: dict[str, str],
) -> None:  # fmt: skip
    turn = number
    while time.perf_counter() < end:
        prompt, turn = PROMPTS[turn % len(PROMPTS)], turn + 5
        try:
            text = await _answer(base_url, prompt, max_tokens, model, key, load)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            load.errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.05)
            continue
        load.n_requests += 1
        load.n_different += bool(solo) and text != solo[prompt]


async def _answer(base_url: str, prompt: str, max_tokens: int, model: str | None, key: str, load: Load) -> str:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0,
            "stream": True} | ({"model": model} if model else {})  # fmt: skip
    pieces: list[str] = []
    sent = last = time.perf_counter()
    finished = None
    async for data in _events(f"{base_url}/chat/completions", body, key):
        value = json.loads(data)
        if "error" in value:
            raise ValueError(str(value["error"]))
        for choice in value["choices"]:
            finished = choice.get("finish_reason") or finished
            if text := choice["delta"].get("content"):
                now = time.perf_counter()
                (load.between if pieces else load.first).append(now - (last if pieces else sent))
                last = now
                pieces.append(text)
                load.n_tokens += 1
    if finished is None:
        raise ValueError("the stream ended without a finish reason")
    return "".join(pieces)


async def _events(url: str, body: dict[str, Any], key: str) -> AsyncIterator[str]:
    """Data of the server-sent events, over a connection of its own: plain sockets, so that the client costs little."""
    parts = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    try:
        data = json.dumps(body).encode()
        auth = f"Authorization: Bearer {key}\r\n" if key else ""
        writer.write(
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n{auth}"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
            + data
        )
        await writer.drain()
        status = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0]
        if b" 200 " not in status + b" ":
            rest = await reader.read(2000)
            raise ValueError(f"{status.decode()} {rest.decode('utf-8', 'replace')}")
        while line := await reader.readline():  # lines of the chunked encoding begin with no "data:"
            if line.startswith(b"data:"):
                text = line[5:].decode().strip()
                if text == "[DONE]":
                    return
                yield text
    finally:
        writer.close()
