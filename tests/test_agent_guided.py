"""A guided agent: the model names its next tool or the answer, sees that tool alone, and cites what it read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from openglm.agent.agent import Agent
from openglm.agent.asides import Asides
from openglm.agent.browser.citations import cited_by_overlap
from openglm.agent.choice import ANSWER, choice_grammar, choice_messages, chosen, first_messages
from openglm.agent.events import AgentConfig, CallRecord, Said
from openglm.agent.guide import restated
from openglm.agent.replay import replay
from openglm.agent.trace import TraceWriter, read_trace
from openglm.model.cost import is_small
from openglm.presets import preset
from openglm.types import Message, Observation, ToolCall, ToolSpec
from tests.agent_helpers import FakeTool, Scripted, call, collect, outcome_of

GUIDED = AgentConfig(guided=True)
NUMBER = {"n": {"type": "integer"}}


def next_is(name: str) -> str:
    return json.dumps({"need": "" if name == ANSWER else "something", "next": name})


def tools() -> list[FakeTool]:
    return [FakeTool("double", lambda a, _: 2 * a["n"], NUMBER), FakeTool("halve", lambda a, _: a["n"] // 2, NUMBER)]


def test_choice_call_answer() -> None:
    model = Scripted(next_is("double"), '{"n": 21}', next_is("answer"), "It is 42.")
    double, halve = tools()
    outcome = outcome_of(Agent(model, [double, halve], GUIDED), "What is twice 21?", temperature=0.9)
    assert (outcome.answer, outcome.stop, outcome.n_rounds) == ("It is 42.", "answer", 2)
    assert double.calls == [{"n": 21}] and not halve.calls
    assert [m.role for m in outcome.messages] == ["user", "assistant", "tool", "assistant"]
    choice, arguments, second, answer = model.asked
    assert "double" in choice[2]["grammar"].text and choice[2]["temperature"] == 0.0 and not choice[1]
    assert json.loads(arguments[2]["grammar"].text) == double.spec.parameters and arguments[2]["temperature"] == 0.9
    assert 'double {"n": 21} gave:\n42' in second[0][-1].content
    assert "What is needed from it: something. " in arguments[0][-1].content
    assert not answer[1] and "do not speak of tools" in answer[0][0].content


def test_calls_and_what_results_say_are_drawn_without_chance() -> None:
    python = FakeTool("python", lambda a, _: "42")
    python.spec = ToolSpec.of_builtin("python")
    program = "```python\nprint(21 * 2)\n```"
    model = Scripted(next_is("double"), '{"n": 21}', next_is("python"), program, next_is("answer"), "It is 42.")
    outcome = outcome_of(Agent(model, [*tools(), python], GUIDED), "What is twice 21?")
    assert outcome.answer == "It is 42." and [r.call.name for r in outcome.calls] == ["double", "python"]
    assert [asked[2].get("temperature") for asked in model.asked] == [0.0] * 6
    model = Scripted(next_is("answer"), "Hello!")
    outcome_of(Agent(model, tools(), GUIDED), "Hello")
    assert [asked[2].get("temperature") for asked in model.asked] == [0.0, None]


def test_a_program_is_asked_for_without_those_of_earlier_turns() -> None:
    python = FakeTool("python", lambda a, _: "12.5")
    python.spec = ToolSpec.of_builtin("python")
    call = ToolCall("python", '{"code": "print(5 * 5)"}', "call_1")
    earlier = [Message("user", "5 * 5?"), Message("assistant", "", (call,)),
               Message("tool", "25", (), "call_1", "python"), Message("assistant", "It is 25.")]  # fmt: skip
    model = Scripted(next_is("python"), "```python\nprint(25 / 2)\n```", next_is("answer"), "12.5")
    outcome = Agent(model, [python], GUIDED).run_sync([*earlier, Message("user", "Divide that by 2.")])
    asked = model.asked[1][0]
    assert outcome.answer == "12.5" and [m.role for m in asked] == ["user"] and not asked[0].tool_calls
    assert asked[0].content.startswith(
        "Said before:\nUser: 5 * 5?\nResult: 25\nYou: It is 25.\n\nRequest: Divide that by 2.\n\nWrite a Python program"
    )
    assert outcome.messages[: len(earlier)] == tuple(earlier)


def test_an_answer_that_is_a_call_is_made() -> None:
    model = Scripted(next_is("answer"), '{"name": "double", "arguments": {"n": 4}}', next_is("answer"), "8")
    outcome = outcome_of(Agent(model, tools(), GUIDED), "go")
    assert outcome.answer == "8" and [r.call.name for r in outcome.calls] == ["double"]


def test_an_answer_at_once_has_no_tools() -> None:
    model = Scripted(next_is("answer"), "Paris.")
    assert outcome_of(Agent(model, tools(), GUIDED), "What is the capital of France?").answer == "Paris."
    assert model.asked[1][1] == [] and [m.role for m in model.asked[1][0]] == ["user"]


def test_python_is_written_as_the_model_is_used_to() -> None:
    """In the model's own words; only where no call comes of them are the arguments drawn."""
    spec = ToolSpec.of_builtin("python")
    python = FakeTool("python", lambda a, _: "42")
    python.spec = spec
    model = Scripted(next_is("python"), "```python\nprint(6 * 7)\n```", next_is("answer"), "42")
    assert outcome_of(Agent(model, [python, *tools()], GUIDED), "6 * 7?").answer == "42"
    assert python.calls == [{"code": "print(6 * 7)"}] and not model.asked[1][1]
    assert "Python program" in model.asked[1][0][-1].content
    python.calls.clear()
    model = Scripted(next_is("python"), "I will compute it.", '{"code": "6 * 7"}', next_is("answer"), "42")
    outcome = outcome_of(Agent(model, [python], GUIDED), "6 * 7?")
    assert python.calls == [{"code": "6 * 7"}] and outcome.messages[1].content == ""


