"""Where searches go: the local index, SearXNG, ddgs, and services with a key, asked in order until one has something.

engines = SearchEngines(BrowserConfig(folders=(Folder(Path("docs")),)))
engines.readiness()                    # which are ready, and how to get the others
found = await engines.search("sandbox limits")
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any, Protocol
from urllib.parse import urlsplit

from openglm.agent.browser.config import BrowserConfig
from openglm.agent.browser.index import LocalHit, LocalIndex

__all__ = ["Brave", "Ddgs", "Found", "Hit", "Local", "Readiness", "SearchEngines", "SearchError", "Searxng", "Serper",
           "Tavily"]  # fmt: skip

CACHE_S = 600.0
N_CACHED = 256
MAX_QUERY = 400
N_CLOSEST = 3
TAGS = re.compile(r"</?(?:strong|b|em|mark|span)[^>]*>")


class SearchError(ValueError):
    """A back-end could not search; one line."""


@dataclass(frozen=True)
class Hit:
    url: str
    title: str
    snippet: str = ""
    date: str = ""


@dataclass(frozen=True)
class Readiness:
    """Whether a part can be used here. why: the reason if not, with what to do about it."""

    name: str
    ready: bool
    why: str = ""


@dataclass(frozen=True)
class Found:
    """The hits of one back-end. failed: those asked before it, and what they said. partial: no back-end had a hit, and
    these are documents of the folders with a part of the query.
    """

    hits: tuple[Hit, ...]
    backend: str
    failed: Mapping[str, str] = field(default_factory=dict)
    partial: bool = False


class SearchBackend(Protocol):
    name: str

    def why_not(self) -> str: ...

    async def search(self, query: str, n_results: int, recency_days: int | None) -> list[Hit]: ...


class Local:
    """The documents of the configured folders; those without a date are never too old."""

    name = "local"

    def __init__(self, index: LocalIndex) -> None:
        self.index = index

    def why_not(self) -> str:
        return self.index.why_not() if self.index.folders else "no folder to search in: set BrowserConfig.folders"

    async def search(self, query: str, n_results: int, recency_days: int | None) -> list[Hit]:
        return self._hits(await asyncio.to_thread(self.index.search, query, n_results), recency_days)

    async def closest(self, query: str, recency_days: int | None) -> list[Hit]:
        return self._hits(await asyncio.to_thread(self.index.closest, query, N_CLOSEST), recency_days)

    @staticmethod
    def _hits(found: Sequence[LocalHit], recency_days: int | None) -> list[Hit]:
        oldest = (date.today() - timedelta(days=min(recency_days or 0, 36500))).isoformat() if recency_days else ""
        return [Hit(h.url, h.title, h.snippet, h.date) for h in found if not h.date or h.date >= oldest]


class HttpEngine:
    """A back-end that is asked over HTTP. key_name: the environment variable with its key."""

    name = key_name = url = get = ""

    def __init__(self, timeout_s: float, url: str = "") -> None:
        self.timeout_s = timeout_s
        self.url = url or self.url

    @property
    def key(self) -> str:
        return os.environ.get(self.key_name, "").strip()

    def why_not(self) -> str:
        return "" if self.key else f"needs a key in the environment variable {self.key_name} ({self.get})"

    async def ask(self, method: str, url: str, **options: Any) -> dict[str, Any]:
        """The JSON object of an answer; SearchError, without the key, for anything else."""
        import httpx

        try:
            async with httpx.AsyncClient(timeout=self.timeout_s, follow_redirects=False) as client:
                response = await client.request(method, url, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SearchError(f"{self.name} cannot be reached: {type(error).__name__}") from None
        if response.status_code != 200:
            reasons = {401: "the key is not accepted", 403: "access is denied", 429: "too many requests, try later",
                       402: "the account is used up"}  # fmt: skip
            reason = reasons.get(response.status_code, "it failed")
            raise SearchError(f"{self.name} answered {response.status_code}: {reason}{self.hint(response.status_code)}")
        try:
            value = response.json()
        except ValueError:
            raise SearchError(f"{self.name} answered with something that is no JSON") from None
        return value if isinstance(value, dict) else {}

    def hint(self, status: int) -> str:
        return ""


class Searxng(HttpEngine):
    """A SearXNG server, one's own or another's, whose settings allow JSON."""

    name = "searxng"

    def __init__(self, timeout_s: float, url: str = "") -> None:
        super().__init__(timeout_s, (url or os.environ.get("SEARXNG_URL", "")).strip().rstrip("/"))

    def why_not(self) -> str:
        if self.url and urlsplit(self.url).scheme not in ("http", "https"):
            return f"{self.url!r} is no address: give one such as http://localhost:8888"
        return "" if self.url else "needs the address of a SearXNG server: set SEARXNG_URL or BrowserConfig.searxng"

    def hint(self, status: int) -> str:
        return " (its settings.yml must list json under search.formats)" if status == 403 else ""

    async def search(self, query: str, n_results: int, recency_days: int | None) -> list[Hit]:
        asked: dict[str, Any] = {"q": query, "format": "json"}
        if recency_days:
            asked["time_range"] = span(recency_days, {1: "day", 31: "month", 366: "year"}, "year")
        value = await self.ask("GET", f"{self.url.removesuffix('/search')}/search", params=asked)
        return hits(value.get("results"), "url", "title", "content", "publishedDate")


class Brave(HttpEngine):
    name, key_name = "brave", "BRAVE_API_KEY"
    url, get = "https://api.search.brave.com/res/v1/web/search", "from Brave's search API"

    async def search(self, query: str, n_results: int, recency_days: int | None) -> list[Hit]:
        asked: dict[str, Any] = {"q": query, "count": min(n_results, 20)}
        if recency_days:
            asked["freshness"] = span(recency_days, {1: "pd", 7: "pw", 31: "pm", 366: "py"}, "py")
        headers = {"X-Subscription-Token": self.key, "Accept": "application/json"}
        value = await self.ask("GET", self.url, params=asked, headers=headers)
        return hits((value.get("web") or {}).get("results"), "url", "title", "description", "page_age")


class Tavily(HttpEngine):
    name, key_name = "tavily", "TAVILY_API_KEY"
    url, get = "https://api.tavily.com/search", "from Tavily"

    async def search(self, query: str, n_results: int, recency_days: int | None) -> list[Hit]:
        asked: dict[str, Any] = {"query": query, "max_results": min(n_results, 20)}
        if recency_days:
            asked["time_range"] = span(recency_days, {1: "day", 7: "week", 31: "month", 366: "year"}, "year")
        value = await self.ask("POST", self.url, json=asked, headers={"Authorization": f"Bearer {self.key}"})
        return hits(value.get("results"), "url", "title", "content", "published_date")


class Serper(HttpEngine):
    name, key_name = "serper", "SERPER_API_KEY"
    url, get = "https://google.serper.dev/search", "Google's results, from Serper"

    async def search(self, query: str, n_results: int, recency_days: int | None) -> list[Hit]:
        asked: dict[str, Any] = {"q": query, "num": n_results}
        if recency_days:
            asked["tbs"] = "qdr:" + span(recency_days, {1: "d", 7: "w", 31: "m", 366: "y"}, "y")
        value = await self.ask("POST", self.url, json=asked, headers={"X-API-KEY": self.key})
        return hits(value.get("organic"), "link", "title", "snippet", "date")


class Ddgs:
    """Public search engines through the package ddgs: no key, but limits that nobody promises."""

    name = "ddgs"

    def __init__(self, timeout_s: float, proxy: str = "") -> None:
        self.timeout_s, self.proxy = timeout_s, proxy

    def why_not(self) -> str:
        try:
            import ddgs  # noqa: F401
        except ImportError:
            return "needs the package ddgs: pip install 'openglm[search]'"
        return ""

    async def search(self, query: str, n_results: int, recency_days: int | None) -> list[Hit]:
        from ddgs import DDGS
        from ddgs.exceptions import DDGSException

        limit = span(recency_days, {1: "d", 7: "w", 31: "m", 366: "y"}, "y") if recency_days else None

        def ask() -> list[dict[str, Any]]:
            engine = DDGS(proxy=self.proxy or None, timeout=max(1, int(self.timeout_s)))
            return engine.text(query, max_results=n_results, timelimit=limit)

        try:
            return hits(await asyncio.to_thread(ask), "href", "title", "body", "date")
        except DDGSException as error:
            if "no results" in str(error).lower():
                return []
            raise SearchError(f"ddgs failed: {(str(error) or type(error).__name__).splitlines()[0][:100]}") from None


def span(days: int, names: Mapping[int, str], longest: str) -> str:
    """The shortest span of a service that holds so many days."""
    return next((name for most, name in names.items() if days <= most), longest)


def hits(items: Any, url: str, title: str, snippet: str, day: str) -> list[Hit]:
    """Hits from a service's list; entries without an address of the web are left out."""
    import html

    found: dict[str, Hit] = {}
    for item in items if isinstance(items, list) else []:
        if isinstance(item, dict) and str(item.get(url, "")).startswith(("http://", "https://")):
            address = str(item[url])
            text = [html.unescape(TAGS.sub("", str(item.get(name) or ""))).strip() for name in (title, snippet)]
            found.setdefault(address, Hit(address, text[0] or address, text[1], str(item.get(day) or "")[:10]))
    return list(found.values())


