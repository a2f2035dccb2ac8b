"""Which addresses may be opened: a URL is checked by its text, its host by the addresses it resolves to.

    guard = Guard(BrowserConfig(allow=("127.0.0.1:8000",)))
    target = await guard.check("http://example.org/page")     # target.addresses: the only ones to connect to

A host whose name leads to a private, loopback, link-local, shared, multicast or metadata address is refused unless it
is on the list. Who connects uses the addresses of the answer, so that a second look-up cannot give others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from openglm.agent.browser.config import BrowserConfig
from openglm.agent.browser.rules import IpAddress, Rules

if TYPE_CHECKING:
    import httpx

__all__ = ["Blocked", "Guard", "Target", "is_public", "resolve"]

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
MAX_URL = 4096
HOST = re.compile(rb"[A-Za-z0-9._:-]+")

# Not public though ipaddress may say so: protocol assignments, a cloud's own services, relays, translation in a site.
SPECIAL = tuple(
    ipaddress.ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "64:ff9b:1::/48", "100::/64", "fec0::/10")
)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
V4_COMPATIBLE = ipaddress.ip_network("::/96")


class Blocked(ValueError):
    """An address that may not be opened; says why."""


def inner_v4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for, if any."""
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour
    if address.teredo:
        return address.teredo[1]
    if address in NAT64 or (address in V4_COMPATIBLE and int(address) > 0xFFFF):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def is_public(address: IpAddress) -> bool:
    """Whether the address is of the open internet, whatever it is wrapped in."""
    if isinstance(address, ipaddress.IPv6Address) and (inner := inner_v4(address)) is not None:
        return is_public(inner)
    if any(address.version == network.version and address in network for network in SPECIAL):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved and not address.is_unspecified


@dataclass(frozen=True)
class Target:
    """An address that was found fit to open. addresses: of its host, in the order in which to try them."""

    url: httpx.URL
    host: str
    port: int
    addresses: tuple[str, ...]


async def resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


class Guard:
    """Decides what may be opened. resolver: gives the addresses of a host."""

    def __init__(self, config: BrowserConfig, resolver: Resolver = resolve) -> None:
        self.config, self.resolver = config, resolver
        self.allow, self.only = Rules(config.allow), Rules(config.only)

    async def check(self, text: str | httpx.URL) -> Target:
        """Blocked, a ValueError of one line, for what may not be opened or leads nowhere."""
        url = self.parse(text)
        host = url.host.lower().rstrip(".")
        port = url.port or (443 if url.scheme == "https" else 80)
        listed = self.allow.has_host(host, port)
        if self.config.ports and port not in self.config.ports and not (listed or self._literal_allowed(host)):
            ports = ", ".join(map(str, self.config.ports))
            raise Blocked(f"{shown(url)} is blocked: port {port} is not one of {ports}")
        try:
            found = await self.resolver(host, port)
        except (OSError, UnicodeError):
            raise Blocked(f"no such host: {host!r}. Check the address, or search for the page.") from None
        addresses = [ipaddress.ip_address(address.split("%")[0]) for address in found]
        if not addresses:
            raise Blocked(f"no such host: {host!r}. Check the address, or search for the page.")
        self._check_only(url, host, port, addresses)
        if not listed:
            for address in addresses:
                if not is_public(address) and not self.allow.has_address(address):
                    raise Blocked(f"{shown(url)} is blocked: it leads to {address}, which is no public address")
        return Target(url, host, port, tuple(map(str, addresses)))

    def _check_only(self, url: httpx.URL, host: str, port: int, addresses: Sequence[IpAddress]) -> None:
        if self.only and not self.only.has_host(host, port) and not all(map(self.only.has_address, addresses)):
            names = ", ".join([name for name, _ in self.only.hosts] + list(map(str, self.only.networks)))
            raise Blocked(f"{shown(url)} is blocked: only {names} may be opened")

    def _literal_allowed(self, host: str) -> bool:
        try:
            return self.allow.has_address(ipaddress.ip_address(host.strip("[]")))
        except ValueError:
            return False

    @staticmethod
    def parse(text: str | httpx.URL) -> httpx.URL:
        """The URL without its fragment; Blocked for anything but a plain http or https address."""
        import httpx

        if isinstance(text, str):
            text = text.strip()
            if len(text) > MAX_URL:
                raise Blocked(f"the address is too long: {len(text)} characters, at most {MAX_URL}")
            if "://" not in text and not text.startswith(("data:", "javascript:", "file:", "mailto:", "about:")):
                text = f"https://{text}"
        try:
            url = httpx.URL(text)
            host = url.host
        except (httpx.InvalidURL, UnicodeError, ValueError):
            refuse(str(text), "it is no valid address")
        if url.scheme not in ("http", "https"):
            refuse(str(text), f"{url.scheme or 'no scheme'} is not http or https")
        if url.userinfo:
            refuse(shown(url), "it has a user name in it")
        if not host:
            refuse(str(text), "it has no host")
        if not HOST.fullmatch(url.raw_host):
            refuse(shown(url), "it is no valid address")
        return url.copy_with(fragment=None)


def shown(url: httpx.URL) -> str:
    return str(url.copy_with(userinfo=b""))


def refuse(text: str, why: str) -> NoReturn:
    raise Blocked(f"{text[:200]!r} cannot be opened: {why}. Give an address such as https://example.org/page.")
