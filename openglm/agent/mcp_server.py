"""OpenGLM's own tools offered to other programs, as an MCP server.

openglm mcp                     over standard input and output
openglm mcp --http 8765         at http://127.0.0.1:8765/mcp
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from openglm.agent.schema import schema_error
from openglm.agent.toolbox import Toolbox
from openglm.agent.tools.mcp_client import CONVERSATION
from openglm.agent.tools.mcp_result import result_of
from openglm.types import Observation, ToolContext

__all__ = ["ToolServer", "http_app", "serve_http", "serve_stdio"]

MAX_CONVERSATIONS, CALL_S = 64, 300.0
UNSUPPORTED_VERSION = -32022  # the protocol's number
_MAX_PROBE = 1 << 20  # bytes of a request that is refused
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ToolServer:
    """The tools of a toolbox behind the SDK's server. Tools that keep state keep one for each session of a client, or
    for each conversation that a call names in its _meta; of these the last 64 are kept.
    """

    def __init__(self, toolbox: Toolbox, version: str = "") -> None:
        from mcp.server import Server

        self.toolbox = toolbox
        self._tools = {tool.spec.name: tool for tool in toolbox.tools}
        self._conversations: OrderedDict[str, None] = OrderedDict()
        self.server: Any = Server("openglm", version=version, on_list_tools=self._list, on_call_tool=self._call)

    async def _list(self, context: Any, params: Any) -> Any:
        from mcp import types

        tools = [
            types.Tool(name=name, description=tool.spec.description, input_schema=dict(tool.spec.parameters))
            for name, tool in self._tools.items()
        ]
        return types.ListToolsResult(tools=tools)

    async def _call(self, context: Any, params: Any) -> Any:
        tool, arguments = self._tools.get(params.name), params.arguments or {}
        if tool is None:
            return result_of(Observation(f"There is no tool {params.name!r}.", error=True))
        if problem := schema_error(tool.spec, arguments):
            return result_of(Observation(f"The call was not made: {problem}.", error=True))
        conversation = await self._conversation(context)
        output = Progress(context.session.report_progress)
        try:
            observation = await tool.call(arguments, ToolContext(conversation, timeout_s=CALL_S, on_output=output.take))
        except ValueError as error:
            observation = Observation(f"The call was not made: {error}", error=True)
        finally:
            await output.close()
        return await asyncio.to_thread(result_of, observation)

    async def _conversation(self, context: Any) -> str:
        """A name of our own for what the client calls its conversation."""
        headers: Mapping[str, str] = getattr(context.request, "headers", None) or {}
        session = headers.get("mcp-session-id", "")
        key = f"{session} {(context.meta or {}).get(CONVERSATION, '')} {headers.get('authorization', '')}"
        name = f"mcp-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._conversations[name] = None
        self._conversations.move_to_end(name)
        while len(self._conversations) > MAX_CONVERSATIONS:
            await self.toolbox.end(self._conversations.popitem(last=False)[0])
        return name


class Progress:
    """Output of a tool, from any thread, as notices of progress to a client that asked for them."""

    def __init__(self, report: Callable[[float, float | None, str | None], Awaitable[None]]) -> None:
        self._report, self._loop = report, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._send())

    def take(self, stream: str, text: str) -> None:
        if text and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, text)

    async def _send(self) -> None:
        count = 0
        while (text := await self._pieces.get()) is not None:
            count += 1
            await self._report(float(count), None, text[:2000])

    async def close(self) -> None:
        self._pieces.put_nowait(None)
        await asyncio.wait([self._task], timeout=5)
        self._task.cancel()


async def serve_stdio(server: ToolServer) -> None:
    """Until the client closes its side. What tools print goes to standard error."""
    from mcp.server.stdio import stdio_server

    try:
        async with stdio_server() as (incoming, outgoing):
            await server.server.run(incoming, outgoing, server.server.create_initialization_options())
    finally:
        await server.toolbox.close()


def http_app(server: ToolServer, host: str = "127.0.0.1", keys: tuple[str, ...] = ()) -> Any:
    """The ASGI application, with the endpoint /mcp. keys: a client must send one of them as a bearer token.

    Only versions of the protocol that have sessions are spoken: without one, nothing would tell clients apart, and they
    would share their variables. Clients of later versions are told so, and begin a session.
    """
    from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

    app = server.server.streamable_http_app(host=host)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            version = headers.get(b"mcp-protocol-version", b"").decode("latin-1")
            if keys and not _is_known(headers.get(b"authorization", b""), keys):
                text = b"an API key is needed: Authorization: Bearer KEY\n"
                return await _answer(send, 401, text, (b"www-authenticate", b"Bearer"))
            if version and version not in HANDSHAKE_PROTOCOL_VERSIONS and scope["method"] == "POST":
                body = await _other_version(receive, version, HANDSHAKE_PROTOCOL_VERSIONS)
                return await _answer(send, 400, body, (b"content-type", b"application/json"))
        return await app(scope, receive, send)

    return guarded


async def _other_version(receive: Any, version: str, spoken: Sequence[str]) -> bytes:
    """The protocol's own error for a request of a version that is not spoken."""
    body = bytearray()
    while (message := await receive())["type"] == "http.request" and len(body) <= _MAX_PROBE:
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    try:
        id = json.loads(body).get("id")
    except (ValueError, AttributeError, RecursionError):
        id = None
    error = {"code": UNSUPPORTED_VERSION, "message": f"the protocol's version {version} has no sessions",
             "data": {"supported": list(spoken), "requested": version}}  # fmt: skip
    return json.dumps({"jsonrpc": "2.0", "id": id, "error": error}).encode()


async def _answer(send: Any, status: int, body: bytes, header: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [header]})
    await send({"type": "http.response.body", "body": body})


def _is_known(given: bytes, keys: tuple[str, ...]) -> bool:
    matches = [hmac.compare_digest(given, b"Bearer " + key.encode()) for key in keys]
    return any(matches)


async def serve_http(server: ToolServer, port: int, host: str = "127.0.0.1", keys: tuple[str, ...] = ()) -> None:
    """Until it is told to stop. Says on standard error where it listens; port 0 takes a free one. Elsewhere than on
    this machine alone it needs keys: ValueError without.
    """
    import uvicorn

    if host not in LOOPBACK and not keys:
        raise ValueError(f"--host {host} opens the tools to other machines: give --api-key")
    config = uvicorn.Config(http_app(server, host, keys), host=host, port=port, log_level="error", lifespan="on")
    listener = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    place = sockets[0].getsockname()[1]
    print(f"openglm: tools at http://{host}:{place}/mcp", file=sys.stderr, flush=True)
    try:
        await listener.serve(sockets)
    finally:
        await server.toolbox.close()
