"""The verbs `tools` (which tools are ready) and `mcp` (offer them to other programs), and the options both share.

python -m openglm tools --tools my_tools.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openglm.agent.toolbox import ToolboxConfig

__all__ = [
    "mcp_options",
    "mcp_serve",
    "toolbox_config",
    "toolbox_options",
    "tools_options",
    "tools_print",
    "tools_value",
]

KEYS_VARIABLE = "OPENGLM_API_KEY"


def toolbox_options(p: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Which tools there are; `toolbox_config` reads them."""
    p.add_argument("--tools", action="append", default=[], metavar="FILE|DIR|URL",
                   help="Python functions, a folder of them, or an OpenAPI document; may be given again")  # fmt: skip
    p.add_argument("--mcp", action="append", default=[], metavar="COMMAND|URL|FILE",
                   help='an MCP server, or a .json file with "mcpServers"; may be given again')  # fmt: skip
    p.add_argument("--search-in", action="append", default=[], metavar="DIR",
                   help="documents that the browser searches first; may be given again")  # fmt: skip
    p.add_argument("--allow-address", action="append", default=[], metavar="HOST|NETWORK",
                   help="private address that the browser may open, such as 10.0.0.0/8")  # fmt: skip
    p.add_argument("--image-model", metavar="PATH_OR_URL",
                   help="draws pictures: folder of a diffusers pipeline, or address of an images endpoint")  # fmt: skip
    p.add_argument("--no-python", action="store_true", help="without the Python tool")
    p.add_argument("--no-browser", action="store_true", help="without the web browser")
    p.add_argument("--unsafe-python", action="store_true",
                   help="run the model's Python code WITHOUT ISOLATION, with all your rights")  # fmt: skip


def toolbox_config(o: argparse.Namespace, builtin: bool = True) -> ToolboxConfig:
    """builtin: with the tools that come with the package. ValueError for what is named wrongly."""
    from openglm.agent.browser.config import BrowserConfig, Folder
    from openglm.agent.toolbox import ToolboxConfig
    from openglm.agent.tools.mcp_config import parse_servers

    if o.no_python and o.unsafe_python:
        raise ValueError("--no-python and --unsafe-python contradict each other: give one")
    servers = tuple(server for text in o.mcp for server in parse_servers(text))
    browser = BrowserConfig(folders=tuple(map(Folder, o.search_in)), allow=tuple(o.allow_address))
    return ToolboxConfig(
        python=builtin and not o.no_python, unsafe_python=o.unsafe_python,
        browser=browser if builtin and not o.no_browser else False,
        images=(o.image_model or True) if builtin else False, tools=tuple(o.tools), mcp_servers=servers,
    )  # fmt: skip


# -------------------------------------------------------------------- tools


def tools_options(p: argparse.ArgumentParser) -> None:
    toolbox_options(p)


def tools_value(o: argparse.Namespace) -> dict[str, Any]:
    """What --json prints: {"tools": [{name, description, ready, note}]}; the schema of those that are ready."""
    from openglm.agent.toolbox import Toolbox

    box = Toolbox(toolbox_config(o))
    try:
        schemas = {tool.spec.name: {"parameters": dict(tool.spec.parameters)} for tool in box.tools}
        return {"tools": [row._asdict() | schemas.get(row.name, {}) for row in box.rows()]}
    finally:
        asyncio.run(box.close())


def tools_print(value: dict[str, Any]) -> None:
    rows = value["tools"]
    width = max((len(row["name"]) for row in rows), default=0) + 2
    for row in rows:
        first = row["description"].partition("\n")[0]
        text = first if len(first) <= 100 else f"{first[:99]}…"
        print(f"{row['name']:<{width}}{'ready' if row['ready'] else 'missing':<9}{text or row['note']}")
        if row["ready"] and row["note"]:
            print(f"{'':<{width + 9}}{row['note']}")
    if not rows:
        print("no tools: --tools FILE reads functions, --mcp COMMAND asks an MCP server")


# -------------------------------------------------------------------- mcp


def mcp_options(p: argparse.ArgumentParser) -> None:
    toolbox_options(p)
    p.add_argument("--http", type=int, metavar="PORT", help="listen there; 0 takes a free port (default: stdio)")
    p.add_argument("--host", default="127.0.0.1", help="with --http: address (default: 127.0.0.1, this machine alone)")
    p.add_argument("--api-key", action="append", default=[], metavar="KEY",
                   help=f"with --http: clients must send one of these (also: {KEYS_VARIABLE})")  # fmt: skip


def mcp_serve(o: argparse.Namespace) -> int:
    from openglm import __version__
    from openglm.agent.toolbox import Toolbox

    try:
        import mcp  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("an MCP server needs the SDK: pip install 'openglm[mcp]'") from None
    from openglm.agent.mcp_server import ToolServer, serve_http, serve_stdio

    if o.http is not None and not 0 <= o.http <= 65535:
        raise ValueError(f"--http must be a port of 0 to 65535, not {o.http}")
    with contextlib.redirect_stdout(sys.stderr):  # files of functions may print: standard output is for messages
        box = Toolbox(toolbox_config(o))
    for row in box.rows():
        about = "ready" if row.ready else f"missing: {row.note}"
        print(f"openglm: tool {row.name} {about}", file=sys.stderr)
    if not box.tools:
        raise ValueError("there is no tool to offer")
    server = ToolServer(box, __version__)
    if o.http is None:
        asyncio.run(serve_stdio(server))
    else:
        keys = (*o.api_key, *os.environ.get(KEYS_VARIABLE, "").split())
        asyncio.run(serve_http(server, o.http, o.host, keys))
    return 0
