"""Gets the bytes at an address: each hop is checked, connects to the address that was checked, and is bounded.

    reply = await Fetcher(BrowserConfig()).get("https://example.org/")      # reply.status, reply.url, reply.body

Redirects are followed by hand. The connection goes to the IP address that the guard approved, with the host's name in
the Host header and in TLS, whose certificate is checked against it. Bodies are unpacked piece by piece up to a limit.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openglm.agent.browser.address import Blocked, Guard, Resolver, Target, resolve
from openglm.agent.browser.config import INSTALL, BrowserConfig, BrowserUnavailable

__all__ = ["FetchError", "Fetcher", "Reply"]

REDIRECTS = (301, 302, 303, 307, 308)
ACCEPT = "text/html,application/xhtml+xml,application/pdf,text/*;q=0.8,*/*;q=0.5"
ROBOTS_BYTES = 512_000
AGENT_TOKEN = "OpenGLM"  # by which a robots.txt names us
KEPT_HEADERS = ("content-type", "access-control-allow-origin", "access-control-allow-credentials", "content-language")


class FetchError(ValueError):
    """A page could not be had; one line that says why."""


@dataclass(frozen=True)
class Reply:
    """What came back. url: of the last hop. truncated: the body goes on. hops: addresses that led on, in order."""

    url: str
    status: int
    body: bytes
    headers: Mapping[str, str]
    truncated: bool = False
    hops: tuple[str, ...] = ()

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@functools.cache
def tls_context() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context(trust_env=False)


class Fetcher:
    """Fetches for one browser. May be used by several tasks and event loops: no connection outlives a call."""

    def __init__(self, config: BrowserConfig, resolver: Resolver = resolve) -> None:
        try:
            import httpx  # noqa: F401
        except ImportError:
            raise BrowserUnavailable(f"the browser needs httpx: {INSTALL}") from None
        self.config = config
        self.guard = Guard(config, resolver)
        self._robots: dict[str, Any] = {}

    async def get(self, url: str, accept: str = ACCEPT, robots: bool | None = None) -> Reply:
        """Blocked for what may not be opened, FetchError for what failed; both say why in one line."""
        try:
            async with asyncio.timeout(self.config.timeout_s):
                return await self._follow(url, accept, self.config.robots if robots is None else robots)
        except TimeoutError:
            raise FetchError(f"{url[:200]} did not answer in full within {self.config.timeout_s:g} s") from None

    async def _follow(self, url: str, accept: str, robots: bool) -> Reply:
        hops: list[str] = []
        while True:
            target = await self.guard.check(url)
            if robots:
                await self._check_robots(target)
            reply, location = await self._hop(target, accept, self.config.max_bytes)
            if location is None:
                return Reply(str(target.url), reply.status, reply.body, reply.headers, reply.truncated, tuple(hops))
            hops.append(str(target.url))
            url = self._next(target, location)
            if url in hops:
                raise FetchError(f"{hops[0]} redirects in a circle")
            if len(hops) > self.config.n_redirects:
                raise FetchError(f"{hops[0]} redirects more than {self.config.n_redirects} times")

    @staticmethod
    def _next(target: Target, location: str) -> str:
        import httpx

        try:
            following = target.url.join(location)
        except (httpx.InvalidURL, ValueError):
            raise FetchError(f"{target.url} redirects to an address that cannot be read") from None
        if target.url.scheme == "https" and following.scheme == "http":
            raise Blocked(f"{target.url} redirects from https to http, which is not followed")
        return str(Guard.parse(following))

    async def _hop(self, target: Target, accept: str, limit: int) -> tuple[Reply, str | None]:
        """One request to the first address of the host that can be connected to, and where it leads on."""
        import httpx

        headers = {
            "Host": target.url.netloc.decode("ascii"), "User-Agent": self.config.user_agent, "Accept": accept,
            "Accept-Language": "en,zh;q=0.9,*;q=0.5", "Accept-Encoding": "gzip, deflate", "Connection": "close",
        }  # fmt: skip
        context = tls_context()
        proxy = httpx.Proxy(self.config.proxy, ssl_context=context) if self.config.proxy else None
        failure = ""
        async with httpx.AsyncClient(
            verify=context, trust_env=False, proxy=proxy, follow_redirects=False, timeout=self.config.timeout_s
        ) as client:
            for address in target.addresses[:4]:
                request = client.build_request(
                    "GET", target.url.copy_with(host=address), headers=headers,
                    extensions={"sni_hostname": target.url.raw_host.decode("ascii")},
                )  # fmt: skip
                try:
                    response = await client.send(request, stream=True)
                except httpx.ConnectError as error:
                    failure = str(error)
                    continue
                except httpx.HTTPError as error:
                    raise FetchError(f"{target.url} gave no proper answer: {_said(error)}") from None
                try:
                    return await self._read(target, response, limit)
                finally:
                    await response.aclose()
        raise FetchError(f"{target.url} cannot be reached: {failure or 'no connection'}")

    async def _read(self, target: Target, response: Any, limit: int) -> tuple[Reply, str | None]:
        import httpx

        kept = {name: response.headers[name] for name in KEPT_HEADERS if name in response.headers}
        location = response.headers.get("location")
        if response.status_code in REDIRECTS and location:
            return Reply(str(target.url), response.status_code, b"", kept), location
        unpack = Unpacker(response.headers.get("content-encoding", ""), str(target.url))
        body, room = bytearray(), limit + 1
        try:
            async for piece in response.aiter_raw():
                body += unpack.feed(piece, room - len(body))
                if len(body) >= room:
                    break
        except (httpx.HTTPError, zlib.error) as error:
            if not body:
                raise FetchError(f"{target.url} broke off: {_said(error)}") from None
            return Reply(str(target.url), response.status_code, bytes(body[:limit]), kept, truncated=True), None
        return Reply(str(target.url), response.status_code, bytes(body[:limit]), kept, len(body) > limit), None

    async def _check_robots(self, target: Target) -> None:
        """Blocked where the site's robots.txt forbids the page. A site without one, or that fails, forbids nothing."""
        from protego import Protego

        origin = f"{target.url.scheme}://{target.url.netloc.decode('ascii')}"
        if origin not in self._robots:
            at = Target(target.url.join("/robots.txt"), target.host, target.port, target.addresses)
            try:
                reply, _ = await self._hop(at, "text/plain", ROBOTS_BYTES)
                text = reply.body.decode("utf-8", "replace") if reply.status == 200 else ""
            except FetchError:
                text = ""
            if len(self._robots) >= 512:
                self._robots.clear()
            self._robots[origin] = Protego.parse(text)
        if not self._robots[origin].can_fetch(str(target.url), AGENT_TOKEN):
            raise Blocked(f"{target.url} is not to be read by programs (robots.txt). Use another source.")


class Unpacker:
    """Undoes a content encoding piece by piece. FetchError for one that was not asked for."""

    def __init__(self, encoding: str, url: str) -> None:
        self.kind = encoding.strip().lower()
        if self.kind not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise FetchError(f"{url} is packed as {self.kind[:20]!r}, which was not asked for")
        self._packer: Any = None

    def feed(self, piece: bytes, limit: int) -> bytes:
        """At most `limit` bytes, which is above 0; those beyond are lost. zlib.error for what is not so packed."""
        if self.kind in ("", "identity"):
            return piece[:limit]
        if self._packer is None:
            # gzip or zlib by its header; some servers send "deflate" without one
            bare = self.kind == "deflate" and piece[:1] and piece[0] & 0x0F != 8
            self._packer = zlib.decompressobj(-15 if bare else 47)
        return self._packer.decompress(piece, limit)


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
