"""The tools of the All Tools suite: Python, a browser that sees a small site alone, and the functions.

    with SuiteTools() as suite: agent = Agent(backend, suite.of("mixed"))

A task sees the tools that its group is about, and Python always; tasks that need several kinds, or none, see all of
them. Which one to use, and whether, is for the model to decide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from urllib.parse import urlsplit

from openglm.agent.browser.citations import footnotes, sources_in
from openglm.agent.browser.site import SITE, SiteServer
from openglm.agent.events import Outcome
from openglm.agent.tools.browser import Browser, BrowserConfig, Folder
from openglm.agent.tools.function import FunctionTool
from openglm.agent.tools.python import PythonTool
from openglm.eval.all_tools.functions import FUNCTIONS
from openglm.types import StatefulTool, Tool

__all__ = ["SuiteTools", "cited_pages", "why_not"]

# Small models call what was declared last more readily: what is needed most stands there.
LAST = ("back", "scroll", "find", "quote", "click", "open_page", "search")
URL = re.compile(r"https?://[\w.:-]+/([\w./%-]*\w)")


def why_not() -> str:
    """The reason why the tools cannot run here, or nothing."""
    return PythonTool.why_not() or Browser.why_not()


class SuiteTools:
    """Runs the site for as long as its context lasts. ValueError where a tool cannot run."""

    def __init__(self) -> None:
        python = PythonTool()
        self._site = SiteServer()
        config = BrowserConfig(
            folders=(Folder(SITE, url=self._site.url, live=True),), allow=(self._site.host,), only=(self._site.host,),
            ports=(), backends=("local",), javascript="never", n_results=5,
        )  # fmt: skip
        functions: list[Tool] = [FunctionTool(f) for f in FUNCTIONS]
        browser = sorted(Browser(config).tools(), key=lambda tool: LAST.index(tool.spec.name))
        self.tools: list[Tool] = [*functions, *browser, python]
        self._groups: dict[str, list[Tool]] = {
            "maths-words": [python], "maths-large": [python], "search": [*browser, python],
            "functions": [*functions, python],
        }  # fmt: skip

    def of(self, group: str) -> Sequence[Tool]:
        """The tools that a task of the group sees."""
        return self._groups.get(group, self.tools)

    def __enter__(self) -> SuiteTools:
        self._site.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._site.__exit__(kind, value, trace)

    async def close(self) -> None:
        for tool in self.tools:
            if isinstance(tool, StatefulTool):
                await tool.close()


def cited_pages(outcome: Outcome) -> Sequence[str]:
    """Paths of the pages that an answer cites, by a mark with the number of a source or by an address."""
    sources = sources_in(record.observation.data for record in outcome.calls)
    marked = [urlsplit(note.url).path.lstrip("/") for note in footnotes(outcome.answer, sources).notes]
    seen = {urlsplit(source.url).path.lstrip("/") for source in sources.values()}
    return [*marked, *(path for path in URL.findall(outcome.answer) if path in seen)]
