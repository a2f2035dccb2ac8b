"""A small MCP server made with the official SDK, for tests of our client.

python tests/mcp_helpers.py        over standard input and output
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import AudioContent, BlobResourceContents, EmbeddedResource, ResourceLink, TextResourceContents

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8


def make_server() -> MCPServer:
    server = MCPServer("small")

    @server.tool()
    def add(a: int, b: int = 1) -> int:
        """Adds two numbers."""
        return a + b

    @server.tool()
    def person(name: str) -> dict[str, Any]:
        """Describes a person."""
        return {"name": name, "age": 3}

    @server.tool()
    def picture() -> Image:
        """Draws."""
        return Image(data=PNG, format="png")

    @server.tool(structured_output=False)
    def things() -> list[Any]:
        """Gives all kinds of content."""
        page = TextResourceContents(uri="memo://a", text="the page", mime_type="text/plain")
        table = BlobResourceContents(uri="file:///data/table.csv", blob="YSxi", mime_type="text/csv")
        return [
            "words", AudioContent(type="audio", data="UklGRg==", mime_type="audio/wav"),
            EmbeddedResource(type="resource", resource=page), EmbeddedResource(type="resource", resource=table),
            ResourceLink(type="resource_link", name="more", uri="https://example.org/more", description="the rest"),
        ]  # fmt: skip

    @server.tool()
    def fails() -> str:
        """Fails."""
        raise ToolError("out of order")

    @server.tool()
    async def slow(context: Context) -> str:
        """Takes long."""
        await context.report_progress(1, 2, "half")
        await asyncio.sleep(60)
        return "late"

    @server.tool(name="process.about")
    def about() -> dict[str, Any]:
        """Says which process this is, and what it sees."""
        return {"pid": os.getpid(), "environment": dict(os.environ)}

    @server.tool()
    def die() -> str:
        """Ends the server."""
        print("I leave\n", file=sys.stderr, flush=True)
        os._exit(3)

    return server


if __name__ == "__main__":
    make_server().run("stdio")