def test_words_beside_a_call_are_dropped(tmp_path: Path) -> None:
    """A result that the model imagined is not said, and not in what it sees when it answers; the trace keeps it."""
    python = FakeTool("python", lambda a, _: "42")
    python.spec = ToolSpec.of_builtin("python")
    path = tmp_path / "t.jsonl"
    imagined = "It gives 41.\n```python\nprint(6 * 7)\n```\nSo 41."
    model = Scripted(next_is("python"), imagined, next_is("answer"), "It is 42.")
    events = asyncio.run(collect(Agent(model, [python], GUIDED), "6 * 7?", trace=TraceWriter(path, "scripted")))
    outcome = events[-1].outcome
    assert python.calls == [{"code": "print(6 * 7)"}] and outcome.answer == "It is 42."
    assert "".join(e.text for e in events if isinstance(e, Said)) == "It is 42."
    assert not any("41" in m.content for m in outcome.messages)
    last = model.asked[-1][0]
    assert [m.role for m in last] == ["system", "user"] and last[1].content.startswith("6 * 7?\n\nResults:\n\npython")
    assert "print(6 * 7)\n:\n42\n\n(Answer the" in last[1].content and "41" not in last[1].content
    assert read_trace(path).answers[2].pieces == (("text", imagined),) and replay(read_trace(path)) == []


def test_earlier_turns_stay_as_they_were() -> None:
    call_ = ToolCall("double", '{"n": 2}', "a")
    turn = [Message("user", "Twice 2?"), Message("assistant", "", (call_,)), Message("tool", "4", (), "a", "double"),
            Message("assistant", "4."), Message("user", "Twice 3?")]  # fmt: skip
    assert restated(turn) == turn
    again = [Message("assistant", "I think 5.", (ToolCall("double", '{"n": 3}', "b"),)),
             Message("tool", "6", (), "b", "double")]  # fmt: skip
    shown = restated([*turn, *again])
    assert shown[:-1] == turn[:-1] and shown[-1].role == "user"
    assert shown[-1].content == 'Twice 3?\n\nWhat tools gave for this:\n\ndouble {"n": 3}:\n6'
    last = restated([*turn, *again], to_answer=True)[-1].content
    assert last.startswith('Twice 3?\n\nResults:\n\ndouble {"n": 3}:\n6\n\n(Answer the')


def test_arguments_that_nobody_said_are_looked_up_first() -> None:
    lookup = FakeTool("lookup", lambda a, _: '{"price": 350}', {"what": {"type": "string"}})
    double = tools()[0]
    model = Scripted(next_is("double"), '{"n": 100}', next_is("lookup"), '{"what": "hat"}', next_is("double"),
                     '{"n": 350}', next_is("answer"), "700")  # fmt: skip
    assert outcome_of(Agent(model, [double, lookup], GUIDED), "What do two hats cost?").answer == "700"
    assert double.calls == [{"n": 350}] and lookup.calls == [{"what": "hat"}]
    second = model.asked[2]
    assert second[2]["grammar"].text.count("double") == 0
    assert 'double {"n": 100} gave:\nNot called: nothing says what n is.' in second[0][-1].content


