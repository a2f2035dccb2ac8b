"""Runs a trace again, without a model and without tools, and says where the loop now does something else.

    differences = replay(read_trace("run.jsonl"))        # openglm replay run.jsonl

The model's answers and the tools' results come from the trace; everything in between is done anew: parsing of stray
calls, checks of arguments, approval, repeated and long results, limits. Times are not compared.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openglm.agent.agent import Agent
from openglm.agent.events import AgentEvent, Asked, Observed, Output
from openglm.agent.trace import Trace, event_dict
from openglm.types import Event, Message, Observation, ToolCall, ToolContext, ToolSpec

__all__ = ["replay"]


def replay(trace: Trace) -> list[str]:
    """Where it first differs, as lines; nothing when the run comes out as it did. A trace without an end is compared as
    far as it goes.
    """
    again = asyncio.run(_run(trace))
    then, now = _canonical(trace.events), _canonical(again)
    if trace.outcome is None:
        then = _canonical(_settled(trace.events))
        now = now[: len(then)]
        if then and now and str(now[-1].get("text", "")).startswith(str(then[-1].get("text", ""))):
            now[-1] = {**now[-1], **{k: v for k, v in then[-1].items() if k == "text"}}
    for i, (a, b) in enumerate(zip(then, now, strict=False)):
        if a != b:
            return [f"event {i} was {_shown(a)}", f"event {i} is  {_shown(b)}"]
    if len(then) != len(now):
        first = (then if len(then) > len(now) else now)[min(len(then), len(now))]
        return [f"there were {len(then)} events and are {len(now)}; the first without its like: {_shown(first)}"]
    return []


async def _run(trace: Trace) -> list[AgentEvent]:
    script = _Script(trace)
    tools = [_RecordedTool(spec, script) for spec in trace.tools]
    agent = Agent(_RecordedModel(trace), tools, trace.config, external=trace.external, approve=script.approve)
    events: list[AgentEvent] = []
    generator = agent.run(trace.messages, **trace.sampling)
    try:
        async for event in generator:
            events.append(event)
    except _EndOfTrace:
        pass  # the run was stopped here
    finally:
        await generator.aclose()
    return events


class _EndOfTrace(Exception):
    """There is nothing further to replay."""


class _Script:
    """What the trace says of each call."""

    def __init__(self, trace: Trace) -> None:
        self._observed = {e.call_id: e for e in trace.events if isinstance(e, Observed)}
        self._outputs: dict[str, list[Output]] = {}
        for event in trace.events:
            if isinstance(event, Output):
                self._outputs.setdefault(event.call_id, []).append(event)

    def outputs(self, call_id: str) -> list[Output]:
        return self._outputs.get(call_id, [])

    def observed(self, call_id: str) -> Observed | None:
        return self._observed.get(call_id)

    def approve(self, call: ToolCall) -> bool:
        event = self.observed(call.id or "")
        return event is None or event.status != "denied"


@dataclass(frozen=True)
class _RecordedTool:
    spec: ToolSpec
    script: _Script

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation:
        for output in self.script.outputs(context.call_id or ""):
            context.on_output(output.stream, output.text)
        await asyncio.sleep(0)
        event = self.script.observed(context.call_id or "")
        if event is None or event.status == "cut":
            raise TimeoutError
        return dataclasses.replace(event.observation, content=event.full or event.observation.content)


class _RecordedModel:
    def __init__(self, trace: Trace) -> None:
        self._answers = list(trace.answers)
        self._broke: BaseException = _EndOfTrace()
        if trace.outcome is not None and trace.outcome.stop == "time":
            self._broke = TimeoutError()

    def stream(self, messages: Any, tools: Any = None, **sampling: Any) -> Iterator[Event]:
        raise AssertionError("asked through astream")

    async def astream(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[ToolSpec | Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[Event]:
        if not self._answers:
            raise self._broke
        answer = self._answers.pop(0)
        for kind, text in answer.pieces:
            if kind == "call":
                yield Event(tool_call=ToolCall(*json.loads(text)))
            else:
                yield Event(reasoning=text) if kind == "reasoning" else Event(text)
        if not answer.whole:
            yield Event(usage=answer.usage)
            raise self._broke
        yield Event(finish_reason=answer.finish_reason, usage=answer.usage)  # type: ignore[arg-type]


# -------------------------------------------------------------------- comparing


def _canonical(events: Sequence[AgentEvent]) -> list[dict[str, Any]]:
    """Events without their times: pieces of text joined, those of calls that ran together in the calls' order."""
    found: list[dict[str, Any]] = []
    together: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def flush() -> None:
        for _, value in sorted(together, key=lambda pair: pair[0]):
            _join(found, value)
        together.clear()

    for event in events:
        value = {"type": type(event).__name__, **_timeless(event_dict(event))}
        if isinstance(event, Asked | Output | Observed):
            together.append((_order(event.call_id), value))
        else:
            flush()
            _join(found, value)
    flush()
    return found


def _settled(events: Sequence[AgentEvent]) -> list[AgentEvent]:
    """Without those of calls that were still running at the end: of what runs together, another part comes first."""
    settled = list(events)
    while settled and isinstance(settled[-1], Asked | Output | Observed):
        settled.pop()
    return settled


def _order(call_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in call_id.split("_") if part.isdigit())


def _join(found: list[dict[str, Any]], value: dict[str, Any]) -> None:
    if found and "text" in value and {**found[-1], "text": ""} == {**value, "text": ""}:
        found[-1] = {**value, "text": found[-1]["text"] + value["text"]}
    else:
        found.append(value)


def _timeless(value: Any) -> Any:
    """Without seconds, and without files, of which a trace keeps only the small ones."""
    if isinstance(value, Mapping):
        return {k: _timeless(v) for k, v in value.items() if k not in ("seconds", "files")}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _shown(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:297] + "..."
