"""What the browser may fetch: addresses, redirects, rebinding, robots, sizes, times, encodings of the transport.

python -m pytest tests/test_browser_safety.py
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs the extra agent")

from openglm.agent.browser.address import Blocked, Guard, is_public
from openglm.agent.browser.config import BrowserConfig
from openglm.agent.browser.fetch import Fetcher, FetchError
from openglm.agent.browser.rules import Rules
from openglm.agent.browser.site import SiteServer
from tests.site_server import TroubleHandler


@pytest.fixture(scope="module")
def site() -> Iterator[SiteServer]:
    with SiteServer(TroubleHandler) as server:
        yield server


def fetcher(site: SiteServer, **options: Any) -> Fetcher:
    merged: dict[str, Any] = {"allow": (site.host,), "timeout_s": 20.0} | options
    return Fetcher(BrowserConfig(**merged))


def check(url: str, *, found: Sequence[str] = (), **options: Any) -> Any:
    """The guard's word on a URL; `found` are the addresses of its host, else the system is asked."""

    async def resolver(host: str, port: int) -> Sequence[str]:
        return found

    guard = Guard(BrowserConfig(**options), resolver) if found else Guard(BrowserConfig(**options))
    return asyncio.run(guard.check(url))


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.254", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
    "255.255.255.255", "168.63.129.16", "192.0.2.1", "203.0.113.9", "::", "::1", "fe80::1", "fc00::1", "fd00:ec2::254",
    "ff02::1", "fec0::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "::7f00:1",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
])  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(Blocked, match="no public address"):
        check("http://somewhere.example/", found=[address])


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "1.1.1.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:808:808"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
    target = check("http://somewhere.example/a?b=1#c", found=[address])
    assert target.addresses == (address,) and str(target.url) == "http://somewhere.example/a?b=1"


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/", "http://localhost/", "http://2130706433/", "http://0x7f000001/", "http://127.1/", "http://0/",
    "http://[::1]/", "http://[::ffff:7f00:1]/", "http://0177.0.0.1/", "https://127.0.0.1/", "HTTP://LOCALHOST/",
])  # fmt: skip
def test_loopback_in_every_spelling_is_blocked(url: str) -> None:
    with pytest.raises(Blocked):
        check(url)


@pytest.mark.parametrize(("url", "why"), [
    ("file:///etc/passwd", "not http"), ("ftp://example.org/", "not http"), ("gopher://example.org/", "not http"),
    ("data:text/html,hello", "not http"), ("javascript:alert(1)", "not http"), ("about:blank", "not http"),
    ("http://user:secret@example.org/", "user name"), ("http://example.org@evil.example/", "user name"),
    ("http://", "no host"), ("http:///path", "no host"), ("http://exa mple.org/", "valid address"),
    ("http://example.org:22/", "port 22"), ("http://example.org:6379/", "port 6379"),
    ("http://example.org/" + "a" * 5000, "too long"), ("http://example.org\r\nX: y/", "valid address"),
])  # fmt: skip
def test_urls_that_are_refused_by_their_text(url: str, why: str) -> None:
    with pytest.raises(Blocked, match=why) as caught:
        check(url, found=["93.184.216.34"])
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_one_private_address_among_public_ones_is_enough() -> None:
    with pytest.raises(Blocked, match="10.0.0.7"):
        check("http://mixed.example/", found=["93.184.216.34", "10.0.0.7"])


def test_the_list_of_what_is_allowed() -> None:
    assert check("http://wiki.intranet.example/", found=["10.0.0.7"], allow=("*.intranet.example",)).host
    assert check("http://a.example/", found=["10.0.0.7"], allow=("10.0.0.0/8",)).host
    assert check("http://a.example:8000/", found=["10.0.0.7"], allow=("a.example:8000",)).host
    assert check("http://10.0.0.7:9999/", found=["10.0.0.7"], allow=("10.0.0.0/8",)).port == 9999
    with pytest.raises(Blocked):
        check("http://a.example/", found=["10.0.0.7"], allow=("a.example:8000",))
    with pytest.raises(Blocked):
        check("http://intranet.example.evil.org/", found=["10.0.0.7"], allow=("*.intranet.example",))
    with pytest.raises(Blocked, match="only a.example"):
        check("http://b.example/", found=["93.184.216.34"], only=("a.example",))
    assert check("http://a.example/", found=["93.184.216.34"], only=("a.example",)).host
    assert check("http://b.example:77/", found=["93.184.216.34"], ports=()).port == 77
    assert Rules(["[::1]:80"]).has_host("::1", 80) and not Rules(["[::1]:80"]).has_host("::1", 81)
    for wrong in ("http://a.example/", "a.example:99999", "", "a b"):
        with pytest.raises(ValueError, match="no host"):
            BrowserConfig(allow=(wrong,))


