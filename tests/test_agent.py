"""The agent's loop, with a scripted model: rounds, calls at once, limits, approval, wrong and repeated calls."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from openglm.agent.agent import Agent
from openglm.agent.events import AgentConfig, Asked, Called, Finished, Observed, Output, Planned, Said, Thought
from openglm.agent.prompts import ANSWER_NOW, LAST_CALL, TIME_IS_UP
from openglm.types import Event, Message, Observation, ToolCall, ToolContext, ToolSpec
from tests.agent_helpers import FakeTool, Scripted, call, collect, outcome_of

NUMBER = {"n": {"type": "integer"}}


def double() -> FakeTool:
    return FakeTool("double", lambda arguments, _: 2 * arguments["n"], NUMBER)


def test_turn_calls_observation_turn() -> None:
    """Calls, their results and the answer stand in the conversation in order, with ids that fit."""
    model = Scripted([Event(reasoning="hm"), Event("First "), *call("double", n=3), *call("double", n=4)], "6 and 8")
    agent = Agent(model, [double()])
    events = asyncio.run(collect(agent, "Double 3 and 4", temperature=0.0))
    outcome = events[-1].outcome
    assert outcome.answer == "6 and 8" and outcome.stop == "answer" and outcome.n_rounds == 2
    system, user, turn, first, second, answer = outcome.messages
    assert system.role == "system" and user.content == "Double 3 and 4"
    assert (
        turn.content == "First"
        and turn.reasoning == "hm"
        and [c.id for c in turn.tool_calls] == ["call_1_1", "call_1_2"]
    )
    assert (first.content, first.tool_call_id, first.name) == ("6", "call_1_1", "double")
    assert (second.content, second.tool_call_id) == ("8", "call_1_2") and answer.content == "6 and 8"
    kinds = [type(event) for event in events]
    assert kinds[0] is Thought and kinds.count(Called) == kinds.count(Observed) == 2 and kinds[-1] is Finished
    assert "".join(e.text for e in events if isinstance(e, Said) and e.round == 2) == "6 and 8"
    assert outcome.usage.prompt_tokens == 20 and outcome.usage.completion_tokens == 4 + 3
    assert model.asked[1][0] == list(outcome.messages[:5]) and model.asked[0][2]["temperature"] == 0.0


def test_calls_of_one_turn_run_at_once_and_keep_their_order() -> None:
    """Both tools wait for each other: one after the other they would never end."""
    met = [asyncio.Event(), asyncio.Event()]

    async def meet(arguments: dict[str, Any], context: ToolContext) -> str:
        met[arguments["n"]].set()
        await met[1 - arguments["n"]].wait()
        return f"met {arguments['n']}"

    model = Scripted([*call("meet", n=1), *call("meet", n=0)], "done")
    outcome = outcome_of(Agent(model, [FakeTool("meet", meet, NUMBER)]), "go")
    assert [m.content for m in outcome.messages if m.role == "tool"] == ["met 1", "met 0"]


def test_tools_that_share_a_state_run_in_order() -> None:
    """Two tools of one object never run at the same time."""
    running: list[str] = []
    log: list[str] = []
    shared = object()

    async def work(arguments: dict[str, Any], context: ToolContext) -> str:
        running.append("x")
        assert len(running) == 1
        await asyncio.sleep(0.01 * (3 - arguments["n"]))
        running.pop()
        log.append(str(arguments["n"]))
        return "ok"

    tools = [FakeTool("a", work, NUMBER), FakeTool("b", work, NUMBER)]
    for tool in tools:
        tool.state = shared
    outcome_of(Agent(Scripted([*call("a", n=0), *call("b", n=1), *call("a", n=2)], "done"), tools), "go")
    assert log == ["0", "1", "2"]


def test_equal_calls_of_one_turn_run_once() -> None:
    tool = double()
    outcome = outcome_of(Agent(Scripted([*call("double", n=3), *call("double", n=3)], "6"), [tool]), "go")
    assert tool.calls == [{"n": 3}]
    assert [m.content for m in outcome.messages if m.role == "tool"] == ["6", "6"]


def test_a_failing_tool_is_told_to_the_model_in_a_line() -> None:
    def fail(arguments: dict[str, Any], context: ToolContext) -> str:
        raise {0: ValueError("n must be above 0:\n give 1"), 1: KeyError("secret")}[arguments["n"]]

    model = Scripted(call("f", n=0), call("f", n=1), "I give up")
    outcome = outcome_of(Agent(model, [FakeTool("f", fail, NUMBER)]), "go")
    assert [r.observation.content for r in outcome.calls] == [
        "n must be above 0: give 1",
        "f failed: KeyError: 'secret'",
    ]
    assert all(r.status == "error" and r.observation.error for r in outcome.calls) and outcome.stop == "answer"


def test_a_tool_that_takes_too_long_is_stopped() -> None:
    stopped: list[str] = []

    async def sleep(arguments: dict[str, Any], context: ToolContext) -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append("yes")
            raise
        return "never"

    agent = Agent(
        Scripted(call("sleep", n=1), "sorry"), [FakeTool("sleep", sleep, NUMBER)], AgentConfig(tool_time_s=0.05)
    )
    outcome = outcome_of(agent, "go")
    assert stopped == ["yes"] and outcome.calls[0].status == "cut" and outcome.answer == "sorry"
    assert outcome.calls[0].observation.content == "sleep took more than 0.05 s and was stopped."


def test_time_of_the_run() -> None:
    """At its end what runs is stopped, and the conversation is whole: each call has a result."""

    async def sleep(arguments: dict[str, Any], context: ToolContext) -> str:
        await asyncio.sleep(60)
        return "never"

    agent = Agent(Scripted(call("sleep", n=1)), [FakeTool("sleep", sleep, NUMBER)], AgentConfig(time_s=0.1))
    outcome = outcome_of(agent, "go")
    assert outcome.stop == "time" and outcome.messages[-1].content == TIME_IS_UP
    assert outcome.messages[-1].tool_call_id == "call_1_1"
    slow = Agent(Scripted("a long answer", pause_s=0.04), config=AgentConfig(time_s=0.1))
    outcome = outcome_of(slow, "go")
    assert outcome.stop == "time" and outcome.answer and "a long answer".startswith(outcome.answer)


def test_rounds_and_tokens_are_limited() -> None:
    model = Scripted(*(call("double", n=i) for i in range(3)))
    outcome = outcome_of(Agent(model, [double()], AgentConfig(n_rounds=3)), "go")
    assert outcome.stop == "rounds" and outcome.n_rounds == 3
    assert [LAST_CALL["en"] in m.content for m in outcome.messages if m.role == "tool"] == [False, True, False]
    model = Scripted(call("double", n=0), call("double", n=1), "never")
    outcome = outcome_of(Agent(model, [double()], AgentConfig(max_tokens=2)), "go", max_new_tokens=100)
    assert outcome.stop == "tokens" and [asked[2]["max_new_tokens"] for asked in model.asked] == [2, 1]


def test_an_answer_at_its_limit_says_so() -> None:
    class Short(Scripted):
        async def astream(self, messages: Any, tools: Any = None, **sampling: Any) -> Any:
            yield Event("half an ans")
            yield Event(finish_reason="length")

    assert outcome_of(Agent(Short()), "go").stop == "length"


def test_cancelling_stops_model_and_tools() -> None:
    """The generator closed in mid-call: the tool is cancelled before aclose returns."""
    log: list[str] = []

    async def sleep(arguments: dict[str, Any], context: ToolContext) -> str:
        log.append("begun")
        try:
            await asyncio.sleep(60)
        finally:
            log.append("stopped")
        return "never"

    async def run() -> None:
        agent = Agent(Scripted(call("sleep", n=1)), [FakeTool("sleep", sleep, NUMBER)])
        events = agent.run([{"role": "user", "content": "go"}])
        async for event in events:
            if isinstance(event, Called):
                await asyncio.sleep(0.01)
                break
        await events.aclose()
        assert log == ["begun", "stopped"]
        assert len(asyncio.all_tasks()) == 1, "nothing is left behind"

    asyncio.run(run())


def test_repeated_calls() -> None:
    """The same call with the same result is refused the third time; two rounds of that end the run."""
    tool = double()
    outcome = outcome_of(Agent(Scripted(*(call("double", n=1) for _ in range(4))), [tool]), "go")
    assert tool.calls == [{"n": 1}] * 2 and outcome.stop == "repeats"
    assert [r.status for r in outcome.calls] == ["done", "done", "repeated", "repeated"]
    assert "The result was: 2" in outcome.calls[2].observation.content
    counter = iter(range(9))
    tool = FakeTool("tick", lambda *_: next(counter))
    outcome = outcome_of(Agent(Scripted(*([call("tick")] * 4), "done"), [tool]), "go")
    assert len(tool.calls) == 4, "a call with another result each time is no circle"


def test_approval() -> None:
    asked: list[ToolCall] = []

    async def approve(wanted: ToolCall) -> bool:
        asked.append(wanted)
        return json.loads(wanted.arguments)["n"] > 1

    config = AgentConfig(approval={"double": "ask", "*": "never"})
    model = Scripted([*call("double", n=1), *call("double", n=2), *call("other")], "ok")
    tools = [double(), FakeTool("other", lambda *_: "x")]
    events = asyncio.run(collect(Agent(model, tools, config, approve=approve), "go"))
    outcome = events[-1].outcome
    assert [r.status for r in outcome.calls] == ["denied", "done", "denied"] and len(asked) == 2
    assert sum(isinstance(e, Asked) for e in events) == 2 and tools[0].calls == [{"n": 2}] and not tools[1].calls
    assert outcome.calls[0].observation.content == "The user did not allow this call of double."
    nobody = outcome_of(Agent(Scripted(call("double", n=1), "ok"), [double()], config), "go")
    assert nobody.calls[0].status == "denied"
    with pytest.raises(ValueError, match="approval of 'x' must be ask, always, never, not 'maybe'"):
        AgentConfig(approval={"x": "maybe"})  # type: ignore[dict-item]


def test_wrong_calls() -> None:
    """The first wrong call is told the schema; the second gets its arguments drawn with the schema as grammar."""
    bad = [Event(tool_call=ToolCall("double", '{"m": 1}'))]
    model = Scripted(bad, bad, '{"n": 21}', "42")
    tool = double()
    events = asyncio.run(collect(Agent(model, [tool]), "go"))
    outcome = events[-1].outcome
    first, second = outcome.calls
    assert (
        first.status == "refused"
        and "'n' is missing" in first.observation.content
        and '"integer"' in first.observation.content
    )
    assert second.call.arguments == '{"n": 21}' and second.status == "done" and tool.calls == [{"n": 21}]
    assert [e.repaired for e in events if isinstance(e, Called)] == [False, True]
    assert json.loads(model.asked[2][2]["grammar"].text) == tool.spec.parameters and not model.asked[2][1]
    assert all("Write its arguments again" not in m.content for m in outcome.messages)


def test_wrong_calls_of_a_backend_without_grammars() -> None:
    bad = [Event(tool_call=ToolCall("double", "{"))]
    model = Scripted(bad, bad, ValueError("no grammars here"), "sorry")
    outcome = outcome_of(Agent(model, [double()]), "go")
    assert [r.status for r in outcome.calls] == ["refused"] * 2 and outcome.answer == "sorry"
    assert "the arguments of double are not JSON" in outcome.calls[0].observation.content


def test_unknown_tool() -> None:
    outcome = outcome_of(Agent(Scripted(call("dubble", n=1), "oh"), [double()]), "go")
    assert outcome.calls[0].observation.content == "There is no tool 'dubble'. There are: double."
    agent = Agent(Scripted(call("cogview", prompt="x"), "oh"), [double()], missing={"cogview": "no image model is set"})
    told = outcome_of(agent, "draw").calls[0].observation.content
    assert told == "cogview cannot be used here: no image model is set. There are: double."


def test_external_tools_end_the_run() -> None:
    """What the caller runs comes back as pending calls, with the results of what the agent ran itself."""
    spec = ToolSpec("book", "Books.", {"type": "object", "properties": {}})
    model = Scripted([*call("double", n=2), *call("book")])
    outcome = outcome_of(Agent(model, [double()], external=[spec]), "go")
    assert outcome.stop == "calls" and [c.name for c in outcome.pending] == ["book"]
    assert [m.content for m in outcome.messages if m.role == "tool"] == ["4"]
    with pytest.raises(ValueError, match="two tools are named 'double'"):
        Agent(model, [double()], external=[double().spec])


def test_long_results_are_cut_and_can_be_opened() -> None:
    text = "\n".join(f"line {i}" for i in range(200))
    model = Scripted(call("long"), lambda m: call("read_result", id="r1", start=int(_pointer(m))), "read")
    agent = Agent(model, [FakeTool("long", lambda *_: text)], AgentConfig(observation_chars=600))
    events = asyncio.run(collect(agent, "go"))
    first, second = [e for e in events if isinstance(e, Observed)]
    assert first.full == text and len(first.observation.content) < 700
    assert [t.name for t in model.asked[0][1]] == ["long"] and [t.name for t in model.asked[1][1]] == [
        "long",
        "read_result",
    ]
    shown = [o.observation.content.partition("\n[characters")[0] for o in (first, second)]
    assert text.startswith("\n".join(shown)), "the second begins where the first ends"


def _pointer(messages: list[Message]) -> str:
    return messages[-1].content.rpartition("start=")[2].partition(")")[0]


def test_output_of_a_running_tool() -> None:
    async def talk(arguments: dict[str, Any], context: ToolContext) -> Observation:
        await asyncio.to_thread(context.on_output, "stdout", "half ")
        context.on_output("progress", "1/2")
        return Observation("whole")

    events = asyncio.run(collect(Agent(Scripted(call("talk"), "ok"), [FakeTool("talk", talk)]), "go"))
    output = [(e.call_id, e.stream, e.text) for e in events if isinstance(e, Output)]
    assert output == [("call_1_1", "stdout", "half "), ("call_1_1", "progress", "1/2")]


def test_plan() -> None:
    model = Scripted("1. double it", call("double", n=1), "2")
    events = asyncio.run(collect(Agent(model, [double()], AgentConfig(plan=True)), "go"))
    assert isinstance(events[0], Planned) and events[0].text == "1. double it"
    assert model.asked[1][0][0].content.endswith("The plan:\n1. double it")
    assert "double" in model.asked[0][0][-1].content and not model.asked[0][1]


def test_bad_input_of_the_backend_is_raised() -> None:
    with pytest.raises(ValueError, match="no such option"):
        outcome_of(Agent(Scripted(ValueError("no such option")), [double()]), "go")
    with pytest.raises(ValueError, match="messages is empty"):
        Agent(Scripted()).run_sync([])
    for wrong in ({"n_rounds": 0}, {"time_s": 0}, {"observation_chars": 10}, {"max_tokens": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AgentConfig(**wrong)


def test_system_text_follows_the_language() -> None:
    model = Scripted("hi", "你好", "hi")
    agent = Agent(model, [double()])
    outcome_of(agent, "Hello")
    outcome_of(agent, "你好")
    asyncio.run(_run(agent, [Message("system", "Mine."), Message("user", "Hello")]))
    assert [asked[0][0].content[:3] for asked in model.asked] == ["You", "你是一", "Min"]


async def _run(agent: Agent, messages: list[Message]) -> None:
    async for _ in agent.run(messages):
        pass


def test_a_program_at_the_end_of_an_answer_is_run() -> None:
    """Where the user did not ask for code, and there is the tool `python` itself."""
    answer = "I compute:\n```python\nprint(7 * 8)\n```"

    def asked(question: str, *, builtin: bool = True) -> list[dict[str, Any]]:
        tool = FakeTool("python", lambda arguments, _: "56", {"code": {"type": "string"}})
        tool.spec = dataclasses.replace(tool.spec, builtin=builtin)
        outcome = outcome_of(Agent(Scripted(answer, "It is 56."), [tool]), question)
        assert outcome.messages[2].content == ("I compute:" if tool.calls else answer)
        return tool.calls

    assert asked("What is 7 times 8?") == [{"code": "print(7 * 8)"}]
    assert asked("Write a script that computes 7 times 8.") == []
    assert asked("What is 7 times 8?", builtin=False) == []


def test_a_model_without_words_for_a_result_is_asked_once() -> None:
    tool = double()
    model = Scripted(call("double", n=3), "", "It is 6.")
    outcome = outcome_of(Agent(model, [tool]), "Double 3")
    assert outcome.answer == "It is 6." and outcome.n_rounds == 3 and len(outcome.messages) == 5
    assert outcome.messages[3].content == "6\n" + ANSWER_NOW["en"]
    again = outcome_of(Agent(Scripted(call("double", n=3), "", " \n"), [tool]), "把3加倍")
    assert again.answer == " \n" and again.n_rounds == 3 and again.messages[3].content.endswith(ANSWER_NOW["zh"])
    assert outcome_of(Agent(Scripted(""), [tool]), "Hm").n_rounds == 1, "nothing was called"
    last = outcome_of(Agent(Scripted(call("double", n=3), ""), [tool], AgentConfig(n_rounds=2)), "Double 3")
    assert last.answer == "" and last.n_rounds == 2
