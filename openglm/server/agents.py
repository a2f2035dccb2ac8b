"""Agents: the tools that the server runs, for all conversations, and what belongs to them.

One set of tools serves everyone; their state (variables, pages, folders) is kept by conversation, and a conversation
belongs to the caller that began it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openglm.agent.agent import Agent
from openglm.agent.events import (
    AgentConfig,
    AgentEvent,
    Asked,
    Called,
    Finished,
    Observed,
    Outcome,
    Output,
    Planned,
    Said,
    Thought,
)
from openglm.agent.trace import TraceWriter
from openglm.server.errors import ApiError
from openglm.server.events import (
    AnswerEvent,
    CallArguments,
    CallOpened,
    Finish,
    Observation,
    Reasoning,
    Text,
)
from openglm.server.files import FileStore
from openglm.types import ChatBackend, Message, Tool, ToolCall, ToolSpec

if TYPE_CHECKING:
    from openglm.agent.toolbox import Toolbox

__all__ = ["AgentTask", "Agents", "Answering", "stricter"]

KINDS = {  # names of OpenGLM's, and of the GLM-4 All Tools API
    "python": "python", "code_interpreter": "python", "simple_browser": "simple_browser",
    "web_browser": "simple_browser", "cogview": "cogview", "drawing_tool": "cogview",
}  # fmt: skip
MAX_CONVERSATIONS = 256
IDLE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class AgentTask:
    """What a request asks an agent for. tools: those of the server; external: those of the client."""

    messages: Sequence[Message]
    tools: Sequence[Tool]
    external: Sequence[ToolSpec] = ()
    config: AgentConfig = field(default_factory=AgentConfig)
    sampling: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()


class Agents:
    """toolbox: is closed with it. config: limits and rules of every request, which may only be told more strictly.

    trace_dir: gets a trace of each request, in which `model` is named; None: none is written.
    """

    def __init__(
        self, toolbox: Toolbox, config: AgentConfig, files: FileStore, trace_dir: Path | None = None, model: str = ""
    ) -> None:
        self.toolbox, self.config, self.files = toolbox, config, files
        self._trace_dir, self._model = trace_dir, model
        self._waiting: dict[str, tuple[str, asyncio.Future[bool]]] = {}  # calls that wait for the user
        self._conversations: OrderedDict[str, tuple[float, asyncio.Lock]] = OrderedDict()

    @property
    def names(self) -> list[str]:
        return [tool.spec.name for tool in self.toolbox.tools]

    def tools_of(self, kind: str, where: str) -> list[Tool]:
        """Tools of the kind that a request names. ApiError says why there are none."""
        if kind == "all_tools":
            return list(self.toolbox.tools)
        wanted = KINDS[kind]
        found = [tool for tool in self.toolbox.tools if getattr(tool, "group", tool.spec.name) == wanted]
        if not found:
            why = next((f": {m.why}" for m in self.toolbox.missing if m.name == wanted), "")
            raise ApiError(f"{where}.type: this server has no tool {kind}{why}", f"{where}.type")
        return found

    def settle(self, client: str, call_id: str, allowed: bool) -> None:
        """The user's answer about a call. ApiError when none waits by that id, or for another caller."""
        owner, answer = self._waiting.get(call_id, ("", None))
        if answer is None or owner != client or answer.done():
            raise ApiError(f"id: no call {call_id[:80]!r} waits for approval", "id", 404, "call_not_found")
        answer.set_result(allowed)

    # ---------------------------------------------------------------- conversations

    @asynccontextmanager
    async def conversation(self, client: str, name: str | None) -> AsyncIterator[str]:
        """The name under which the tools keep its state; one request at a time. Without a name it ends here."""
        if name is None:
            alone = f"once-{secrets.token_hex(12)}"
            try:
                yield alone
            finally:
                await self.toolbox.end(alone)
            return
        key = f"{hashlib.sha256(client.encode()).hexdigest()[:12]}-{name}"
        _, lock = self._conversations.setdefault(key, (time.monotonic(), asyncio.Lock()))
        async with lock:
            self._touch(key, lock)
            await self._forget()
            try:
                yield key
            finally:
                self._touch(key, lock)

    def _touch(self, key: str, lock: asyncio.Lock) -> None:
        self._conversations[key] = (time.monotonic(), lock)
        self._conversations.move_to_end(key)

    async def _forget(self) -> None:
        """Conversations that are too many, or long unused, end."""
        now = time.monotonic()
        for key, (last, lock) in list(self._conversations.items()):
            if len(self._conversations) <= MAX_CONVERSATIONS and now - last < IDLE_S:
                return
            if not lock.locked():
                del self._conversations[key]
                await self.toolbox.end(key)

    async def close(self) -> None:
        await self.toolbox.close()

    def trace(self) -> TraceWriter | None:
        return None if self._trace_dir is None else TraceWriter.new(self._trace_dir, self._model)

    # ---------------------------------------------------------------- one request

    async def put_files(self, conversation: str, client: str, ids: Sequence[str], tools: Sequence[Tool]) -> list[str]:
        """Uploads go where the model's Python runs. Their names."""
        names = []
        for i, id in enumerate(ids):
            file = self.files.get(client, id, f"files[{i}]")
            put = next((tool.put for tool in tools if hasattr(tool, "put")), None)
            if put is None:
                raise ApiError("files need the tool python", "files")
            await put(conversation, file.name, file.content)
            names.append(file.name)
        return names


