"""Pictures from an endpoint that speaks OpenAI's images protocol: our own server, OpenAI, vLLM, LocalAI, ...

    backend = HttpImages("https://api.openai.com/v1?model=gpt-image-1")

The key comes from OPENGLM_IMAGE_API_KEY, for OpenAI's own address also from OPENAI_API_KEY.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import json
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urljoin, urlsplit

from openglm.agent.images import ImageRequest, ImageUnavailable, Picture, no_progress, read_picture

if TYPE_CHECKING:
    import httpx

__all__ = ["HttpImages"]

KEY_VARIABLE = "OPENGLM_IMAGE_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_PICTURE_BYTES = 32 << 20
TICK_S = 5.0  # between two words of progress


class HttpImages:
    """url: of the server, with or without /v1; ?model=NAME names the model, which some servers need.

    api_key: None takes it from the environment, "" sends none. timeout_s: longest silence of the server. Seeds, steps,
    guidance and negative prompts are sent as extensions where they are asked for: a server that does not know them
    refuses them.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        parts = urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ImageUnavailable(f"{url!r} is no address of an images endpoint: give one such as http://host:8000/v1")
        try:
            import httpx
            import PIL  # noqa: F401
        except ImportError as error:
            raise ImageUnavailable(f"pictures from a URL need {error.name}", "pip install 'openglm[image]'") from None
        path = parts.path.rstrip("/").removesuffix("/images/generations").rstrip("/")
        self.model = (parse_qs(parts.query).get("model") or [""])[0]
        self.url = parts._replace(path=f"{path or '/v1'}/images/generations", query="", fragment="").geturl()
        self._host = parts.netloc.rpartition("@")[2]  # shown: never a password
        if api_key is None:
            openai = os.environ.get("OPENAI_API_KEY", "") if parts.hostname == "api.openai.com" else ""
            api_key = os.environ.get(KEY_VARIABLE, "") or openai
        self._headers = {"Authorization": f"Bearer {api_key.strip()}"} if api_key.strip() else {}
        self._options: dict[str, Any] = {
            "timeout": httpx.Timeout(timeout_s, connect=10.0), "follow_redirects": False,
            "trust_env": parts.hostname not in LOOPBACK,  # no proxy leads back to this machine
        }  # fmt: skip

    @property
    def name(self) -> str:
        return self.model or self._host

    async def generate(self, asked: ImageRequest, on_progress: Callable[[str], None] = no_progress) -> list[Picture]:
        import httpx

        ticks = asyncio.ensure_future(self._tick(on_progress))
        try:
            async with httpx.AsyncClient(**self._options) as client:
                answer = await self._ask(client, asked)
                entries = answer.get("data")
                if not isinstance(entries, list) or not entries:
                    raise ImageUnavailable(f"{self._host} sent no pictures")
                return [await self._picture(client, entry, asked) for entry in entries[: asked.n]]
        except httpx.TimeoutException:
            raise ImageUnavailable(f"{self._host} did not answer in time") from None
        except httpx.HTTPError as error:
            raise ImageUnavailable(f"{self._host} cannot be reached: {error or type(error).__name__}") from None
        finally:
            ticks.cancel()

    async def _tick(self, on_progress: Callable[[str], None]) -> None:
        """The protocol says nothing until the pictures are there."""
        seconds = 0.0
        while True:
            on_progress(f"{self.name} draws" + (f", {seconds:.0f} s" if seconds else ""))
            await asyncio.sleep(TICK_S)
            seconds += TICK_S

    async def _ask(self, client: httpx.AsyncClient, asked: ImageRequest) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": asked.prompt, "n": asked.n, "response_format": "b64_json"}
        given = {
            "model": self.model or None, "size": asked.size and f"{asked.size[0]}x{asked.size[1]}", "seed": asked.seed,
            "steps": asked.steps, "guidance": asked.guidance, "negative_prompt": asked.negative_prompt or None,
        }  # fmt: skip
        body |= {name: value for name, value in given.items() if value is not None}
        status, data = await self._post(client, body, asked.n)
        if status == 400 and "response_format" in _message(data):  # gpt-image models know one form only
            del body["response_format"]
            status, data = await self._post(client, body, asked.n)
        if status != 200:
            text = f"{self._host} answered {status}: {_message(data) or 'no reason given'}"
            raise ValueError(text) if status in (400, 422) else ImageUnavailable(text)
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ImageUnavailable(f"{self._host} does not speak OpenAI's images protocol")
        return answer

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any], n: int) -> tuple[int, bytes]:
        async with client.stream("POST", self.url, json=body, headers=self._headers) as response:
            return response.status_code, await _read(response, n * MAX_PICTURE_BYTES * 4 // 3 + (1 << 20))

    async def _picture(self, client: httpx.AsyncClient, entry: Any, asked: ImageRequest) -> Picture:
        entry = entry if isinstance(entry, dict) else {}
        if isinstance(entry.get("b64_json"), str):
            try:
                data = base64.b64decode(entry["b64_json"], validate=True)
            except binascii.Error:
                raise ImageUnavailable(f"{self._host} sent a picture that is no base64") from None
        elif isinstance(entry.get("url"), str):
            data = await self._fetch(client, entry["url"])
        else:
            raise ImageUnavailable(f"{self._host} sent neither b64_json nor url")
        seed, drawn = entry.get("seed"), entry.get("revised_prompt")
        try:
            return await asyncio.to_thread(
                read_picture, data, asked, self.name, seed if isinstance(seed, int) else None,
                drawn if isinstance(drawn, str) else None,
            )  # fmt: skip
        except ValueError as error:
            raise ImageUnavailable(f"{self._host}: {error}") from None

    async def _fetch(self, client: httpx.AsyncClient, link: str) -> bytes:
        """A picture by its address: of the endpoint itself, or one of the public internet; no redirects, no key."""
        url = urljoin(self.url, link)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ImageUnavailable(f"{self._host} sent a link that is none to the web")
        if parts.netloc.rpartition("@")[2] != self._host and not await asyncio.to_thread(_is_public, parts.hostname):
            raise ImageUnavailable(f"{self._host} sent a link into a private network ({parts.hostname})")
        async with client.stream("GET", url) as response:
            if response.status_code != 200:
                raise ImageUnavailable(f"the picture at {parts.hostname} answered {response.status_code}")
            return await _read(response, MAX_PICTURE_BYTES)

    async def close(self) -> None:
        """Nothing is held between requests."""


async def _read(response: httpx.Response, limit: int) -> bytes:
    data = bytearray()
    async for piece in response.aiter_bytes():
        data += piece
        if len(data) > limit:
            raise ImageUnavailable(f"the answer is larger than {limit >> 20} MiB")
    return bytes(data)


def _message(data: bytes) -> str:
    """The words of an error, in OpenAI's shape or another's."""
    try:
        value = json.loads(data)
    except ValueError:
        return ""
    error = value.get("error", value) if isinstance(value, dict) else value
    text = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return " ".join(str(text or "").split())[:300]


def _is_public(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in found)
