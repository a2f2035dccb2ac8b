"""A model that says what a test tells it to, and tools to go with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from openglm.agent.agent import Agent
from openglm.agent.events import AgentEvent, Finished, Outcome
from openglm.types import Event, Message, Observation, ToolCall, ToolContext, ToolSpec, Usage

__all__ = ["FakeTool", "Scripted", "call", "collect", "outcome_of", "said"]


def said(text: str) -> list[Event]:
    """A text, cut into pieces of three characters."""
    return [Event(text[i : i + 3], token_ids=(i,)) for i in range(0, len(text), 3)]


def call(name: str, **arguments: Any) -> list[Event]:
    return [Event(tool_call=ToolCall(name, json.dumps(arguments, ensure_ascii=False)), token_ids=(1,))]


class Scripted:
    """A ChatBackend that gives one scripted answer after another; `asked` holds what it was asked.

    An answer is a text, a list of events, an exception to raise, or a function of the messages that gives one of them.
    A guided agent's first question, for a name alone, is answered with the name in the scripted answer that comes next,
    which stays for the question behind it unless the name is that of the answer.
    """

    def __init__(self, *answers: Any, pause_s: float = 0.0) -> None:
        self._answers, self._pause_s = list(answers), pause_s
        self.asked: list[tuple[list[Message], list[ToolSpec], dict[str, Any]]] = []

    def stream(self, messages: Any, tools: Any = None, **sampling: Any) -> Iterator[Event]:
        raise AssertionError("asked through astream")

    async def astream(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[ToolSpec | Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[Event]:
        given = [m for m in messages if isinstance(m, Message)]
        if _asks_for_a_name(sampling) and self._answers and _name_in(self._answers[0]) not in (None, "answer"):
            yield Event(json.dumps({"next": _name_in(self._answers[0])}), finish_reason="stop", usage=Usage(10, 1))
            return
        self.asked.append((given, [t for t in tools or () if isinstance(t, ToolSpec)], sampling))
        assert self._answers, f"asked once more than scripted: {given[-1]}"
        answer = self._answers.pop(0)
        if callable(answer):
            answer = answer(given)
        if isinstance(answer, BaseException):
            raise answer
        events = said(answer) if isinstance(answer, str) else list(answer)
        for event in events:
            await asyncio.sleep(self._pause_s)
            yield event
        called = any(event.tool_call for event in events)
        yield Event(finish_reason="tool_calls" if called else "stop", usage=Usage(10, len(events)))


def _asks_for_a_name(sampling: Mapping[str, Any]) -> bool:
    grammar = sampling.get("grammar")
    return grammar is not None and list(json.loads(grammar.text).get("properties", ())) == ["next"]


def _name_in(answer: Any) -> str | None:
    try:
        return str(json.loads(answer)["next"])
    except (ValueError, TypeError, KeyError):
        return None


class FakeTool:
    """A Tool that does what a function of its arguments says."""

    def __init__(self, name: str, work: Any, properties: Mapping[str, Any] | None = None) -> None:
        schema = {"type": "object", "properties": dict(properties or {}), "required": list(properties or {})}
        self.spec = ToolSpec(name, f"The tool {name}.", schema)
        self._work = work
        self.state: object | None = None  # tools with the same one run one after another
        self.calls: list[dict[str, Any]] = []

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        self.calls.append(arguments)
        found = self._work(arguments, context)
        if asyncio.iscoroutine(found):
            found = await found
        return found if isinstance(found, Observation) else Observation(str(found))


async def collect(agent: Agent, question: str, **options: Any) -> list[AgentEvent]:
    return [event async for event in agent.run([Message("user", question)], **options)]


def outcome_of(agent: Agent, question: str, **options: Any) -> Outcome:
    last = asyncio.run(collect(agent, question, **options))[-1]
    assert isinstance(last, Finished)
    return last.outcome
