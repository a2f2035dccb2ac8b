"""Runs the calls of one turn: several at once, in bounds of time, each with an observation whatever happens.

Calls of tools that share a state run one after another, in their order; all others together.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from openglm.agent.events import AgentConfig, AgentEvent, Asked, CallRecord, Observed, Output, Status
from openglm.agent.schema import schema_error
from openglm.types import Observation, StatefulTool, Tool, ToolCall, ToolContext, ToolSpec

__all__ = ["Approve", "Dispatcher", "READ_RESULT", "argument_error", "holders"]

Approve = Callable[[ToolCall], Awaitable[bool] | bool]
GRACE_S = 15.0  # beyond the time of a call for a tool that ends its work itself
READ_RESULT = ToolSpec(
    "read_result",
    "Shows more of a long result, from a character on.",
    {
        "type": "object",
        "properties": {"id": {"type": "string"}, "start": {"type": "integer", "minimum": 0}},
        "required": ["id", "start"],
    },
)


def argument_error(call: ToolCall, spec: ToolSpec) -> str | None:
    """What is wrong with the arguments of a call, in a line that helps to write better ones."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        return f"the arguments of {call.name} are not JSON"
    return schema_error(spec, arguments)


def holders(tools: Iterable[Tool]) -> list[StatefulTool]:
    """What keeps the state of these tools, each once: the tool itself, or what it shares with others."""
    found = {id(holder): holder for holder in (getattr(tool, "state", None) or tool for tool in tools)}
    return [holder for holder in found.values() if isinstance(holder, StatefulTool)]