@pytest.mark.parametrize("rest", ["answer", "double"])
def test_a_call_is_thought_over_once(rest: str) -> None:
    """Where nothing else helps it is made as it was."""
    script = [next_is("double"), '{"n": 100}', next_is("answer"), next_is("answer"), "200"]
    if rest == "double":
        script = [*script[:3], next_is("double"), '{"n": 300}', next_is("answer"), "600"]
    double, halve = tools()
    outcome_of(Agent(Scripted(*script), [double, halve], GUIDED), "Double it.")
    assert double.calls == [{"n": 100}, {"n": 300}][: 1 + (rest == "double")] and not halve.calls


def test_a_program_with_numbers_that_nobody_said_waits_for_them() -> None:
    python = FakeTool("python", lambda a, _: "700")
    python.spec = ToolSpec.of_builtin("python")
    lookup = FakeTool("lookup", lambda a, _: '{"price": 350}')
    model = Scripted(next_is("python"), "```python\nprint(2 * 999)\n```", next_is("lookup"), "{}", next_is("python"),
                     "```python\nprint(2 * 350)\n```", next_is("answer"), "700")  # fmt: skip
    assert outcome_of(Agent(model, [python, lookup], GUIDED), "What do two hats cost?").answer == "700"
    assert (
        python.calls == [{"code": "print(2 * 350)"}] and "nothing says the number 999" in model.asked[2][0][-1].content
    )


def test_a_call_that_failed_is_not_made_again() -> None:
    def fails(arguments: Any, context: Any) -> str:
        raise ValueError("no such n")

    bad, good = FakeTool("bad", fails, NUMBER), FakeTool("good", lambda a, _: a["n"], NUMBER)
    script = [next_is("bad"), '{"n": 1}', next_is("bad"), '{"n":1}']
    model = Scripted(*script, next_is("good"), '{"n": 2}', next_is("answer"), "2")
    assert outcome_of(Agent(model, [bad, good], GUIDED), "go").answer == "2"
    assert bad.calls == [{"n": 1}] and good.calls == [{"n": 2}]
    model = Scripted(*script, next_is("answer"), "I cannot.")
    assert outcome_of(Agent(model, [bad, good], GUIDED), "go").answer == "I cannot." and len(bad.calls) == 2


def test_a_call_that_was_made_is_thought_over() -> None:
    """Unless it takes no arguments: scrolling goes on."""
    double, scroll = tools()[0], FakeTool("scroll", lambda *_: "more")
    model = Scripted(next_is("double"), '{"n": 2}', next_is("double"), '{"n": 2}', next_is("answer"), "4")
    assert outcome_of(Agent(model, [double, scroll], GUIDED), "Twice 2?").answer == "4"
    assert double.calls == [{"n": 2}] and "this was done already" in model.asked[4][0][-1].content
    model = Scripted(next_is("scroll"), "{}", next_is("scroll"), "{}", next_is("answer"), "read")
    outcome_of(Agent(model, [double, scroll], GUIDED), "Read it.")
    assert scroll.calls == [{}, {}]


@pytest.mark.parametrize(("wants", "guided", "is_led"), [
    (True, None, True), (False, None, False), (None, None, False), (True, False, False), (False, True, True),
])  # fmt: skip
def test_the_backend_says_whether_it_wants_a_guide(wants: bool | None, guided: bool | None, is_led: bool) -> None:
    model = Scripted(*([next_is("answer")] if is_led else []), "Hello.")
    if wants is not None:
        model.wants_guide = wants  # type: ignore[attr-defined]
    agent = Agent(model, tools(), AgentConfig(guided=guided))
    assert outcome_of(agent, "Hi").answer == "Hello." and agent.config.guided is is_led
    assert ("grammar" in model.asked[0][2]) is is_led


def test_small_models_want_a_guide() -> None:
    assert is_small(preset("glm-edge-1.5b")) and not is_small(preset("glm-4-9b"))


def test_without_grammars_it_is_not_guided() -> None:
    model = Scripted(ValueError("no grammars here"), call("double", n=1), "2")
    outcome = outcome_of(Agent(model, tools(), GUIDED), "go")
    assert outcome.answer == "2" and len(model.asked) == 3
    assert [t.name for t in model.asked[1][1]] == ["double", "halve"] and "tools" in model.asked[1][0][0].content


def test_a_name_that_is_none_leaves_the_choice_open() -> None:
    model = Scripted("double", call("double", n=1), "2")  # a backend that ignores grammars
    assert outcome_of(Agent(model, tools(), GUIDED), "go").answer == "2"