class Answering:
    """One request being answered. After the last event `outcome` is there."""

    def __init__(self, agents: Agents, backend: ChatBackend, task: AgentTask, client: str) -> None:
        self._agents, self._task, self._client = agents, task, client
        self._agent = Agent(
            backend,
            task.tools,
            task.config,
            external=task.external,
            approve=self._approve,
            missing=agents.toolbox.reasons,
        )
        self._run = f"call_{secrets.token_hex(8)}"
        self._round, self._ends_line = 0, True
        self.outcome: Outcome | None = None

    async def events(self, conversation: str, note: str = "") -> AsyncGenerator[AnswerEvent]:
        """Closing it stops the model and the tools. note: for the model, behind the user's last message."""
        task, trace = self._task, self._agents.trace()
        messages = _with_note(task.messages, note) if note else task.messages
        async with aclosing(self._agent.run(messages, conversation, trace, **task.sampling)) as events:
            async for event in events:
                for told in self._told(event):
                    yield told

    def _id(self, call_id: str) -> str:
        """Ids of one run, unique in the server."""
        return self._run + call_id.removeprefix("call")

    async def _approve(self, call: ToolCall) -> bool:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        id = self._id(call.id or "")
        self._agents._waiting[id] = (self._client, answer)
        try:
            return await answer
        finally:
            del self._agents._waiting[id]

    def _told(self, event: AgentEvent) -> list[AnswerEvent]:
        match event:
            case Planned(text):
                return [Reasoning(f"{text}\n\n")]
            case Thought(text):
                return [Reasoning(text)]
            case Said(text, number):
                gap = "" if number == self._round or self._ends_line else "\n\n"
                self._round, self._ends_line = number, text.endswith("\n")
                return [Text(gap + text)]
            case Called(call):
                if any(spec.name == call.name for spec in self._task.external):
                    return []  # told at the end, when all others have run
                return [Observation(self._id(call.id or ""), call.name, "running", arguments=call.arguments)]
            case Asked(call_id, name):
                return [Observation(self._id(call_id), name, "approval")]
            case Output(call_id, _, text):
                return [Observation(self._id(call_id), "", "running", output=text)]
            case Observed():
                return [self._observed(event)]
            case Finished(outcome):
                self.outcome = outcome
                return [*self._pending(outcome), Finish(_reason(outcome))]

    def _observed(self, event: Observed) -> Observation:
        seen = event.observation
        return Observation(
            self._id(event.call_id), event.name, "ok" if event.status == "done" else event.status,
            content=seen.content, seconds=round(event.seconds, 3),
            files=tuple(self._agents.files.of_tool(self._client, file) for file in seen.files), data=seen.data,
        )  # fmt: skip

    def _pending(self, outcome: Outcome) -> list[AnswerEvent]:
        found: list[AnswerEvent] = []
        for index, call in enumerate(outcome.pending):
            found += [CallOpened(index, self._id(call.id or ""), call.name), CallArguments(index, call.arguments)]
        return found


def _reason(outcome: Outcome) -> Any:
    if outcome.pending:
        return "tool_calls"
    return "stop" if outcome.stop in ("answer", "repeats") else "length"


def _with_note(messages: Sequence[Message], note: str) -> list[Message]:
    found = list(messages)
    last = max((i for i, message in enumerate(found) if message.role == "user"), default=None)
    if last is not None:
        found[last] = dataclasses.replace(found[last], content=f"{found[last].content}\n{note}")
    return found


def stricter(config: AgentConfig, rules: Mapping[str, str]) -> AgentConfig:
    """With the rules of a request, where they allow no more than the server's do."""
    order = ("always", "ask", "never")
    merged: dict[str, Any] = dict(config.approval)
    for name, policy in rules.items():
        merged[name] = max(policy, config.policy(name), key=order.index)
    return dataclasses.replace(config, approval=merged)