class Dispatcher:
    """tools: what can be called. approve: asks the user; None: nobody can be asked. emit: told what happens.

    builtin: names of the tools that the model knows without a schema; it is told of all others as functions. missing:
    why other tools are not there, by name.
    """

    def __init__(
        self, tools: Sequence[Tool], config: AgentConfig, conversation: str, approve: Approve | None,
        emit: Callable[[AgentEvent], None], builtin: frozenset[str] = frozenset(),
        missing: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._missing = dict(missing or {})
        self._tools = {tool.spec.name: tool for tool in tools}
        self._specs = [replace(t.spec, builtin=t.spec.builtin and t.spec.name in builtin) for t in tools]
        self._config, self._conversation, self._approve, self._emit = config, conversation, approve, emit
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._room = asyncio.Semaphore(config.n_at_once)
        self._long: dict[str, str] = {}  # results that were cut
        self._given: dict[str, tuple[str, int]] = {}  # of a call: its last result, and how often it gave that
        self.records: list[CallRecord] = []

    @property
    def specs(self) -> list[ToolSpec]:
        """What the model is told of: once a result was cut, it can open the rest."""
        return self._specs + ([READ_RESULT] if self._long else [])

    def spec(self, name: str) -> ToolSpec | None:
        return next((spec for spec in self.specs if spec.name == name), None)

    async def run(self, calls: Sequence[ToolCall]) -> list[CallRecord]:
        """A record for each call, in order. Cancelling stops what runs; the calls then have no record."""
        first: dict[str, int] = {}  # equal calls of one turn run once
        for i, call in enumerate(calls):
            first.setdefault(_key(call), i)
        groups: dict[object, list[int]] = {}
        for i in first.values():
            groups.setdefault(self._state(calls[i], i), []).append(i)
        found: dict[int, CallRecord] = {}

        async def work(indices: Sequence[int]) -> None:
            for i in indices:
                async with self._room:
                    found[i] = await self._one(calls[i])

        async with asyncio.TaskGroup() as group:
            for indices in groups.values():
                group.create_task(work(indices))
        records = []
        for i, call in enumerate(calls):
            record = found[first[_key(call)]]
            if first[_key(call)] != i:
                record = CallRecord(call, record.observation, record.status, 0.0)
                self._emit(Observed(call.id or "", call.name, record.observation, record.status, 0.0))
            records.append(record)
        self.records += records
        return records

    def _state(self, call: ToolCall, index: int) -> object:
        """Calls with the same one run one after another."""
        tool = self._tools.get(call.name)
        shared = getattr(tool, "state", None)
        if shared is not None:
            return id(shared)
        return id(tool) if isinstance(tool, StatefulTool) else ("alone", index)

    async def _one(self, call: ToolCall) -> CallRecord:
        started = time.monotonic()
        whole, status = await self._observation(call)
        shown = self._fitted(whole, call)
        record = CallRecord(call, shown, status, time.monotonic() - started)
        full = "" if shown is whole else whole.content
        self._emit(Observed(call.id or "", call.name, shown, status, record.seconds, full))
        return record

    async def _observation(self, call: ToolCall) -> tuple[Observation, Status]:
        spec = self.spec(call.name)
        if spec is None:
            known = ", ".join(spec.name for spec in self.specs)
            if why := self._missing.get(call.name):
                text = f"{call.name} cannot be used here: {why}. There are: {known}."
                return Observation(text, error=True), "refused"
            return Observation(f"There is no tool {call.name!r}. There are: {known}.", error=True), "refused"
        if problem := argument_error(call, spec):
            schema = json.dumps(spec.parameters, ensure_ascii=False)
            text = f"The call was not made: {problem}. The arguments must fit this schema: {schema}"
            return Observation(text, error=True), "refused"
        arguments = json.loads(call.arguments or "{}")
        if call.name not in self._tools:
            return self._read(arguments), "done"
        last, n_given = self._given.get(_key(call), ("", 0))
        if n_given >= self._config.n_same:
            text = f"This call was made {n_given} times with the same result. Use that result, or do something else."
            return Observation(f"{text}\nThe result was: {last[:500]}", error=True), "repeated"
        if not await self._allowed(call):
            return Observation(f"The user did not allow this call of {call.name}.", error=True), "denied"
        observation, status = await self._call(self._tools[call.name], call, arguments)
        same = observation.content == last
        self._given[_key(call)] = (observation.content, n_given + 1 if same else 1)
        return observation, status

    async def _allowed(self, call: ToolCall) -> bool:
        policy = self._config.policy(call.name)
        if policy != "ask":
            return policy == "always"
        if self._approve is None:
            return False
        self._emit(Asked(call.id or "", call.name))
        answer = self._approve(call)
        return bool(await answer if inspect.isawaitable(answer) else answer)

    async def _call(self, tool: Tool, call: ToolCall, arguments: dict[str, Any]) -> tuple[Observation, Status]:
        limit = self._config.tool_time_s
        context = ToolContext(self._conversation, call.id, limit, lambda stream, text: self._output(call, stream, text))
        try:
            async with asyncio.timeout(limit + (GRACE_S if isinstance(tool, StatefulTool) else 0.0)):
                observation = await tool.call(arguments, context)
        except ValueError as error:
            return Observation(_line(error), error=True), "error"
        except TimeoutError:
            return Observation(f"{call.name} took more than {limit:g} s and was stopped.", error=True), "cut"
        except Exception as error:
            return Observation(f"{call.name} failed: {type(error).__name__}: {_line(error)}", error=True), "error"
        return observation, "error" if observation.error else "done"

    def _output(self, call: ToolCall, stream: str, text: str) -> None:
        """From any thread. What another one printed before the call was over is told before that."""
        event = Output(call.id or "", stream, text)
        if threading.get_ident() == self._thread:
            self._emit(event)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._emit, event)

    # ---------------------------------------------------------------- long results

    def _fitted(self, observation: Observation, call: ToolCall) -> Observation:
        """With its text cut to what the model is shown, and a pointer to the rest."""
        text, limit = observation.content, self._config.observation_chars
        if len(text) <= limit or call.name == READ_RESULT.name:
            return observation
        name = f"r{len(self._long) + 1}"
        self._long[name] = text
        return Observation(self._window(name, 0), observation.files, observation.data, observation.error)

    def _read(self, arguments: Mapping[str, Any]) -> Observation:
        name, start = str(arguments["id"]), int(arguments["start"])
        if name not in self._long:
            return Observation(f"There is no result {name!r}. There are: {', '.join(self._long)}.", error=True)
        if start >= len(self._long[name]):
            return Observation(f"The result {name} has {len(self._long[name])} characters.", error=True)
        return Observation(self._window(name, start))

    def _window(self, name: str, start: int) -> str:
        text, limit = self._long[name], self._config.observation_chars
        end = start + limit
        if end >= len(text):
            return text[start:]
        line = text.rfind("\n", start + limit // 2, end)
        end = line + 1 if line > 0 else end
        pointer = f'[characters {start} to {end} of {len(text)}; read_result(id="{name}", start={end}) shows more]'
        return f"{text[start:end].rstrip()}\n{pointer}"


def _key(call: ToolCall) -> str:
    """The same for calls that ask for the same."""
    try:
        return f"{call.name} {json.dumps(json.loads(call.arguments or '{}'), sort_keys=True)}"
    except (ValueError, RecursionError):
        return f"{call.name} {call.arguments}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:600] or "no reason given"
