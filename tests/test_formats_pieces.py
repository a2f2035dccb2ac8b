"""Calls told while they are written: joined, the pieces are the call, however the answer is cut into ids.

python -m pytest -q tests/test_formats_pieces.py
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openglm.types import Event, Message, ToolCall, ToolSpec
from tests.format_helpers import SPECIALS_OF, TOOLS, format_named, parse
from tests.test_formats_parsing import ALL_TOOLS, HERMES, OUTPUTS, WITH_TOOLS, pieces

HEADERS = ("glm-4", "glm-4-0414", "glm-z1")


def told(name: str, ids: list[int], tools: tuple[ToolSpec, ...] = TOOLS) -> tuple[list[Event], Message]:
    """The events of a parser that tells calls in pieces; every call's pieces are checked against the whole call."""
    parser = format_named(name).parser(tools, pieces=True)
    events = [event for i in ids for event in parser.feed(i)] + parser.finish()
    opened = ""
    current: list[str] | None = None
    for event in events:
        if event.call_delta is not None:
            assert not event.text and not event.reasoning and event.tool_call is None
            assert bool(event.call_delta.name) == (current is None), "the name comes once, with the first piece"
            assert event.call_delta.arguments, "no piece is empty"
            opened = event.call_delta.name or opened
            current = [*(current or []), event.call_delta.arguments]
        elif current is not None:
            assert event.tool_call is not None, "between its pieces and its end a call stands alone"
            assert event.tool_call == ToolCall(opened, "".join(current))
            current = None
    assert current is None
    assert tuple(e.tool_call for e in events if e.tool_call) == parser.message.tool_calls
    assert "".join(e.text for e in events) == parser.message.content
    assert "".join(e.reasoning for e in events) == parser.message.reasoning
    given_ids = [i for e in events for i in e.token_ids]
    assert given_ids == ids[: len(given_ids)], "ids arrive in order, each once"
    return events, parser.message


def meant(calls: tuple[ToolCall, ...]) -> list[tuple[str, Any]]:
    """Calls with what their arguments say; those that are no JSON object are left out."""
    found = []
    for call in calls:
        try:
            value = json.loads(call.arguments)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append((call.name, value))
    return found


