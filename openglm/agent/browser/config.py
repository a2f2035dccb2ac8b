"""What the browser may reach, where it searches, and how much it reads. One frozen description."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from openglm.agent.browser.rules import Rules

__all__ = ["BACKENDS", "BrowserConfig", "BrowserUnavailable", "Folder"]

MIB = 1 << 20
BACKENDS = ("local", "searxng", "ddgs", "brave", "tavily", "serper")
INSTALL = "pip install 'openglm[agent]'"


class BrowserUnavailable(ValueError):
    """The browser, or a part of it, cannot be used here; says how to get it."""


@dataclass(frozen=True)
class Folder:
    """Documents that are searched by the local index: .html, .md, .txt and .pdf in it and below.

    url: the address at which they stand on the web, for a saved site; "" names them local://FOLDER/FILE.
    live: hits are opened at that address rather than from the folder.
    """

    path: Path
    url: str = ""
    live: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not self.path.is_dir():
            raise ValueError(f"{str(self.path)!r} is no folder to search in")
        if self.live and not self.url:
            raise ValueError(f"folder {str(self.path)!r}: live needs the url at which its pages stand")
        if self.url and not self.url.endswith("/"):
            object.__setattr__(self, "url", self.url + "/")


@dataclass(frozen=True, kw_only=True)
class BrowserConfig:
    """Where the browser searches, what it may open, and its limits.

    backends: asked in this order (see BACKENDS). folders: of the local index. searxng: address of a SearXNG server;
    "" takes SEARXNG_URL from the environment. n_results: of a search.
    allow: exempt from the block of private addresses: host names ("intranet.example", "*.example.org"), with a port if
    only that one is meant ("127.0.0.1:8000"), or networks ("10.0.0.0/8"). only: when given, nothing but these hosts is
    opened. ports: that may be connected to; empty is any. robots: robots.txt is obeyed.
    javascript: pages are run in Chromium when they need it ("auto"), never, or always; chromium: its program, "" looks
    for it. proxy: address of a proxy for everything that is fetched; addresses are still resolved and checked here.
    timeout_s: for one page with all its redirects; render_timeout_s: for one in Chromium; search_timeout_s: for one
    back-end. max_bytes: of one page, unpacked; of a longer one the beginning is read (a longer PDF is refused).
    n_redirects: followed at most. window_chars: of a page that are shown at once. n_pages: kept of one conversation,
    for going back and for checking quotes.
    """

    backends: tuple[str, ...] = BACKENDS
    folders: tuple[Folder, ...] = ()
    searxng: str = ""
    n_results: int = 8
    allow: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    ports: tuple[int, ...] = (80, 443, 8080, 8443)
    robots: bool = True
    javascript: Literal["auto", "never", "always"] = "auto"
    chromium: str = ""
    proxy: str = ""
    user_agent: str = "Mozilla/5.0 (compatible; OpenGLM; reads pages for its user)"
    timeout_s: float = 20.0
    render_timeout_s: float = 30.0
    search_timeout_s: float = 10.0
    max_bytes: int = 8 * MIB
    n_redirects: int = 8
    window_chars: int = 4000
    n_pages: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and not value > 0:
                raise ValueError(f"{field.name} must be above 0, not {value}")
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif isinstance(value, str) and "tuple" in str(field.type):
                raise ValueError(f"{field.name} must be a list, such as [{value!r}]")
        if unknown := [name for name in self.backends if name not in BACKENDS]:
            raise ValueError(f"no search back-end {unknown[0]!r}: known are {', '.join(BACKENDS)}")
        if self.javascript not in ("auto", "never", "always"):
            raise ValueError(f"javascript must be auto, never or always, not {self.javascript!r}")
        object.__setattr__(self, "folders", tuple(f if isinstance(f, Folder) else Folder(f) for f in self.folders))
        names = [folder.url or folder.path.name for folder in self.folders]
        if len(set(names)) != len(names):
            raise ValueError("folders must have different names, or different addresses (url)")
        Rules(self.allow), Rules(self.only)  # so that a wrong entry is told of now
