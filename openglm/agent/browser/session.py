"""What one conversation has seen: numbered sources, the pages read, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from openglm.agent.browser.citations import Source
from openglm.agent.browser.frame import neutral
from openglm.agent.browser.page import Page
from openglm.agent.browser.search import Found

__all__ = ["Session", "View"]


@dataclass
class View:
    """A page, or results of a search, as it was last looked at. first, last: lines shown, from 1."""

    source: int | None = None
    found: Found | None = None
    query: str = ""
    first: int = 1
    last: int = 0


@dataclass
class Session:
    """State of one conversation. base: the number of the first source. Of pages the last `n_pages` are kept."""

    n_pages: int
    base: int = 1
    sources: dict[int, Source] = field(default_factory=dict)
    pages: dict[int, Page] = field(default_factory=dict)
    history: list[View] = field(default_factory=list)
    by_url: dict[str, int] = field(default_factory=dict)
    results: list[int] = field(default_factory=list)  # of the last search

    def number(self, url: str, title: str) -> int:
        """The number of the source at an address, a new one if need be. The title of a page that was read stays."""
        number = self.by_url.setdefault(url, self._next)
        if number not in self.pages:
            self.sources[number] = Source(number, url, clean_title(title))
        return number

    def keep(self, page: Page, asked: Sequence[str] = ()) -> int:
        """Stores a page that was read; the addresses under which it was asked for lead to it from now on."""
        known = next((self.by_url[url] for url in (*asked, page.url) if url in self.by_url), self._next)
        for url in (page.url, *asked):
            self.by_url.setdefault(url, known)
        self.sources[known] = Source(known, page.url, clean_title(page.title))
        self.pages.pop(known, None)
        self.pages[known] = page
        while len(self.pages) > self.n_pages:
            self.pages.pop(next(iter(self.pages)))
        return known

    @property
    def _next(self) -> int:
        return self.base + len(self.sources)

    def show(self, view: View) -> View:
        self.history.append(view)
        del self.history[: -4 * self.n_pages]
        return view

    @property
    def current(self) -> View | None:
        return self.history[-1] if self.history else None

    def check_integrity(self) -> None:
        assert set(self.pages) <= set(self.sources), "a page without a source"
        assert set(self.by_url.values()) >= set(self.sources), "a source that no address leads to"
        assert all(number == source.number for number, source in self.sources.items())
        assert len(self.pages) <= self.n_pages


def clean_title(title: str) -> str:
    """A title that can stand inside 【3†...】."""
    return neutral(title).translate(str.maketrans("【】†[]", "()-()")).strip()[:120] or "untitled"


def host_of(url: str) -> str:
    return urlsplit(url).netloc or urlsplit(url).scheme
