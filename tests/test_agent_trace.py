"""Traces: what is written can be read, replayed without a model, and turned into an example and back."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from openglm.agent.agent import Agent
from openglm.agent.events import AgentConfig, Finished, Observed
from openglm.agent.examples import from_example, to_example
from openglm.agent.replay import replay
from openglm.agent.trace import TraceWriter, read_trace
from openglm.data.chat import read_conversations
from openglm.types import Event, Grammar, Message, Observation, ToolCall, ToolFile, ToolSpec
from tests.agent_helpers import FakeTool, Scripted, call

NUMBER = {"n": {"type": "integer"}}
FENCE = '```json\n{"name": "double", "arguments": {"n": 7}}\n```'


def plot(arguments: dict[str, Any], context: Any) -> Observation:
    context.on_output("stdout", "drawing")
    return Observation("a picture", (ToolFile("p.png", "image/png", b"\x89PNG", description="a line"),), {"x": [1]})


def tools() -> list[FakeTool]:
    return [
        FakeTool("double", lambda a, _: 2 * a["n"], NUMBER),
        FakeTool("plot", plot),
        FakeTool("long", lambda *_: "word " * 400),
        FakeTool("denied", lambda *_: "never"),
    ]


def record(
    path: Path, model: Scripted, config: AgentConfig | None = None, stop_after: int | None = None, **more: Any
) -> None:
    async def run() -> None:
        agent = Agent(model, more.pop("tools", tools()), config, approve=lambda call: False, **more)
        events = agent.run([Message("user", "Do it")], trace=TraceWriter(path, "scripted"), temperature=0.5,
                           grammar=Grammar("json_schema", '{"type": "string"}'))  # fmt: skip
        n = 0
        async for _ in events:
            n += 1
            if n == stop_after:
                break
        await events.aclose()

    asyncio.run(run())


def script() -> Scripted:
    wrong = [Event(tool_call=ToolCall("double", '{"m": 1}'))]
    return Scripted(
        "a plan", [Event(reasoning="let me "), Event(reasoning="see"), *call("double", n=1), *call("plot")],
        f"So:\n{FENCE}", call("long"), wrong, wrong, '{"n": 5}', [*call("denied"), *call("double", n=1)],
        call("double", n=1), "the end",
    )  # fmt: skip


CONFIG = AgentConfig(plan=True, approval={"denied": "ask"}, observation_chars=500, n_rounds=9)


def test_a_trace_tells_all_and_replays(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, script(), CONFIG)
    trace = read_trace(path)
    assert trace.model == "scripted" and trace.config == dataclasses.replace(CONFIG, guided=False)
    assert trace.sampling["temperature"] == 0.5
    assert trace.sampling["grammar"] == Grammar("json_schema", '{"type": "string"}')
    assert [t.name for t in trace.tools] == ["double", "plot", "long", "denied"]
    outcome = trace.outcome
    assert outcome is not None and outcome.answer == "the end"
    assert [r.status for r in outcome.calls] == ["done"] * 4 + ["refused", "done", "denied", "done", "repeated"]
    picture = next(e for e in trace.events if isinstance(e, Observed) and e.name == "plot")
    assert picture.observation.files[0].read() == b"\x89PNG" and picture.observation.data == {"x": [1]}
    assert len(trace.answers) == 10 and len(trace.times) == len(trace.events)
    assert replay(trace) == []


@pytest.mark.parametrize("change", ["result", "answer", "approval", "limit"])
def test_replay_finds_what_changed(tmp_path: Path, change: str) -> None:
    record(tmp_path / "t", script(), CONFIG)
    trace = read_trace(tmp_path / "t")
    if change == "result":
        events = tuple(
            dataclasses.replace(e, observation=Observation("3")) if isinstance(e, Observed) and e.call_id == "call_1_1"
            else e for e in trace.events
        )  # fmt: skip
        trace = dataclasses.replace(trace, events=events)
    elif change == "answer":
        last = dataclasses.replace(trace.answers[-1], pieces=(("text", "the END"),))
        trace = dataclasses.replace(trace, answers=(*trace.answers[:-1], last))
    elif change == "approval":
        trace = dataclasses.replace(trace, config=dataclasses.replace(CONFIG, approval={}))
    else:
        trace = dataclasses.replace(trace, config=dataclasses.replace(CONFIG, n_rounds=3))
    assert replay(trace)


def test_runs_that_did_not_end(tmp_path: Path) -> None:
    """Stopped by the user, or at the limit of time: as far as it goes a trace replays."""
    record(tmp_path / "stopped", script(), CONFIG, stop_after=6)
    trace = read_trace(tmp_path / "stopped")
    assert trace.outcome is None and len(trace.events) >= 6 and replay(trace) == []
    record(tmp_path / "late", Scripted(call("double", n=1), "slowly written", pause_s=0.1), AgentConfig(time_s=0.35))
    late = read_trace(tmp_path / "late")
    assert late.outcome is not None and late.outcome.stop == "time" and replay(late) == []
    text = (tmp_path / "late").read_text()
    (tmp_path / "torn").write_text(text[:-40])  # killed in mid-line
    torn = read_trace(tmp_path / "torn")
    assert torn.outcome is None and replay(torn) == []
    with pytest.raises(ValueError, match="was stopped before its end"):
        to_example(torn)


def test_pending_calls_replay(tmp_path: Path) -> None:
    spec = ToolSpec("book", "Books.", {"type": "object", "properties": {}})
    record(tmp_path / "t", Scripted([*call("double", n=2), *call("book")]), external=[spec])
    trace = read_trace(tmp_path / "t")
    assert trace.outcome is not None and trace.outcome.pending[0].name == "book" and replay(trace) == []


def test_traces_are_never_written_over_and_others_are_refused(tmp_path: Path) -> None:
    record(tmp_path / "t", Scripted("hi"))
    with pytest.raises(ValueError, match="exists already"):
        TraceWriter(tmp_path / "t")
    (tmp_path / "other").write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="does not begin as a trace"):
        read_trace(tmp_path / "other")
    (tmp_path / "broken").write_text("{}\nnonsense\n{}\n")
    with pytest.raises(ValueError, match="broken:2 is no JSON"):
        read_trace(tmp_path / "broken")
    with pytest.raises(ValueError, match="cannot be read"):
        read_trace(tmp_path / "absent")
    lines = (tmp_path / "t").read_text().splitlines()
    (tmp_path / "odd").write_text("\n".join([lines[0], '{"type": "nova", "t": 1}', ""]))
    with pytest.raises(ValueError, match="broken trace"):
        read_trace(tmp_path / "odd")


def test_a_trace_becomes_an_example_and_back(tmp_path: Path) -> None:
    record(tmp_path / "t", script(), CONFIG)
    example = to_example(read_trace(tmp_path / "t"))
    assert [t["function"]["name"] for t in example["tools"]] == ["double", "plot", "long", "denied"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(example, ensure_ascii=False) + "\n")
    (conversation,) = read_conversations([rows])
    outcome = read_trace(tmp_path / "t").outcome
    assert outcome is not None and conversation.messages == outcome.messages
    back = from_example(example)
    assert back.outcome is not None and back.outcome.messages == outcome.messages
    assert to_example(back) == example


def test_an_example_replays_as_a_run() -> None:
    """Of a conversation whose calls fit their tools and did not go round in circles."""
    example = {
        "tools": [{"type": "python"}, {"type": "function", "function": {
            "name": "double", "description": "", "parameters": {"type": "object", "properties": NUMBER}}}],
        "messages": [
            {"role": "user", "content": "Do it"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
                {"id": "call_1_1", "type": "function", "function": {"name": "python", "arguments": '{"code": "1+1"}'}},
                {"id": "call_1_2", "type": "function", "function": {"name": "double", "arguments": '{"n": 1}'}}]},
            {"role": "tool", "content": "2", "tool_call_id": "call_1_1", "name": "python"},
            {"role": "tool", "content": "2", "tool_call_id": "call_1_2", "name": "double"},
            {"role": "assistant", "content": "Both are 2."},
        ],
    }  # fmt: skip
    trace = from_example(example)
    assert replay(trace) == [] and to_example(trace) == example
    assert isinstance(trace.events[-1], Finished)
    for messages, problem in (
        (example["messages"][:2], "does not end with an answer"),
        (example["messages"][:1], "no answer to a message"),
        ([*example["messages"][:2], example["messages"][4]], "has no result"),
        ([*example["messages"], example["messages"][2]], "no call waits"),
    ):
        with pytest.raises(ValueError, match=problem):
            from_example({"messages": messages})
