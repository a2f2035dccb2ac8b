"""The tool `browser`: searches, opens pages, follows links, finds, scrolls, goes back, and quotes with a check.

    python -m openglm.agent.tools.browser "how is code isolated"           # search, here in OpenGLM's own documents
    python -m openglm.agent.tools.browser --open https://example.org/      # a page as a model is shown it

One Browser serves all conversations. Its tools come in two forms: GLM-4's own `simple_browser`, and separate functions.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openglm.agent.browser import native
from openglm.agent.browser.address import Resolver, resolve
from openglm.agent.browser.citations import Footnotes, find_passage, footnotes, unverified_quotes
from openglm.agent.browser.config import BrowserConfig, BrowserUnavailable, Folder
from openglm.agent.browser.index import own_docs
from openglm.agent.browser.reader import Reader, packages_missing
from openglm.agent.browser.search import Readiness, SearchEngines, SearchError
from openglm.agent.browser.session import Session, View
from openglm.agent.browser.show import closest_line, matches, show_page, show_results
from openglm.types import Observation, Tool, ToolContext, ToolSpec

__all__ = ["Browser", "BrowserConfig", "Folder"]

N_AT_ONCE = 10  # results that one mclick opens
Action = Callable[..., Awaitable[Observation]]


class Browser:
    """Browses for any number of conversations; each has its own sources, pages and way back.

    BrowserUnavailable (a ValueError) where its packages are missing. resolver: gives the addresses of a host.
    """

    def __init__(self, config: BrowserConfig | None = None, resolver: Resolver = resolve) -> None:
        self.config = config or BrowserConfig()
        if reason := packages_missing():
            raise BrowserUnavailable(reason)
        self.engines = SearchEngines(self.config)
        self.reader = Reader(self.config, self.engines.index, resolver)
        self._sessions: dict[str, Session] = {}
        self._closed = False

    @staticmethod
    def why_not(config: BrowserConfig | None = None) -> str:
        """The reason why this tool cannot be offered here, or nothing."""
        return packages_missing()

    def readiness(self) -> list[Readiness]:
        """The search back-ends and "javascript": which are ready, and how to get the others."""
        reason = self.reader.javascript_why_not()
        return [*self.engines.readiness(), Readiness("javascript", not reason, reason)]

    def tools(self, native: bool = False) -> list[Tool]:
        """native: the one built-in tool of GLM-4; otherwise a function for each thing to do."""
        return [NativeTool(self)] if native else [FunctionTool(self, *entry) for entry in FUNCTIONS]

    def session(self, conversation: str, base: int = 1) -> Session:
        """base: the number of its first source, if the conversation is new."""
        if self._closed:
            raise ValueError("the browser is closed")
        if conversation not in self._sessions:
            self._sessions[conversation] = Session(self.config.n_pages, base)
        return self._sessions[conversation]

    async def end(self, conversation: str) -> None:
        self._sessions.pop(conversation, None)

    async def close(self) -> None:
        self._sessions.clear()
        self._closed = True

    def footnotes(self, conversation: str, answer: str) -> tuple[Footnotes, list[tuple[str, int]]]:
        """The answer with footnotes; its quotes that do not stand in the page cited behind them, with its number."""
        session = self.session(conversation)
        pages = {number: page.text for number, page in session.pages.items()}
        return footnotes(answer, session.sources), unverified_quotes(answer, pages)

    # What can be done. Each returns an Observation, or raises ValueError with what would work.

    async def search(self, session: Session, query: str, recency_days: int | None = None) -> Observation:
        if not query.strip():
            raise ValueError('search needs words: {"query": "..."}')
        found = await self.engines.search(query, recency_days if recency_days and recency_days > 0 else None)
        session.results = [session.number(hit.url, hit.title) for hit in found.hits]
        session.show(View(found=found, query=query))
        return show_results(session, found, query)

    async def open_page(self, session: Session, target: str | int, javascript: bool | None = None) -> Observation:
        """target: an address, or the number of a source."""
        url = _address(session, target)
        page = await self.reader.read(url, javascript)
        number = session.keep(page, (url,))
        return show_page(session, session.show(View(number)), self.config.window_chars)

    async def click(self, session: Session, link: int) -> Observation:
        """A link of the page that is looked at, or a result of the search."""
        view = session.current
        if view is None:
            raise ValueError("no page is open: search or open a page first")
        if view.source is None:
            return await self.open_page(session, link)
        links = session.pages[view.source].links if view.source in session.pages else ()
        if not 1 <= link <= len(links):
            there = f"its links are 1 to {len(links)}" if links else "it has no links"
            raise ValueError(f"this page has no link {link}: {there}. To open a source use its number with open_page.")
        return await self.open_page(session, links[link - 1])

    async def mclick(self, session: Session, ids: Sequence[int]) -> Observation:
        """Several sources at once; those that fail are told of beside the others."""
        if not ids:
            raise ValueError("mclick needs numbers of search results, such as mclick([1, 2])")
        urls = [_address(session, number) for number in dict.fromkeys(ids)][:N_AT_ONCE]
        found = await asyncio.gather(*(self.reader.read(url) for url in urls), return_exceptions=True)
        parts: list[Observation] = []
        room = max(self.config.window_chars // len(urls), 1200)
        for url, page in zip(urls, found, strict=True):
            if isinstance(page, ValueError):
                parts.append(Observation(f"{url} could not be opened: {page}", error=True))
            elif isinstance(page, BaseException):
                raise page
            else:
                parts.append(show_page(session, session.show(View(session.keep(page, (url,)))), room))
        return together(parts)

    async def find(self, session: Session, text: str) -> Observation:
        view, page = _open_page_of(session)
        if not text.strip():
            raise ValueError("find needs a text to look for")
        return matches(session, view, page, text, self.config.window_chars)

    async def scroll(self, session: Session, lines: int | None = None, direction: str = "down") -> Observation:
        view, page = _open_page_of(session)
        step = lines or view.last + 1 - view.first
        first = view.first - abs(step) if direction == "up" or step < 0 else view.first + step
        if first > len(page.lines):
            raise ValueError(f"this is the end: the page has {len(page.lines)} lines")
        if view.first == 1 and first < 1:
            raise ValueError("this is the beginning of the page")
        moved = View(view.source, first=max(first, 1))
        session.history[-1] = moved
        return show_page(session, moved, self.config.window_chars)

    async def back(self, session: Session) -> Observation:
        if len(session.history) < 2:
            raise ValueError("there is no page to go back to")
        session.history.pop()
        view = session.history[-1]
        if view.found is not None:
            session.results = [session.number(hit.url, hit.title) for hit in view.found.hits]
            return show_results(session, view.found, view.query)
        if view.source not in session.pages:
            return await self.open_page(session, session.sources[view.source or 0].url)
        return show_page(session, view, self.config.window_chars)

    async def quote(self, session: Session, source: int, text: str) -> Observation:
        """Whether the words stand in the page; with the mark to cite it by."""
        page = session.pages.get(source)
        if page is None:
            read = ", ".join(map(str, sorted(session.pages))) or "none yet"
            raise ValueError(f"source {source} was not opened; opened sources are: {read}")
        title = session.sources[source].title
        data = {"kind": "quote", "source": source, "url": page.url, "title": title, "text": text,
                "sources": [session.sources[source].as_data()]}  # fmt: skip
        if find_passage(text, page.text):
            return Observation(f"Verified: the words stand in source {source}. Cite them as 【{source}†{title}】.",
                               data=data | {"verified": True})  # fmt: skip
        nearest = closest_line(page, text)
        hint = f" The nearest line is {nearest}" if nearest else ""
        return Observation(f"Not verified: these words do not stand in source {source}.{hint}",
                           data=data | {"verified": False}, error=True)  # fmt: skip


def _address(session: Session, target: str | int) -> str:
    """The address that a model means: an address, or the number of a source, in whatever form."""
    text = str(target).strip().strip("<>\"'【】[]").strip()
    number = text.partition("†")[0].strip().removeprefix("#")
    if number.lstrip("-").isdecimal():
        source = session.sources.get(int(number))
        if source is None:
            known = ", ".join(map(str, session.results or sorted(session.sources))) or "none: search first"
            raise ValueError(f"there is no source {number}; known numbers: {known}")
        return source.url
    if not text:
        raise ValueError("give an address such as https://example.org/page, or the number of a search result")
    if text.startswith("/") and session.current is not None and session.current.source is not None:
        from urllib.parse import urljoin

        return urljoin(session.sources[session.current.source].url, text)
    if "." not in text and ":" not in text:
        raise ValueError(f"{text[:100]!r} is no address; search for it, or give one such as https://example.org/page")
    return text


def _open_page_of(session: Session) -> tuple[View, Any]:
    view = session.current
    if view is None or view.source is None:
        raise ValueError("no page is open: open one first (a search result by its number)")
    page = session.pages.get(view.source)
    if page is None:
        raise ValueError("the page is no longer kept: open it again")
    return view, page


def together(parts: Sequence[Observation]) -> Observation:
    """Several observations as one; an error only if all are."""
    if len(parts) == 1:
        return parts[0]
    sources: dict[int, Any] = {}
    for part in parts:
        for entry in (part.data or {}).get("sources", ()):
            sources[entry["number"]] = entry
    found = [dict(part.data) for part in parts if part.data]
    data = {"kind": "several", "parts": found, "sources": list(sources.values())}
    return Observation("\n\n".join(part.content for part in parts), data=data, error=all(part.error for part in parts))


def _schema(required: Sequence[str] = (), **properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


TEXT: Mapping[str, Any] = {"type": "string"}
NUMBER: Mapping[str, Any] = {"type": "integer"}
ANY_NUMBER: Mapping[str, Any] = {"type": ["integer", "string"]}  # small models write either
# name, description, schema, action(browser, session, arguments)
FUNCTIONS: tuple[tuple[str, str, dict[str, Any], Callable[..., Awaitable[Observation]]], ...] = (
    ("search", "Search the web for facts: places, people, events, prices. open_page opens a result.",
     _schema(["query"], query=TEXT), lambda b, s, a: b.search(s, str(a["query"]))),
    ("open_page", "Open a page by its result number (such as \"1\") or its URL, and read it.",
     _schema(["page"], page={**ANY_NUMBER, "description": "result number or URL"},
             javascript={"type": "boolean", "description": "run the page's scripts"}),
     lambda b, s, a: b.open_page(s, a["page"], a.get("javascript"))),
    ("click", "Follow a link of the open page by its number.",
     _schema(["link"], link=ANY_NUMBER), lambda b, s, a: b.click(s, _whole(a["link"], "link"))),
    ("find", "Find words in the open page.", _schema(["text"], text=TEXT), lambda b, s, a: b.find(s, str(a["text"]))),
    ("scroll", "Read on in the open page, or back up.",
     _schema(direction={"type": "string", "enum": ["down", "up"]}, lines=NUMBER),
     lambda b, s, a: b.scroll(s, _whole(a["lines"], "lines") if a.get("lines") else None, a.get("direction", "down"))),
    ("back", "Go back to the page or results before.", _schema(), lambda b, s, a: b.back(s)),
    ("quote", "Check that words stand in a source before you quote them.",
     _schema(["source", "text"], source=ANY_NUMBER, text=TEXT),
     lambda b, s, a: b.quote(s, _whole(a["source"], "source"), str(a["text"]))),
)  # fmt: skip


def _whole(value: Any, name: str) -> int:
    """A whole number that a model may have written as text, or in the marks of a source."""
    try:
        return int(str(value).strip().strip("【】[]#").partition("†")[0])
    except ValueError:
        raise ValueError(f"{name} must be a number, not {str(value)[:40]!r}") from None


class FunctionTool:
    """One thing that the browser can do, as a function of its own."""

    group = "simple_browser"

    def __init__(self, browser: Browser, name: str, description: str, schema: dict[str, Any], action: Action) -> None:
        self.browser, self.action = browser, action
        self.state = browser  # calls of one turn run in order: they go on from the page that is open
        self.spec = ToolSpec(name, description, schema)

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        names, required = self.spec.parameters["properties"], self.spec.parameters["required"]
        wrong = [key for key in arguments if key not in names]
        wrong += [key for key in required if arguments.get(key) is None]
        if wrong:
            trouble = f"{wrong[0]!r} is {'missing' if wrong[0] in names else 'unknown'}"
            raise ValueError(f"{self.spec.name} takes {', '.join(names) or 'no arguments'}; {trouble}")
        return await observed(self.action(self.browser, self.browser.session(context.conversation), arguments))

    async def end(self, conversation: str) -> None:
        await self.browser.end(conversation)

    async def close(self) -> None:
        await self.browser.close()


class NativeTool:
    """GLM-4's `simple_browser`: its body is one call or several, such as search("...") or mclick([0, 3])."""

    spec = ToolSpec.of_builtin("simple_browser")
    group = "simple_browser"

    def __init__(self, browser: Browser) -> None:
        self.browser = self.state = browser

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        code = arguments.get("code")
        if not isinstance(code, str) or len(arguments) != 1:
            raise ValueError(f'simple_browser takes one argument, {{"code": "..."}}: {native.HELP}')
        calls = native.read_calls(code)
        session = self.browser.session(context.conversation, base=0)
        return together([await observed(self._do(session, call)) for call in calls])

    async def _do(self, session: Session, call: native.Call) -> Observation:
        given, browser = call.arguments, self.browser
        optional = ("recency_days", "lines")
        missing = [name for name in native.FORMS[call.name] if name not in given and name not in optional]
        if missing:
            raise ValueError(f"{call.name} needs {missing[0]}: {native.HELP}")
        match call.name:
            case "search":
                query = " ".join(map(str, q)) if isinstance(q := given["query"], list) else str(q)
                return await browser.search(session, query, _whole(given.get("recency_days") or 0, "recency_days"))
            case "mclick":
                ids = given["ids"] if isinstance(given["ids"], list | tuple) else [given["ids"]]
                return await browser.mclick(session, [_whole(number, "ids") for number in ids])
            case "open_url":
                return await browser.open_page(session, given["url"])
            case "click":
                return await browser.click(session, _whole(given["link"], "link"))
            case "find":
                return await browser.find(session, str(given["text"]))
            case "scroll":
                return await browser.scroll(session, _whole(given["lines"], "lines") if given.get("lines") else None)
            case "quote":
                return await browser.quote(session, _whole(given["source"], "source"), str(given["text"]))
        return await browser.back(session)

    async def end(self, conversation: str) -> None:
        await self.browser.end(conversation)

    async def close(self) -> None:
        await self.browser.close()


