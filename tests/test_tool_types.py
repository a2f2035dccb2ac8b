"""The vocabulary of tools: what a tool hands back, and which tools hold state."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from openglm.types import Observation, StatefulTool, Tool, ToolContext, ToolFile, ToolSpec


class Echo:
    spec = ToolSpec("echo", "Says it again.", {"type": "object", "properties": {"text": {"type": "string"}}})

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        context.on_output("progress", context.conversation)
        return Observation(arguments["text"])


class Keeping(Echo):
    async def end(self, conversation: str) -> None: ...

    async def close(self) -> None: ...


def test_a_file_holds_bytes_or_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"there")
    assert ToolFile("a.txt", "text/plain", path=tmp_path / "a.txt").read() == b"there"
    assert ToolFile("empty", "text/plain", b"").read() == b""
    for content, path in ((None, None), (b"", tmp_path)):
        with pytest.raises(ValueError, match="bytes or its path"):
            ToolFile("a.txt", "text/plain", content, path)


def test_a_tool_is_called_and_told_of() -> None:
    tool: Tool = Echo()
    heard: list[tuple[str, str]] = []
    context = ToolContext("c1", on_output=lambda stream, text: heard.append((stream, text)))
    assert asyncio.run(tool.call({"text": "hi"}, context)) == Observation("hi") and heard == [("progress", "c1")]
    assert asyncio.run(tool.call({"text": "hi"}, ToolContext())).error is False
    assert isinstance(Keeping(), StatefulTool) and not isinstance(tool, StatefulTool)
