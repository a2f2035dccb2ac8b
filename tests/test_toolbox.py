"""The tools of an agent put together: what is ready, what is not and why, and that all is let go.

python -m pytest tests/test_toolbox.py
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from openglm.agent import toolbox
from openglm.agent.isolation import Bubblewrap, missing_packages
from openglm.agent.toolbox import Missing, Toolbox, ToolboxConfig
from openglm.agent.tools.python import PythonTool
from openglm.cli import main
from openglm.types import Observation, ToolContext, ToolSpec


def run(code: str, box: Toolbox) -> Observation:
    async def go() -> Observation:
        try:
            return await box.tools[0].call({"code": code}, ToolContext())
        finally:
            await box.close()

    return asyncio.run(go())


def test_python_is_isolated_or_missing_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no isolation on this machine"
    monkeypatch.setattr(PythonTool, "why_not", staticmethod(lambda config=None: reason))
    box = Toolbox(ToolboxConfig(browser=False))
    assert box.tools == [] and "python" in [m.name for m in box.missing]
    row = box.rows()[0]
    assert not row.ready and reason in row.note and "--unsafe-python" in row.note
    assert Toolbox(ToolboxConfig(python=False, images=False)).missing == []


def test_the_browser_is_one_tool_or_several_and_tells_of_its_back_ends() -> None:
    parts = {"python": False, "images": False}
    box = Toolbox(ToolboxConfig(**parts))  # type: ignore[arg-type]
    assert [tool.spec.name for tool in box.tools][:2] == ["search", "open_page"]
    backends = {row.name: row for row in box.rows() if row.name.startswith("search by ")}
    assert not backends["search by brave"].ready and "BRAVE" in backends["search by brave"].note
    native = Toolbox(ToolboxConfig(builtin=frozenset({"simple_browser"}), **parts))  # type: ignore[arg-type]
    assert [tool.spec.name for tool in native.tools] == ["simple_browser"]
    run_end(box)


def run_end(box: Toolbox) -> None:
    """What the tools share is closed once, and refuses further calls."""
    browser = box.tools[0].state  # type: ignore[attr-defined]
    asyncio.run(box.close())
    with pytest.raises(ValueError, match="closed"):
        browser.session("x")


@pytest.mark.skipif(bool(Bubblewrap().why_not()), reason="no sandbox here")
def test_the_python_tool_of_a_toolbox_runs_in_the_sandbox() -> None:
    box = Toolbox()
    box.check_integrity()
    assert "no network" in box.tools[0].spec.description and box.rows()[0].note == ""
    assert run("import os; 6 * 7, os.getuid()", box).content == "(42, 1000)"


@pytest.mark.skipif(bool(missing_packages()), reason="no kernel here")
def test_python_without_isolation_is_loud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        box = Toolbox(ToolboxConfig(unsafe_python=True))
    assert any("WITHOUT ISOLATION" in record.getMessage() for record in caplog.records)
    assert "WITHOUT ISOLATION" in box.tools[0].spec.description and "WITHOUT ISOLATION" in box.rows()[0].note
    assert run("6 * 7", box).content == "42"


class Held:
    """A tool that holds something."""

    def __init__(self, name: str, fails: bool = False) -> None:
        self.spec = ToolSpec(name, "", {})
        self.fails, self.ended, self.closed = fails, [""], False

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        return Observation("")

    async def end(self, conversation: str) -> None:
        self.ended.append(conversation)

    async def close(self) -> None:
        self.closed = True
        if self.fails:
            raise RuntimeError("stuck")


def test_all_tools_are_closed_even_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Held("a", fails=True), Held("b")
    monkeypatch.setattr(toolbox, "BUILTIN", (lambda c: first, lambda c: Missing("c", "why", "how"), lambda c: second))
    box = Toolbox()
    assert [row.name for row in box.rows()] == ["a", "b", "c"] and box.rows()[2].note == "why (how)"
    asyncio.run(box.end("x"))
    assert first.ended[-1] == second.ended[-1] == "x"
    with pytest.raises(RuntimeError, match="stuck"):
        asyncio.run(box.close())
    assert first.closed and second.closed


# -------------------------------------------------------------------- the verbs


def test_the_list_of_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(PythonTool, "why_not", staticmethod(lambda config=None: "no isolation here"))
    path = tmp_path / "mine.py"
    path.write_text("def add(a: int) -> int:\n    'Adds.'\n    return a\n")
    assert main(["tools", "--tools", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ready, missing = (next(line for line in lines if line.startswith(name)) for name in ("add", "python"))
    assert ready.split() == ["add", "ready", "Adds."]
    assert " ".join(missing.split()).startswith("python missing no isolation here (") and "--unsafe-python" in missing
    assert main(["tools", "--tools", str(path), "--no-python", "--json"]) == 0
    row = next(row for row in json.loads(capsys.readouterr().out)["tools"] if row["name"] == "add")
    assert row == {"name": "add", "description": "Adds.", "ready": True, "note": "",
                   "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                                  "additionalProperties": False}}  # fmt: skip
    assert main(["tools", "--no-python"]) == 0 and "python" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tools", "--tools", "nowhere.py"], "no file or folder nowhere.py"),
        (["tools", "--mcp", "nowhere.json"], "no file nowhere.json with MCP servers"),
        (["tools", "--no-python", "--unsafe-python"], "contradict each other"),
        (["mcp", "--no-python", "--no-browser"], "there is no tool to offer"),
        (["mcp", "--http", "70000"], "--http must be a port of 0 to 65535"),
        (["mcp", "--no-python", "--tools", "add.py", "--http", "0", "--host", "0.0.0.0"], "give --api-key"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENGLM_API_KEY", raising=False)
    (tmp_path / "add.py").write_text("def add(a: int) -> int:\n    'Adds.'\n    return a\n")
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err.splitlines()[-1] and captured.out == ""