async def observed(doing: Awaitable[Observation]) -> Observation:
    """What came of an action; what could not be done is told, with what would work."""
    try:
        return await doing
    except (SearchError, ValueError) as error:
        return Observation(str(error), error=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m openglm.agent.tools.browser")
    parser.add_argument("query", nargs="*", help="words to search for")
    parser.add_argument("--open", metavar="URL", help="a page to open, or the number of a result")
    parser.add_argument("--folder", action="append", type=Path, default=[], help="search in the documents of a folder")
    parser.add_argument("--allow", action="append", default=[], help="a host or network that may be private")
    options = parser.parse_args(arguments)
    try:
        folders = tuple(map(Folder, options.folder)) or own_docs()
        browser = Browser(BrowserConfig(folders=folders, allow=tuple(options.allow)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for part in browser.readiness():
        print(f"{part.name}: {'ready' if part.ready else part.why}", file=sys.stderr)
    return asyncio.run(_demo(browser, " ".join(options.query), options.open))


async def _demo(browser: Browser, query: str, page: str | None) -> int:
    session = browser.session("demo")
    failed = False
    actions = [browser.search(session, query)] if query else []
    actions += [browser.open_page(session, page)] if page else []
    for action in actions:
        observation = await observed(action)
        print(observation.content)
        failed |= observation.error
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
