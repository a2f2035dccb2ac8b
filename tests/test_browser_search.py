"""Where searches go: the local index in both languages, and the shape of each service's answers from a fake server.

python -m pytest tests/test_browser_search.py
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("bm25s", reason="needs the extra agent")

from openglm.agent.browser.config import BrowserConfig, Folder
from openglm.agent.browser.index import LocalIndex, tokens
from openglm.agent.browser.search import (
    Brave,
    Ddgs,
    Hit,
    HttpEngine,
    SearchEngines,
    SearchError,
    Searxng,
    Serper,
    Tavily,
)
from openglm.agent.browser.site import SITE
from openglm.agent.tools.browser import Browser
from openglm.types import ToolContext


@pytest.fixture(scope="module")
def index() -> LocalIndex:
    return LocalIndex((Folder(SITE, url="http://twins.example"),), 1 << 20)


@pytest.mark.parametrize(("query", "page"), [
    ("When was the Tide Library opened?", "en/library.html"), ("Who founded the Lantern Museum", "en/museum.html"),
    ("How long is Orrel's Bridge?", "en/bridge.html"), ("turnover of Pellworth in 2023", "en/company.html"),
    ("puffins Skarrow", "en/island.html"), ("who was Wilhelmina Toft", "en/museum-leaflet.pdf"),
    ("栖云镇图书馆什么时候开馆？", "zh/library.html"), ("青岚茶社的董事长是谁", "zh/company.html"),
    ("望云塔的铜铃有多重", "zh/guide.pdf"), ("怀谷桥有多少只石狮", "zh/bridge.html"),
    ("天文台对公众开放的时间", "zh/observatory.html"), ("雾里青用多少度的水冲泡", "zh/tea.html"),
])  # fmt: skip
def test_the_right_page_comes_first(index: LocalIndex, query: str, page: str) -> None:
    hits = index.search(query, 8)
    assert hits[0].url == f"http://twins.example/{page}", [hit.url for hit in hits]
    assert hits[0].snippet and len({hit.url for hit in hits}) == len(hits) <= 8


def test_what_is_not_there_is_not_found(index: LocalIndex) -> None:
    for query in ("zorblax quuxifier", "量子纠缠态蒸馏", "", "the of and", "election results in Portugal yesterday"):
        assert index.search(query, 8) == []


def test_tokens_of_both_languages() -> None:
    assert tokens("The Libraries' opening, opened-up; 2,024 ferries") == [
        "library", "open", "open", "up", "2", "024", "ferry"]  # fmt: skip
    assert tokens("开馆时间 GLM-4") == ["开馆", "馆时", "时间", "glm", "4"] and tokens("馆") == ["馆"]


def test_changes_of_a_folder_are_seen_and_links_out_of_it_are_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "notes", tmp_path / "outside.txt"
    folder.mkdir()
    outside.write_text("The password of the safe is swordfish.")
    (folder / "a.md").write_text("# Boats\n\nThe red boat lies at the pier.\n")
    (folder / "link.txt").symlink_to(outside)
    (folder / ".hidden.txt").write_text("hidden boat")
    (folder / "big.txt").write_text("boat " * 1000)
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    index = LocalIndex((Folder(folder),), max_bytes=2000)
    assert [hit.url for hit in index.search("red boat", 5)] == ["local://notes/a.md"]
    assert index.search("password swordfish", 5) == []
    assert set(map(Path, index.skipped)) == {folder / "big.txt", folder / "broken.pdf"}
    (folder / "b.txt").write_text("A red boat and a red boat: two.")
    assert {hit.url for hit in index.search("red boat", 5)} == {"local://notes/a.md", "local://notes/b.txt"}
    (folder / "a.md").unlink()
    assert [hit.url for hit in index.search("red boat", 5)] == ["local://notes/b.txt"]
    page = index.page("local://notes/b.txt")
    assert page is not None and page.lines == ("A red boat and a red boat: two.",)
    for url in ("local://notes/link.txt", "local://notes/../outside.txt", "local://notes/.hidden.txt", str(outside)):
        assert index.page(url) is None


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        Folder(tmp_path / "none")
    with pytest.raises(ValueError, match="live needs the url"):
        Folder(tmp_path, live=True)
    with pytest.raises(ValueError, match="different names"):
        BrowserConfig(folders=(Folder(tmp_path), Folder(tmp_path)))


class Service(BaseHTTPRequestHandler):
    """A fake search service: answers by path, and keeps what it was asked."""

    answers: dict[str, tuple[int, Any]] = {}
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.reply(parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(self.path, json.loads(body))

    def reply(self, path: str, fields: dict[str, Any]) -> None:
        self.asked.append((path, fields, {name.lower(): value for name, value in self.headers.items()}))
        status, value = self.answers.get(path, (404, {}))
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def service() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    Service.asked, Service.answers = [], {}
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# For each: the class, its path, an answer in its shape, what it must have been asked, and where its key stands.
SERVICES: dict[str, tuple[type[HttpEngine], str, Any, dict[str, Any], str]] = {
    "searxng": (Searxng, "/search", {"query": "q", "results": [
        {"url": "https://a.example/1", "title": "One", "content": "First.", "publishedDate": "2024-05-01T00:00:00"},
        {"url": "https://a.example/1", "title": "Again", "content": ""}, {"title": "without an address"},
        {"url": "ftp://a.example/", "title": "no web"}]}, {"q": "tea", "format": "json", "time_range": "month"}, ""),
    "brave": (Brave, "/res/v1/web/search", {"type": "search", "web": {"type": "search", "results": [
        {"url": "https://a.example/1", "title": "One", "description": "<strong>First</strong>.",
         "page_age": "2024-05-01T10:00:00"}]}}, {"q": "tea", "count": "5", "freshness": "pw"}, "x-subscription-token"),
    "tavily": (Tavily, "/search", {"query": "tea", "results": [
        {"url": "https://a.example/1", "title": "One", "content": "First.", "published_date": "2024-05-01"}]},
        {"query": "tea", "max_results": 5, "time_range": "week"}, "authorization"),
    "serper": (Serper, "/search", {"organic": [
        {"link": "https://a.example/1", "title": "One", "snippet": "First.", "date": "2024-05-01", "position": 1}]},
        {"q": "tea", "num": 5, "tbs": "qdr:w"}, "x-api-key"),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_services(name: str, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, path, answer, asked, header = SERVICES[name]
    if header:
        monkeypatch.setenv(kind.key_name, "k-123")
    engine: Any = kind(5.0, service if name == "searxng" else service + path)
    assert engine.why_not() == ""
    Service.answers[path] = (200, answer)
    assert asyncio.run(engine.search("tea", 5, 7)) == [Hit("https://a.example/1", "One", "First.", "2024-05-01")]
    got_path, fields, headers = Service.asked[0]
    assert got_path == path and fields == asked and (not header or "k-123" in headers[header])
    for status, value, why in ((429, {}, "too many"), (401, {}, "key"), (200, b"<html>", "no JSON"), (500, {}, "500")):
        Service.answers[path] = (status, value)
        with pytest.raises(SearchError, match=why) as caught:
            asyncio.run(engine.search("tea", 5, None))
        assert "k-123" not in str(caught.value) and "\n" not in str(caught.value)
    Service.answers[path] = (200, {})
    assert asyncio.run(engine.search("tea", 5, None)) == []


@pytest.mark.parametrize("kind", [Brave, Tavily, Serper])
def test_services_without_a_key(kind: type[HttpEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kind.key_name, raising=False)
    assert kind.key_name in kind(1.0).why_not()


def test_ddgs_is_called_as_its_package_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    ddgs = pytest.importorskip("ddgs", reason="needs the extra search")
    given: dict[str, Any] = {}

    class Fake:
        def __init__(self, **options: Any) -> None:
            inspect.signature(ddgs.DDGS.__init__).bind(self, **options)

        def text(self, query: str, **options: Any) -> list[dict[str, Any]]:
            inspect.signature(ddgs.DDGS.text).bind(self, query, **options)
            given.update(options, query=query)
            return [{"title": "One", "href": "https://a.example/1", "body": "First &amp; last."}]

    class Empty(Fake):
        def text(self, query: str, **options: Any) -> list[dict[str, Any]]:
            raise ddgs.exceptions.DDGSException("No results found.")

    class Limited(Fake):
        def text(self, query: str, **options: Any) -> list[dict[str, Any]]:
            raise ddgs.exceptions.RatelimitException("202 Ratelimit")

    engine = Ddgs(5.0)
    assert engine.why_not() == ""
    monkeypatch.setattr("ddgs.DDGS", Fake)
    assert asyncio.run(engine.search("tea", 5, 1)) == [Hit("https://a.example/1", "One", "First & last.")]
    assert given == {"query": "tea", "max_results": 5, "timelimit": "d"}
    monkeypatch.setattr("ddgs.DDGS", Empty)
    assert asyncio.run(engine.search("tea", 5, None)) == []
    monkeypatch.setattr("ddgs.DDGS", Limited)
    with pytest.raises(SearchError, match="Ratelimit"):
        asyncio.run(engine.search("tea", 5, None))


def engines(service: str, **options: Any) -> SearchEngines:
    return SearchEngines(BrowserConfig(**({"backends": ("local", "searxng"), "searxng": service} | options)))


def test_back_ends_are_asked_in_order(service: str) -> None:
    Service.answers["/search"] = (200, SERVICES["searxng"][2])
    both = engines(service, folders=(Folder(SITE),))
    assert asyncio.run(both.search("Tide Library")).backend == "local" and not Service.asked
    found = asyncio.run(both.search("election results in Portugal"))
    assert found.backend == "searxng" and found.hits[0].url == "https://a.example/1"
    asyncio.run(both.search("election  results in Portugal"))
    assert len(Service.asked) == 1  # remembered
    clock = iter([0.0, 10_000.0, 10_000.0, 10_000.0])
    forgetful = SearchEngines(BrowserConfig(backends=("searxng",), searxng=service), lambda: next(clock))
    for _ in range(2):
        asyncio.run(forgetful.search("tea"))
    assert len(Service.asked) == 3
    other_way = engines(service, folders=(Folder(SITE),), backends=("searxng", "local"))
    Service.answers["/search"] = (429, {})
    found = asyncio.run(other_way.search("Tide Library"))
    assert found.backend == "local" and "too many requests" in found.failed["searxng"]


def test_where_nothing_is_found_pages_with_the_rarest_word_are_given_as_such(service: str) -> None:
    """Behind all back-ends; nothing where no word is known."""
    Service.answers["/search"] = (200, {"results": []})
    both = engines(service, folders=(Folder(SITE, url="http://twins.example"),))
    found = asyncio.run(both.search("population density of Skarrow"))
    assert Service.asked and found.partial and found.backend == "local" and 1 <= len(found.hits) <= 3
    assert found.hits[0].url == "http://twins.example/en/island.html" and "Skarrow" in found.hits[0].snippet
    assert not asyncio.run(both.search("Skarrow")).partial
    for query in ("zorblax quuxifier", "", "the of and"):
        assert asyncio.run(both.search(query)).hits == ()
    browser = Browser(BrowserConfig(folders=(Folder(SITE),), backends=("local",)))
    search = next(tool for tool in browser.tools() if tool.spec.name == "search")
    shown = asyncio.run(search.call({"query": "population density of Skarrow"}, ToolContext()))
    assert shown.content.startswith("Nothing was found for all of 'population density of Skarrow'; these pages have a")
    assert shown.data is not None and shown.data["partial"] and "【1†The island of Skarrow†" in shown.content


def test_recency_of_local_documents() -> None:
    local = SearchEngines(BrowserConfig(backends=("local",), folders=(Folder(SITE),)))
    assert asyncio.run(local.search("Tide Library", recency_days=7)).hits == ()  # of 2024
    assert asyncio.run(local.search("Tide Library", recency_days=36_000)).hits


def test_nothing_ready_and_everything_failing(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRAVE_API_KEY", "SEARXNG_URL"):
        monkeypatch.delenv(name, raising=False)
    bare = SearchEngines(BrowserConfig(backends=("local", "searxng", "brave")))
    assert [(item.name, item.ready) for item in bare.readiness()] == [
        ("local", False), ("searxng", False), ("brave", False)]  # fmt: skip
    assert "SEARXNG_URL" in bare.readiness()[1].why and "folders" in bare.readiness()[0].why
    with pytest.raises(SearchError, match="no search back-end is ready.*BRAVE_API_KEY"):
        asyncio.run(bare.search("tea"))
    Service.answers["/search"] = (403, {})
    with pytest.raises(SearchError, match="list json under search.formats"):
        asyncio.run(engines(service).search("tea"))
    with pytest.raises(SearchError, match="cannot be reached"):
        asyncio.run(engines("http://127.0.0.1:1").search("tea"))
    monkeypatch.setenv("SEARXNG_URL", "localhost:1")
    assert "no address" in SearchEngines(BrowserConfig(backends=("searxng",))).readiness()[0].why
    with pytest.raises(ValueError, match="no search back-end 'bing'"):
        BrowserConfig(backends=("bing",))