def test_a_tool_that_failed_twice_in_a_row_waits_a_round() -> None:
    def fails(arguments: Any, context: Any) -> str:
        raise ValueError("no such n")

    bad, good = FakeTool("bad", fails, NUMBER), FakeTool("good", lambda a, _: a["n"], NUMBER)
    wrong = (next_is("bad"), '{"n": 1}', next_is("bad"), '{"n": 2}')
    model = Scripted(*wrong, next_is("good"), '{"n": 3}', next_is("answer"), "3")
    assert outcome_of(Agent(model, [bad, good], GUIDED), "go").answer == "3"
    offered = [json.loads(a[2]["grammar"].text)["properties"]["next"]["enum"] for a in model.asked[:7:2]]
    both = ["bad", "good", "answer"]
    assert offered == [["bad", "good"], both, ["good", "answer"], both]


def test_the_last_round_answers() -> None:
    model = Scripted(next_is("double"), '{"n": 1}', "enough")
    outcome = outcome_of(Agent(model, tools(), AgentConfig(guided=True, n_rounds=2)), "go")
    assert outcome.answer == "enough" and model.asked[2][1] == []


def test_a_system_message_of_the_caller_stays() -> None:
    model = Scripted(next_is("answer"), "hi")
    outcome = asyncio.run(_run(Agent(model, tools(), GUIDED), [Message("system", "Be brief."), Message("user", "Hi")]))
    assert [m.content for m in model.asked[1][0]] == ["Be brief.", "Hi"] and outcome == "hi"


async def _run(agent: Agent, messages: list[Message]) -> Any:
    return [event async for event in agent.run(messages)][-1].outcome.answer


def test_replay_of_a_guided_run(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    model = Scripted(next_is("double"), '{"n": 21}', next_is("answer"), "It is 42.")
    asyncio.run(collect(Agent(model, tools(), GUIDED), "Twice 21?", trace=TraceWriter(path, "scripted")))
    assert replay(read_trace(path)) == []


# -------------------------------------------------------------------- the question


def specs(*names: str) -> list[ToolSpec]:
    return [ToolSpec(name, f"What {name} does. More of it.", {"type": "object"}) for name in names]


def test_examples_are_of_tools_that_are_there() -> None:
    def named(*names: str) -> set[str]:
        messages = choice_messages([Message("user", "Who?")], specs(*names))
        assert messages[-1].content.endswith("Who?")
        end = next(i for i, m in enumerate(messages) if "for practice" in m.content)  # chains of made-up tools
        return {json.loads(m.content)["next"] for m in messages[:end] if m.role == "assistant"}

    assert named("double") == {"double", "answer"}
    assert named("search", "open_page", "find") == {"search", "open_page", "answer"}
    assert named("python", "search") == {"python", "search", "answer"}
    assert named("answer", "python") == {"answer", "python", "reply_to_user"}  # a tool with our word


def test_the_choice_knows_what_was_said_and_done_before() -> None:
    """Of a conversation its end, as the request may speak of it; and results that a caller's own tool gave."""
    turns = [Message("system", "Be kind."), Message("user", "How old is Ann?"), Message("assistant", "Ann is 7."),
             Message("user", "And " + 400 * "x"), Message("assistant", "", (ToolCall("age", "{}", "a"),)),
             Message("tool", "9", (), "a", "age"), Message("assistant", "Bob is 9."),
             Message("user", "Who is older?")]  # fmt: skip
    for ask in (choice_messages, first_messages):
        shown = ask(turns, specs("age"))[-1].content
        assert "Said before:\nUser: How old is Ann?\nYou: Ann is 7.\nUser: And xxx" in shown and "Be kind" not in shown
        assert shown.endswith("x ...\nYou: Bob is 9.\n\nRequest: Who is older?")
    own = [Message("assistant", "", (ToolCall("age", '{"name": "Ann"}', "b"),)), Message("tool", "8", (), "b", "age")]
    shown = choice_messages([*turns, *own], specs("age"))[-1].content
    assert shown.endswith('Request: Who is older?\n\nDone so far:\n\nage {"name": "Ann"} gave:\n8')


def test_a_result_that_the_caller_gave_is_answered_from() -> None:
    """A run that ended with a call for the caller goes on with its result."""
    age = ToolSpec("age", "The age of a person.", {"type": "object", "properties": {"name": {"type": "string"}}})
    model = Scripted(next_is("age"), '{"name": "Ann"}')
    first = outcome_of(Agent(model, tools(), GUIDED, external=[age]), "How old is Ann?")
    assert first.stop == "calls" and [c.name for c in first.pending] == ["age"]
    model = Scripted(next_is("answer"), "Ann is 8.")
    messages = [*first.messages, Message("tool", "8", (), first.pending[0].id, "age")]
    assert asyncio.run(_run(Agent(model, tools(), GUIDED, external=[age]), messages)) == "Ann is 8."
    choice, answer = model.asked
    assert 'age {"name": "Ann"} gave:\n8' in choice[0][-1].content
    assert "do not speak of tools" in answer[0][0].content and "8\n\n(Answer the" in answer[0][-1].content


def test_names_of_the_choice() -> None:
    two = specs("double", "halve")
    assert chosen(next_is("halve"), two) == "halve" and chosen(next_is("answer"), two) == ANSWER
    assert [chosen(text, two) for text in ("halve", next_is("third"), "[]", '{"next": 3}', "")] == [None] * 5
    names = json.loads(choice_grammar(two).text)["properties"]["next"]["enum"]
    assert names == ["double", "halve", "answer"]
    own = specs("answer")
    assert chosen(next_is("answer"), own) == "answer" and chosen(next_is("reply_to_user"), own) == ANSWER


# -------------------------------------------------------------------- citations


def page(number: int, title: str, text: str, kind: str = "page") -> CallRecord:
    source = {"number": number, "url": f"http://site/{number}", "title": title}
    data: dict[str, Any] = {"kind": kind, "source": number, "sources": [source]}
    if kind == "search":
        data["results"] = [{"source": number, "title": title, "snippet": text}]
    return CallRecord(ToolCall("open_page", "{}"), Observation(text, data=data), "done", 0.0)


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("The town had 18,640 inhabitants, according to the page.", "【1†Town】"),
        ("The mayor is Ingrid Tolvanen.", "【2†Council】"),
        ("镇长是沈若兰。", "【3†栖云镇】"),
        ("It had 12,000 inhabitants.", ""),  # a number that stands nowhere
        ("I could not find anything about that.", ""),
        ("The mayor is Ingrid Tolvanen 【2†Council】.", ""),  # it cites already
        ("The mayor is Ingrid Tolvanen [2].", ""),
        ("", ""),
    ],
)
def test_an_answer_without_a_mark_gets_that_of_its_page(answer: str, mark: str) -> None:
    records = [
        page(1, "Town", "Averlund had 18640 inhabitants in 2022."),
        page(2, "Council", "The mayor of Averlund, Ingrid Tolvanen, was elected.", "search"),
        page(3, "栖云镇", "现任镇长沈若兰，2021年当选。"),
    ]
    question = "Who is the mayor of Averlund? 栖云镇的镇长是谁？ How many people live there?"
    assert cited_by_overlap(answer, question, records) == mark
    assert cited_by_overlap(answer, question, []) == ""