class SearchEngines:
    """The back-ends of one browser, in order. clock: seconds, for the age of what is remembered."""

    def __init__(self, config: BrowserConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.clock = config, clock
        self.index = LocalIndex(config.folders, config.max_bytes)
        limit = config.search_timeout_s
        self._local = Local(self.index)
        known: dict[str, SearchBackend] = {
            "local": self._local, "searxng": Searxng(limit, config.searxng), "ddgs": Ddgs(limit, config.proxy),
            "brave": Brave(limit), "tavily": Tavily(limit), "serper": Serper(limit),
        }  # fmt: skip
        self.backends = [known[name] for name in config.backends]
        self._cache: dict[tuple[str, int | None], tuple[float, Found]] = {}

    def readiness(self) -> list[Readiness]:
        return [Readiness(backend.name, not (why := backend.why_not()), why) for backend in self.backends]

    async def search(self, query: str, recency_days: int | None = None) -> Found:
        """What the first back-end with a hit found; if none has one, what comes closest in the folders, or nothing.
        SearchError where none could be asked.
        """
        query = re.sub(r"\s+", " ", query).strip()[:MAX_QUERY]
        key = (query, recency_days)
        at, known = self._cache.get(key, (0.0, None))
        if known is not None and self.clock() - at < CACHE_S:
            return known
        failed: dict[str, str] = {}
        asked: list[str] = []
        for backend in self.backends:
            if backend.why_not():
                continue
            try:
                # the first search in folders reads them, which may take a while
                async with asyncio.timeout(None if backend.name == "local" else self.config.search_timeout_s):
                    found = await backend.search(query, self.config.n_results, recency_days)
            except TimeoutError:
                failed[backend.name] = f"{backend.name} did not answer within {self.config.search_timeout_s:g} s"
                continue
            except SearchError as error:
                failed[backend.name] = str(error)
                continue
            asked.append(backend.name)
            if found:
                result = Found(tuple(found[: self.config.n_results]), backend.name, failed)
                if backend.name != "local":  # its documents may change
                    self._remember(key, result)
                return result
        if asked:
            close = await self._local.closest(query, recency_days) if "local" in asked else []
            return Found(tuple(close), "local" if close else ", ".join(asked), failed, partial=bool(close))
        if failed:
            raise SearchError("the search failed: " + "; ".join(failed.values()))
        reasons = "; ".join(f"{item.name}: {item.why}" for item in self.readiness())
        raise SearchError(f"no search back-end is ready ({reasons}). A page can be opened by its address.")

    def _remember(self, key: tuple[str, int | None], found: Found) -> None:
        if len(self._cache) >= N_CACHED:
            self._cache.pop(next(iter(self._cache)))
        self._cache[key] = (self.clock(), found)