def test_unknown_hosts_are_told_of() -> None:
    async def nowhere(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror("no")

    with pytest.raises(Blocked, match="no such host"):
        asyncio.run(Guard(BrowserConfig(), nowhere).check("http://nowhere.example/"))


def test_a_page_is_fetched_and_redirects_are_followed(site: SiteServer) -> None:
    reply = asyncio.run(fetcher(site).get(site.url + "chain?n=3"))
    assert reply.status == 200 and reply.url == site.url + "en/ferry.html" and len(reply.hops) == 4
    assert b"Grey Seal" in reply.body and reply.content_type == "text/html"


@pytest.mark.parametrize(("path", "why"), [
    ("loop", "in a circle"), ("chain?n=20", "more than 8 times"), ("to?url=http://10.0.0.1/", "no public address"),
    ("to?url=http://169.254.169.254/latest/meta-data/", "no public address"), ("to?url=file:///etc/passwd", "not http"),
    ("to?url=//127.0.0.1:1/", "port 1"), ("to?url=http://[::1]/", "no public address"),
    ("to?url=http://u:p@example.org/", "user name"), ("odd-packing", "packed as"),
])  # fmt: skip
def test_redirects_and_answers_that_are_refused(site: SiteServer, path: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        asyncio.run(fetcher(site).get(site.url + path))


def test_the_connection_goes_to_the_address_that_was_checked(site: SiteServer) -> None:
    """A host whose second look-up leads elsewhere (rebinding) is asked for only once, and connected to as checked."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"], ["10.0.0.1"]])

    async def resolver(host: str, port: int) -> Sequence[str]:
        return next(answers)

    config = BrowserConfig(allow=(f"rebind.example:{site.port}",), robots=False)
    TroubleHandler.seen.clear()
    reply = asyncio.run(Fetcher(config, resolver).get(f"http://rebind.example:{site.port}/en/ferry.html"))
    assert reply.status == 200 and reply.url.startswith("http://rebind.example")
    assert TroubleHandler.seen[0][1]["Host"] == f"rebind.example:{site.port}"
    assert next(answers) == ["10.0.0.1"]


def test_tls_is_checked_against_the_name_not_the_address() -> None:
    """The server sees the host's name in the handshake though the connection goes to an address."""
    names: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            names.append(connection.recv(4096))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    port = listener.getsockname()[1]

    async def resolver(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    config = BrowserConfig(allow=(f"secure.example:{port}",), robots=False, timeout_s=10)
    with pytest.raises(FetchError):
        asyncio.run(Fetcher(config, resolver).get(f"https://secure.example:{port}/"))
    thread.join(10)
    listener.close()
    assert b"secure.example" in names[0]


def test_https_is_not_left_for_http() -> None:
    from openglm.agent.browser.address import Target

    target = Target(Guard.parse("https://example.org/a"), "example.org", 443, ("93.184.216.34",))
    with pytest.raises(Blocked, match="from https to http"):
        Fetcher._next(target, "http://example.org/b")
    assert Fetcher._next(target, "/b?c=1#d") == "https://example.org/b?c=1"


def test_time_and_size_are_bounded(site: SiteServer) -> None:
    with pytest.raises(FetchError, match="within 0.5 s"):
        asyncio.run(fetcher(site, timeout_s=0.5, robots=False).get(site.url + "slow"))
    for path in ("huge", "bomb"):
        reply = asyncio.run(fetcher(site, max_bytes=100_000).get(site.url + path))
        assert reply.truncated and len(reply.body) == 100_000
    assert b"It was packed." in asyncio.run(fetcher(site).get(site.url + "packed")).body
    reply = asyncio.run(fetcher(site).get(site.url + "broken-off"))
    assert reply.truncated and b"The beginning is here." in reply.body


def test_robots_are_obeyed_by_choice(site: SiteServer) -> None:
    with pytest.raises(Blocked, match="robots.txt"):
        asyncio.run(fetcher(site).get(site.url + "private/secret"))
    reply = asyncio.run(fetcher(site, robots=False).get(site.url + "private-secret"))
    assert b"not for programs" in reply.body
    with pytest.raises(Blocked, match="robots.txt"):  # not by a redirect either
        asyncio.run(fetcher(site).get(site.url + "to?url=/private/secret"))


def test_nothing_of_the_environment_is_used_or_sent(site: SiteServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    TroubleHandler.seen.clear()
    assert asyncio.run(fetcher(site, robots=False).get(site.url + "en/")).status == 200
    headers = {name.lower() for name in TroubleHandler.seen[0][1]}
    assert not headers & {"cookie", "authorization", "referer"}


def test_a_host_with_a_dead_address_is_reached_by_its_other_one(site: SiteServer) -> None:
    async def resolver(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.2", "127.0.0.1"]

    config = BrowserConfig(allow=(f"two.example:{site.port}",), robots=False)
    assert asyncio.run(Fetcher(config, resolver).get(f"http://two.example:{site.port}/en/")).status == 200
    with pytest.raises(FetchError, match="cannot be reached"):
        asyncio.run(Fetcher(BrowserConfig(allow=("127.0.0.1",), robots=False)).get("http://127.0.0.1:1/"))


def test_a_cancelled_fetch_leaves_no_connection(site: SiteServer) -> None:
    async def run() -> int:
        task = asyncio.ensure_future(fetcher(site, robots=False).get(site.url + "slow"))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(run()) == 0