@pytest.mark.parametrize("name", WITH_TOOLS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_cut_tells_the_same_calls(name: str, data: st.DataObject) -> None:
    outputs = st.sampled_from(OUTPUTS[name]) | st.text(alphabet="<>/`\n{}\"' ,:？中a", max_size=12)
    text = data.draw(st.lists(outputs, min_size=1, max_size=3).map("".join))
    if "<|assistant|>" not in SPECIALS_OF[name]:
        text = text.replace("<|assistant|>", "")
    tools = data.draw(st.sampled_from([ALL_TOOLS, TOOLS]))
    stop = data.draw(st.sampled_from([*format_named(name).stop_ids, None]))
    tail = [] if stop is None else [stop]
    _, whole = told(name, pieces(name, text, []) + tail, tools)
    every = list(range(len(text.encode())))
    for cuts in (every, data.draw(st.lists(st.integers(0, 300), max_size=12))):
        assert told(name, pieces(name, text, cuts) + tail, tools)[1] == whole
    # Beside the parser that waits for the end: its calls are all here, and nothing else is unless a call was broken.
    _, sure = parse(format_named(name), pieces(name, text, []) + tail, tools)
    mine = iter(meant(whole.tool_calls))
    assert all(call in mine for call in meant(sure.tool_calls)), "each, in this order"
    assert whole.reasoning == sure.reasoning
    if len(whole.tool_calls) == len(sure.tool_calls):
        assert whole.content == sure.content
        if name in HEADERS and tail:
            assert whole.tool_calls == sure.tool_calls
    else:
        assert any(call.name in sure.content for call in whole.tool_calls)


def answers(name: str, calls: list[tuple[str, dict[str, Any]]], indent: int | None) -> str:
    """Calls as a model of this format writes them, in a spelling of its own."""
    if name == "chatglm3":
        items = [", ".join(f"{k}={v!r}" for k, v in a.items()) for _, a in calls]
        turns = [f"{n}\n ```python\ntool_call({i})\n```" for (n, _), i in zip(calls, items, strict=True)]
        return "<|assistant|>".join(turns)
    bodies = [(n, json.dumps(a, indent=indent, ensure_ascii=indent is None)) for n, a in calls]
    if name in HEADERS:
        return ("x</think>" if name == "glm-z1" else "") + "<|assistant|>".join(f"{n}\n{a}" for n, a in bodies)
    objects = [f'{{"name": "{n}",\n "arguments" : {a}}}' for n, a in bodies]
    if name == "codegeex4":
        return "\n".join(f"```json\n{o}\n```" for o in objects)
    return "\n".join(f"<tool_call>\n{o}\n</tool_call>" for o in objects)


names = st.text("abcxyz_", min_size=1, max_size=6).filter(lambda n: n not in ("as", "if", "is", "in", "or"))
simple = st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.sampled_from(
    ["</tool_call>", 'say "hi"', "it's", "'''", '"""', "a\nb", "\\", ")", "}, {", "#", "```", "<|user|>", "，"]
)  # fmt: skip
values = st.recursive(simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


@pytest.mark.parametrize("name", WITH_TOOLS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_arguments_come_through(name: str, data: st.DataObject) -> None:
    call = st.tuples(st.sampled_from(["get_weather", "get_time"]), st.dictionaries(names, values, max_size=4))
    calls = data.draw(st.lists(call, min_size=1, max_size=3))
    text = answers(name, calls, data.draw(st.sampled_from([None, 2])))
    if name == "codegeex4" and "\n```" in json.dumps(calls):
        return
    cuts = data.draw(st.lists(st.integers(0, 300), max_size=12) | st.just(list(range(len(text.encode())))))
    events, message = told(name, [*pieces(name, text, cuts), format_named(name).stop_ids[0]])
    assert meant(message.tool_calls) == calls and not message.content
    assert sum(bool(e.call_delta and e.call_delta.name) for e in events) == len(calls)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_arguments_come_while_they_are_written(name: str) -> None:
    call = ("get_weather", {"city": "a rather long name " * 4, "days": 3, "text": "more of it " * 5})
    text = answers(name, [call], None)
    ids = pieces(name, text, list(range(len(text.encode()))))
    parser = format_named(name).parser(TOOLS, pieces=True)
    at = [n for n, i in enumerate(ids) for e in parser.feed(i) if e.call_delta]
    if name == "chatglm3":  # argument by argument, since they are translated
        assert len(at) == 3 and at[0] < text.index("more") < at[-1]
    else:
        assert len(at) > 100 and at[0] < text.index("rather")


BROKEN = [
    # (format, what the model writes, the arguments: what is no JSON comes as it is)
    ("glm-4", 'get_time\n{"a": ', '{"a":'),
    ("glm-4", 'get_time\n{"a": 1} or so', '{"a": 1} or so'),
    ("glm-4", "get_time\n\n {} \n", "{}"),
    ("chatml", HERMES.replace("}}", "}"), '{"city": "北京"}'),  # whole arguments in an object without its end
    ("chatml", HERMES.replace('"}}', '"]}'), '{"city": "北京"]'),
    ("chatml", HERMES.replace("}}", '}, "id": 1}'), '{"city": "北京"}'),
    ("chatml", HERMES.replace("}}", '}, "name": "x"}'), '{"city": "北京"}, "name": "x"}\n'),
    ("chatml", HERMES.replace("}}", "}} and"), '{"city": "北京"}} and\n'),
    ("chatml", HERMES[: HERMES.index("京")], '{"city": "北'),
    ("chatglm3", "get_time\n```python\ntool_call(a=1, b=f(x))\n```", '{"a": 1,  b=f(x))\n```'),
    ("chatglm3", "get_time\n```python\ntool_call(a=1) + 2\n```", '{"a": 1} + 2\n```'),
    ("chatglm3", "get_time\n```python\ntool_call(a=1, b='x", '{"a": 1,  b=\'x'),
    ("chatglm3", "get_time\n```python\ntool_call(a='\\ud800', # )\n b=1e999)", '{"a": "\\ud800",  # )\n b=1e999)'),
    ("codegeex4", '```json\n{"name": "get_time", "arguments": {"a": [1}}\n```', '{"a": [1}}'),
]


@pytest.mark.parametrize(("name", "output", "expected"), BROKEN)
def test_what_is_broken_comes_as_it_is_written(name: str, output: str, expected: str) -> None:
    events, message = told(name, pieces(name, output, []))
    assert [c.arguments for c in message.tool_calls] == [expected]
    assert not message.content and any(e.call_delta for e in events)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("glm-4", "get_times\n{}"), ("chatglm3", "get_time\n```python\ntool_call(x)\n```"),
        ("chatglm3", "get_time\n```python\ntool_call(f(1), a=2)"), ("chatml", HERMES.replace("weather", "nothing")),
        ("chatml", HERMES[:40]), ("codegeex4", '```json\n{"a": 1}\n```'),
    ],
)  # fmt: skip
def test_what_never_was_a_call_is_text(name: str, output: str) -> None:
    events, message = told(name, pieces(name, output, list(range(99))))
    assert message.content == output and not message.tool_calls and not any(e.call_delta for e in events)


@pytest.mark.parametrize("told_in_pieces", [False, True])
def test_a_header_alone_is_a_call_without_arguments(told_in_pieces: bool) -> None:
    parser = format_named("glm-4").parser(TOOLS, pieces=told_in_pieces)
    for i in [*pieces("glm-4", "get_time\n", []), format_named("glm-4").stop_ids[0]]:
        parser.feed(i)
    assert parser.message.tool_calls == (ToolCall("get_time", "{}"),)
