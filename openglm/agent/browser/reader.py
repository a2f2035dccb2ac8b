"""Opens a page, wherever it is: from the local folders, over HTTP, through Chromium when its scripts make it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from openglm.agent.browser.address import Resolver, resolve
from openglm.agent.browser.config import INSTALL, BrowserConfig, BrowserUnavailable
from openglm.agent.browser.fetch import Fetcher, FetchError, Reply
from openglm.agent.browser.index import LocalIndex
from openglm.agent.browser.page import Page, read_page
from openglm.agent.browser.render import render, why_not

__all__ = ["Reader", "packages_missing"]


def packages_missing() -> str:
    """What has to be installed for the browser to work at all, or nothing."""
    missing = []
    for name in ("httpx", "trafilatura", "pypdf", "protego", "lxml"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    return f"the browser needs {', '.join(missing)}: {INSTALL}" if missing else ""


class Reader:
    """Reads pages for one browser."""

    def __init__(self, config: BrowserConfig, index: LocalIndex, resolver: Resolver = resolve) -> None:
        self.config, self.index = config, index
        self.fetcher = Fetcher(config, resolver)

    async def read(self, url: str, javascript: bool | None = None) -> Page:
        """javascript: None leaves it to the configuration. Blocked, FetchError: ValueErrors of one line."""
        if self.index.folders:
            stored = await asyncio.to_thread(self.index.page, url.strip().partition("#")[0])
            if stored is not None:
                return stored
        if url.startswith("local:"):
            raise FetchError(f"there is no local document {url[:200]!r}. Search for it.")
        reply = await self.fetcher.get(url)
        page = await self._take_apart(reply)
        wanted = {"auto": page.needs_script, "never": False, "always": page.kind == "html"}[self.config.javascript]
        if page.kind != "html" or not (wanted if javascript is None else javascript):
            if page.needs_script and not page.note:
                page = replace(page, note="its text seems to be made by scripts, which were not run")
            return page
        try:
            return await self._take_apart(await render(self.fetcher, reply))
        except BrowserUnavailable as error:
            return replace(page, note=f"its text seems to be made by scripts: {error}")

    async def _take_apart(self, reply: Reply) -> Page:
        try:
            async with asyncio.timeout(self.config.timeout_s):
                return await asyncio.to_thread(read_page, reply)
        except TimeoutError:
            raise FetchError(
                f"{reply.url} is too long or too tangled to be read in {self.config.timeout_s:g} s"
            ) from None

    def javascript_why_not(self) -> str:
        return why_not(self.config)