def test_the_mark_is_said_and_kept() -> None:
    tool = FakeTool("open_page", lambda *_: page(4, "Library", "Opened in 1911.").observation)
    model = Scripted(call("open_page"), "It was opened in 1911.")
    events = asyncio.run(collect(Agent(model, [tool]), "When was the library opened?"))
    assert events[-1].outcome.answer == "It was opened in 1911.【4†Library】"
    assert "".join(e.text for e in events if isinstance(e, Said)) == events[-1].outcome.answer


def test_a_model_is_asked_first_whether_it_needs_a_tool() -> None:
    """A name alone comes first; a tool's leads to the choice that says what is needed, the answer's to the answer."""
    asked: list[list[str]] = []
    may_answer: list[bool] = []

    async def ask(messages: Sequence[Message], **sampling: Any) -> str:
        schema = json.loads(sampling["grammar"].text)["properties"]
        properties = [*schema]
        asked.append(properties)
        may_answer.append("answer" in schema["next"]["enum"])
        if properties == ["next"]:
            return json.dumps({"next": "answer" if "tea" in messages[-1].content else "halve"})
        return json.dumps({"need": "x", "next": "double"})

    def choose(*messages: Message) -> tuple[str, str] | None:
        asked.clear()
        return asyncio.run(Asides(ask).choice(messages, specs("double", "halve")))

    order = Message("user", "Where is order 5?")
    assert choose(Message("user", "Do you like tea?")) == (ANSWER, "") and asked == [["next"]]
    assert choose(order) == ("double", "x") and asked == [["next"], ["need", "next"]]
    assert may_answer[-2:] == [True, False], "it was said that a tool is needed"
    assert choose(order, Message("tool", "4", (), "a", "double")) == ("double", "x") and asked == [["need", "next"]]
    assert may_answer[-1]
