"""Traces as examples for supervised fine-tuning, and back.

    example = to_example(read_trace("run.jsonl"))            # {"messages": [...], "tools": [...]}: a row of chat data
    trace = from_example(example)                            # can be replayed, shown and evaluated like any other

An example holds what the model was given and what it wrote. What it was refused or what was repeated stays in it, as
it was said to the model; whether a run is worth learning from is for the caller to decide.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from openglm.agent.events import (
    AgentConfig,
    AgentEvent,
    Answered,
    Called,
    CallRecord,
    Finished,
    Observed,
    Outcome,
    Said,
    Thought,
)
from openglm.agent.trace import Trace, message_dict, tool_dict
from openglm.types import Message, Observation, ToolSpec, Usage

__all__ = ["from_example", "to_example"]


def to_example(trace: Trace) -> dict[str, Any]:
    """A row of chat data. ValueError for a run that did not come to its end: its last answer may be half of one."""
    outcome = trace.outcome
    if outcome is None or outcome.stop in ("time", "length", "tokens"):
        why = "was stopped before its end" if outcome is None else f"ended at its limit of {outcome.stop}"
        raise ValueError(f"the run {why}: it is no example of a whole answer")
    tools = [{"type": t.name} if t.builtin else _function(t) for t in (*trace.tools, *trace.external)]
    called = {record.call.name for record in outcome.calls}
    if "read_result" in called:
        from openglm.agent.dispatch import READ_RESULT

        tools.append(_function(READ_RESULT))
    row: dict[str, Any] = {"messages": [message_dict(m) for m in outcome.messages]}
    return {**row, "tools": tools} if tools else row


def _function(spec: ToolSpec) -> dict[str, Any]:
    value = tool_dict(spec)
    value.pop("builtin", None)
    return value


def from_example(example: Mapping[str, Any]) -> Trace:
    """The trace of a run in which the model wrote and the tools said what the example holds.

    The run begins with the messages up to the last of the user's; times and tokens are 0. ValueError for messages that
    no run could have given.
    """
    messages = tuple(Message.from_dict(m, f"messages[{i}]") for i, m in enumerate(example.get("messages") or ()))
    tools = tuple(ToolSpec.from_dict(tool) for tool in example.get("tools") or () if _name(tool) != "read_result")
    last = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    if last < 0 or last == len(messages) - 1:
        raise ValueError("the example has no answer to a message of the user")
    begin, rest = messages[: last + 1], messages[last + 1 :]
    if begin[0].role != "system":
        config = AgentConfig(system="", n_rounds=len(rest) + 2)
    else:
        config = AgentConfig(n_rounds=len(rest) + 2)
    builder = _Builder()
    for message in rest:
        builder.take(message)
    usage = Usage(0, 0)
    outcome = Outcome(
        rest[-1].content, "answer", messages, tuple(builder.records), (), builder.round, usage, 0.0
    )  # fmt: skip
    if rest[-1].role != "assistant" or rest[-1].tool_calls:
        raise ValueError("the example does not end with an answer")
    events = (*builder.events, Finished(outcome))
    return Trace(begin, tools, (), config, {}, "", events, (0.0,) * len(events), tuple(builder.answers))


def _name(tool: Mapping[str, Any]) -> object:
    function = tool.get("function")
    return function.get("name") if isinstance(function, Mapping) else None


class _Builder:
    """Events of a run, from its messages."""

    def __init__(self) -> None:
        self.events: list[AgentEvent] = []
        self.answers: list[Answered] = []
        self.records: list[CallRecord] = []
        self.round = 0
        self._open: list[Called] = []

    def take(self, message: Message) -> None:
        if message.role == "assistant":
            self._answer(message)
        elif message.role == "tool" and self._open:
            call = self._open.pop(0).call
            observation = Observation(message.content)
            self.records.append(CallRecord(call, observation, "done", 0.0))
            self.events.append(Observed(call.id or "", call.name, observation, "done", 0.0))
        else:
            raise ValueError(f"a message of the {message.role} cannot stand where no call waits for a result")

    def _answer(self, message: Message) -> None:
        if self._open:
            raise ValueError(f"the call of {self._open[0].call.name} has no result")
        self.round += 1
        pieces: list[tuple[str, str]] = []
        if message.reasoning:
            self.events.append(Thought(message.reasoning))
            pieces.append(("reasoning", message.reasoning))
        if message.content:
            self.events.append(Said(message.content, self.round))
            pieces.append(("text", message.content))
        for call in message.tool_calls:
            self._open.append(Called(call, self.round))
            pieces.append(("call", json.dumps([call.name, call.arguments], ensure_ascii=False)))
        self.events += self._open
        reason = "tool_calls" if message.tool_calls else "stop"
        self.answers.append(Answered(tuple(pieces), reason, Usage(0, 0), True))
