"""Tools of MCP servers: child processes (stdio) and servers on the network (streamable HTTP), through the official SDK.

Each connection lives in a thread with a loop of its own, so that tools can be called from any loop. A server that ended
is started anew at the next call, once; a call that was under way when it ended is not repeated.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from openglm.agent.schema import check_schema
from openglm.agent.tools.function import NAME
from openglm.agent.tools.mcp_config import MCPServerConfig
from openglm.agent.tools.mcp_result import observe
from openglm.types import Observation, Tool, ToolContext, ToolSpec

__all__ = ["MCPConnection", "MCPTool", "connect_servers"]

log = logging.getLogger(__name__)
CONVERSATION = "openglm/conversation"  # name in _meta: servers that keep state may keep one for each
CLOSE_S, MAX_PAGES, MAX_DESCRIPTION = 15.0, 50, 2000


class Gone(Exception):
    """The connection is closed. before_call: the call was not sent."""

    def __init__(self, reason: str, before_call: bool) -> None:
        super().__init__(reason)
        self.before_call = before_call


class Session:
    """One life of a connection: its thread, from the handshake until `stop` or the end of the server."""

    def __init__(self, config: MCPServerConfig) -> None:
        self.config = config
        self.tools: list[Any] = []
        self.closed = False
        self._opened: Future[None] = Future()
        self._errors = ErrorOutput()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=f"mcp-{config.name}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it has its list of tools; ValueError where it cannot be had."""
        self._opened.result()

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:
            self._fail(error)
        finally:
            self.closed = True
            self._errors.close()
            if not self._opened.done():
                self._fail(None)

    def _fail(self, error: BaseException | None) -> None:
        if self._opened.done():
            return
        reason = reason_of(error) if error is not None else "it ended"
        said = self._errors.last_line()
        self._opened.set_exception(ValueError(f"{self.config.place}: {reason}{f' ({said})' if said else ''}"))

    async def _live(self) -> None:
        from mcp import Client

        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(self.config.start_timeout_s):
                transport = self._watched(await self._transport(stack))
                self._client = await stack.enter_async_context(Client(transport))
                cursor = None
                for _ in range(MAX_PAGES):
                    page = await self._client.list_tools(cursor=cursor)
                    self.tools += page.tools
                    if (cursor := page.next_cursor) is None:
                        break
            self._opened.set_result(None)
            await self._stop.wait()
            self.closed = True

    async def _transport(self, stack: AsyncExitStack) -> Any:
        config = self.config
        if config.url:
            import httpx2
            from mcp.client.streamable_http import streamable_http_client

            timeout = httpx2.Timeout(config.start_timeout_s, read=None)  # calls have limits of their own
            client = httpx2.AsyncClient(headers=dict(config.headers), timeout=timeout)
            return streamable_http_client(config.url, http_client=await stack.enter_async_context(client))
        from mcp.client.stdio import StdioServerParameters, stdio_client

        parameters = StdioServerParameters(
            command=config.command, args=list(config.args), env=dict(config.env), cwd=config.cwd or None
        )
        return stdio_client(parameters, errlog=self._errors.file)

    @asynccontextmanager
    async def _watched(self, transport: Any) -> AsyncIterator[tuple[Any, Any]]:
        """The same streams, and word when the server closes its side."""
        import anyio

        async with transport as (incoming, outgoing):
            send, receive = anyio.create_memory_object_stream[Any](0)

            async def forward() -> None:
                async with send:
                    try:
                        async for message in incoming:
                            await send.send(message)
                    except (anyio.ClosedResourceError, anyio.BrokenResourceError):
                        pass
                self.closed = True
                if self._stop is not None:
                    self._stop.set()

            async with anyio.create_task_group() as group:
                group.start_soon(forward)
                try:
                    yield receive, outgoing
                finally:
                    group.cancel_scope.cancel()

    async def call(self, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Run it with the client, from whatever loop; Gone when the connection is or gets closed."""
        if self.closed or self._loop is None or not self._thread.is_alive():
            raise Gone("it has ended", before_call=True)
        task = asyncio.run_coroutine_threadsafe(self._guarded(work), self._loop)
        try:
            return await asyncio.wrap_future(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise Gone("the connection was closed during the call", before_call=False) from None

    async def _guarded(self, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        try:
            return await work(self._client)
        except MCPError as error:
            if error.code == CONNECTION_CLOSED or self.closed:
                said = self._errors.last_line()
                raise Gone(f"it ended during the call{f' ({said})' if said else ''}", before_call=False) from None
            raise

    def stop(self) -> None:
        """End the connection and the child process; returns when it is over."""
        self.closed = True
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._stop.set)
            except RuntimeError:
                pass  # it has just ended
        self._thread.join(CLOSE_S)


class ErrorOutput:
    """What a child process says on its standard error: read all the time, its end kept."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.file = os.fdopen(writing, "w")
        self._text = ""
        self._thread = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._thread.start()

    def _read(self, fd: int) -> None:
        with os.fdopen(fd, "rb", buffering=0) as file:
            while piece := file.read(4096):
                self._text = (self._text + piece.decode(errors="replace"))[-4000:]

    def close(self) -> None:
        self.file.close()
        self._thread.join(0.5)  # a grandchild may hold the other end

    def last_line(self) -> str:
        """Of a child that has ended: what it said last is in the pipe, but may not have been read yet."""
        until = time.monotonic() + 1.0
        while not self._text and time.monotonic() < until:
            time.sleep(0.01)
        lines = [line.strip() for line in self._text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""


class MCPConnection:
    """A server that is kept, or started anew when it has ended. Thread-safe."""

    def __init__(self, config: MCPServerConfig) -> None:
        self.config = config
        self._guard = threading.Lock()
        self._session: Session | None = Session(config)
        self._closed = False
        _OPEN.add(self)

    def tools(self) -> list[Any]:
        """The SDK's descriptions of its tools; ValueError when it did not start."""
        session = self._session
        assert session is not None
        session.wait()
        return session.tools

    def _current(self) -> Session:
        """The session, a new one where the last has ended. Blocks while it starts."""
        with self._guard:
            if self._closed:
                raise ValueError(f"the connection to {self.config.place} is closed")
            if self._session is None or self._session.closed:
                if self._session is not None:
                    log.warning("the MCP server %s has ended: it is started anew", self.config.place)
                    self._session.stop()
                self._session = Session(self.config)
            session = self._session
        session.wait()
        return session

    async def call(self, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Gone, or ValueError where it cannot be started again."""
        session = await asyncio.to_thread(self._current)
        try:
            return await session.call(work)
        except Gone as gone:
            if not gone.before_call:
                raise
        session = await asyncio.to_thread(self._current)
        return await session.call(work)

    def close(self) -> None:
        self._closed = True
        with self._guard:
            session, self._session = self._session, None
        if session is not None:
            session.stop()


class MCPTool:
    """A Tool of a server. name: another one than the server's own, where that is taken or no name for a function."""

    def __init__(self, connection: MCPConnection, described: Any, name: str) -> None:
        self.connection, self._name = connection, described.name
        place = connection.config.place
        self.source, self.note = f"{described.name} of the MCP server {place}", f"of the MCP server {place}"
        text = described.description or getattr(described, "title", None) or described.name
        self.spec = ToolSpec(name, text[:MAX_DESCRIPTION], described.input_schema)

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        """What the server answered; an Observation with error where it refuses, ends, or takes too long."""
        from mcp import MCPError

        limit = context.timeout_s or self.connection.config.timeout_s

        async def progress(done: float, total: float | None, message: str | None) -> None:
            share = f"{done:g}" if total is None else f"{done:g} of {total:g}"
            context.on_output("progress", f"{share} {message or ''}".strip() + "\n")

        def work(client: Any) -> Coroutine[Any, Any, Any]:
            meta = {CONVERSATION: context.conversation}
            return client.call_tool(
                self._name, arguments, read_timeout_seconds=limit, progress_callback=progress, meta=meta
            )

        clock = asyncio.timeout(limit)
        try:
            async with clock:
                result = await self.connection.call(work)
            return observe(result, self.spec.name)
        except Gone as gone:
            return self._failed(f"{gone}; it is started anew at the next call")
        except MCPError as error:
            is_late = "timed out" in error.message
            return self._failed(f"no answer within {limit:g} s" if is_late else reason_of(error))
        except TimeoutError:
            return self._failed(f"no answer within {limit:g} s" if clock.expired() else "it took too long")
        except Exception as error:
            return self._failed(reason_of(error))

    def _failed(self, reason: str) -> Observation:
        return Observation(f"{self.spec.name} failed: MCP server {self.connection.config.name}: {reason}", error=True)

    async def end(self, conversation: str) -> None:
        """Servers are not told of the ends of conversations."""

    async def close(self) -> None:
        await asyncio.to_thread(self.connection.close)


def connect_servers(
    configs: Sequence[MCPServerConfig], taken: Sequence[str]
) -> tuple[list[Tool], list[tuple[str, str]]]:
    """(tools, (server or tool, why it is missing)). All servers start at once. taken: names of other tools; a tool
    whose name is among them, or that of an earlier server, gets that of its server in front.
    """
    try:
        import mcp  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("MCP servers need the SDK: pip install 'openglm[mcp]'") from None
    connections = [MCPConnection(config) for config in configs]
    tools: list[Tool] = []
    missing: list[tuple[str, str]] = []
    names = set(taken)
    for connection in connections:
        try:
            described = connection.tools()
        except ValueError as error:
            missing.append((connection.config.name, str(error)))
            connection.close()
            continue
        for item in described:
            name = item.name if NAME.fullmatch(item.name) and item.name not in names else _full_name(connection, item)
            try:
                tool = MCPTool(connection, item, name)
                check_schema(tool.spec)
                if name in names:
                    raise ValueError("two of its tools have one name")
            except ValueError as error:
                missing.append((f"{connection.config.name} {item.name}", str(error)))
                continue
            names.add(name)
            tools.append(tool)
        if not described:
            missing.append((connection.config.name, f"{connection.config.place} has no tools"))
            connection.close()
    return tools, missing


def _full_name(connection: MCPConnection, described: Any) -> str:
    text = f"{connection.config.name}_{described.name}"
    return "".join(c if NAME.fullmatch(c) else "_" for c in text)[:64]


def reason_of(error: BaseException) -> str:
    """In one line; of groups, the first that says something."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, FileNotFoundError):
        return f"no command {error.filename}"
    text = " ".join(str(error).split())[:300]
    return text or type(error).__name__


_OPEN: weakref.WeakSet[MCPConnection] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for connection in list(_OPEN):
        connection.close()
