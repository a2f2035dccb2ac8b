"""The tools of an agent: which are ready here, and why the others are not.

    openglm tools            lists them

One table, BUILTIN, holds the tools that come with the package: a function each, that makes the tool as ToolboxConfig
says, says why there is none here, or returns None where it is not wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from openglm.agent.browser.config import BrowserConfig
from openglm.agent.dispatch import holders
from openglm.agent.images import ImageBackend, ImageUnavailable
from openglm.agent.images_open import open_images
from openglm.agent.sandbox_config import SandboxConfig
from openglm.agent.tools.mcp_config import MCPServerConfig
from openglm.types import Tool

__all__ = ["BUILTIN", "Missing", "Row", "Toolbox", "ToolboxConfig"]


@dataclass(frozen=True, kw_only=True)
class ToolboxConfig:
    """Which tools an agent has.

    python: the Python tool, True for its default limits. unsafe_python: it runs without isolation, with all rights of
    this user. folder: keeps the files of conversations (None: they go with the toolbox). tools: Python files, folders
    of them, OpenAPI documents (see tools/load.py). mcp_servers: see tools/mcp_config.py, whose `parse_servers` reads
    what a user names. images: what draws pictures, a folder or an address as `open_images` takes it; True for what
    OPENGLM_IMAGE_MODEL says. browser: True for its defaults. builtin: tools that the model knows without a schema
    (`ChatFormat.builtin_tools`); for it the browser is one tool, for others a function for each thing to do.
    """

    python: bool | SandboxConfig = True
    unsafe_python: bool = False
    folder: Path | None = None
    tools: tuple[str | Path, ...] = ()
    mcp_servers: tuple[MCPServerConfig, ...] = ()
    images: bool | str | ImageBackend = True
    browser: bool | BrowserConfig = True
    builtin: frozenset[str] = frozenset()


class Row(NamedTuple):
    """One line of the list of tools. note: what people must know of a tool that is ready, or why another is not."""

    name: str
    description: str
    ready: bool
    note: str


class Missing(NamedTuple):
    """A tool that is not ready: its name, why, and what helps."""

    name: str
    why: str
    remedy: str


def _python(config: ToolboxConfig) -> Tool | Missing | None:
    if config.python is False:
        return None
    from openglm.agent.tools.python import PythonTool

    sandbox = SandboxConfig() if config.python is True else config.python
    sandbox = replace(sandbox, unsafe_python=sandbox.unsafe_python or config.unsafe_python)
    if why := PythonTool.why_not(sandbox):
        return Missing("python", why, "docs/TOOLS.md, or --unsafe-python: code of the model then has all your rights")
    return PythonTool(sandbox, config.folder)


def _images(config: ToolboxConfig) -> Tool | Missing | None:
    if config.images is False:
        return None
    from openglm.agent.tools.image import ImageTool

    if not isinstance(config.images, bool | str):
        return ImageTool(config.images)
    try:
        return ImageTool(open_images(None if config.images is True else config.images))
    except ImageUnavailable as error:
        if isinstance(config.images, str):
            raise
        return Missing("cogview", error.why, error.remedy)


def _browser(config: ToolboxConfig) -> list[Tool] | Missing | None:
    if config.browser is False:
        return None
    from openglm.agent.tools.browser import Browser

    browser = BrowserConfig() if config.browser is True else config.browser
    if why := Browser.why_not(browser):
        return Missing("simple_browser", why, "pip install 'openglm[agent]'")
    return Browser(browser).tools(native="simple_browser" in config.builtin)


Made = Tool | list[Tool] | Missing | None
BUILTIN: tuple[Callable[[ToolboxConfig], Made], ...] = (_python, _browser, _images)


class Toolbox:
    """tools: those that are ready, with names of their own. missing: the others. Close it when it is done with.

    ValueError for what the user named and cannot be used.
    """

    def __init__(self, config: ToolboxConfig | None = None) -> None:
        self.config = config or ToolboxConfig()
        self.tools: list[Tool] = []
        self.missing: list[Missing] = []
        own: list[Tool] = []
        if self.config.tools:
            from openglm.agent.tools.load import load_tools, refuse_clashes

            own = [tool for path in self.config.tools for tool in load_tools(path)]  # before anything is started
        for make in BUILTIN:
            made = make(self.config)
            if isinstance(made, Missing):
                self.missing.append(made)
            elif isinstance(made, list):
                self.tools += made
            elif made is not None:
                self.tools.append(made)
        if own:
            refuse_clashes([*self.tools, *own])
            self.tools += own
        if self.config.mcp_servers:
            from openglm.agent.tools.mcp_client import connect_servers

            tools, missing = connect_servers(self.config.mcp_servers, [tool.spec.name for tool in self.tools])
            self.tools += tools
            self.missing += [Missing(name, why, "check what --mcp names") for name, why in missing]

    @property
    def reasons(self) -> dict[str, str]:
        """Why tools are missing, by name, as a model is told that calls one all the same."""
        return {missing.name: missing.why for missing in self.missing}

    def rows(self) -> list[Row]:
        """The list for people: tools that are ready, then the others."""
        ready = [Row(t.spec.name, t.spec.description, True, getattr(t, "note", "")) for t in self.tools]
        parts = [
            Row(f"search by {part.name}" if part.name != "javascript" else part.name, "", part.ready, part.why)
            for holder in holders(self.tools)
            for part in getattr(holder, "readiness", list)()
        ]
        return ready + parts + [Row(m.name, "", False, f"{m.why} ({m.remedy})") for m in self.missing]

    async def end(self, conversation: str) -> None:
        """Let go of what the tools hold for one conversation."""
        for holder in holders(self.tools):
            await holder.end(conversation)

    async def close(self) -> None:
        """Let go of all processes, connections and files; an error of one tool does not keep the others."""
        failed: list[Exception] = []
        for holder in holders(self.tools):
            try:
                await holder.close()
            except Exception as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def check_integrity(self) -> None:
        names = [tool.spec.name for tool in self.tools]
        assert len(set(names)) == len(names), "two tools of one name"
