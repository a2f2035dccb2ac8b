"""The event list of an answer: however its text is cut into tokens, what a client puts together is the same.

    python -m pytest -q tests/test_server_events.py
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openglm.engine.request import Step
from openglm.formats.matcher import StopText
from openglm.server.events import Answer, CallArguments, CallOpened, Finish, Folded, Text, fold
from tests.format_helpers import SPECIALS_OF, TOOLS, format_named, parse, tokenizer_with
from tests.test_formats_parsing import OUTPUTS, pieces

FORMATS = ("chatglm3", "glm-4", "glm-4-0414", "glm-z1", "codegeex4", "chatml", "jinja")


def answer_of(name: str, ids: list[int], stop: tuple[str, ...] = (), max_calls: int | None = None) -> Folded:
    answer = Answer(format_named(name).parser(TOOLS, pieces=True), stop, None, max_calls)
    events = []
    for i, id in enumerate(ids):
        events += answer.feed(Step(id, -1.0, "stop" if i == len(ids) - 1 else None))
        if answer.stopped:
            break
    assert isinstance(events[-1], Finish) and sum(isinstance(e, Finish) for e in events) == 1
    opened = [e for e in events if isinstance(e, CallOpened)]
    assert [e.index for e in opened] == list(range(len(opened))) and len({e.id for e in opened}) == len(opened)
    for event in opened:
        rest = events[events.index(event) + 1 :]
        assert any(isinstance(e, CallArguments) and e.index == event.index for e in rest)
    assert all(e.text for e in events if isinstance(e, Text))
    return fold(events)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_cut_gives_the_same_answer(name: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(OUTPUTS[name]), min_size=1, max_size=3)))
    if "<|assistant|>" not in SPECIALS_OF[name]:
        text = text.replace("<|assistant|>", "")
    stop_id = data.draw(st.sampled_from(format_named(name).stop_ids))
    stops = data.draw(st.sampled_from([(), ("o",), ("\n", "北京"), (" <", "text 👋")]))
    max_calls = data.draw(st.sampled_from([None, 1]))
    cuts = data.draw(st.lists(st.integers(0, 300), max_size=12))
    every = list(range(len(text.encode())))
    found = [answer_of(name, [*pieces(name, text, c), stop_id], stops, max_calls) for c in (every, cuts, [])]
    shown = [(f.text, f.reasoning, [(c.name, c.arguments) for c in f.calls], f.finish) for f in found]
    assert shown[0] == shown[1] == shown[2]
    _, message = parse(format_named(name), [*pieces(name, text, every), stop_id], TOOLS, pieces=True)
    if not stops and max_calls is None:  # the parser of the format says what it should be
        assert found[0].text == message.content and found[0].reasoning == message.reasoning
        assert [(c.name, c.arguments) for c in found[0].calls] == [(c.name, c.arguments) for c in message.tool_calls]
        assert found[0].finish == Finish("tool_calls" if message.tool_calls else "stop")
    elif stops and not message.tool_calls:
        cut = StopText(stops)
        assert found[0].text == cut.feed(message.content) + cut.finish()
        assert (found[0].finish is not None and found[0].finish.stop_string is not None) == cut.found


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_of_calls_are_json(name: str) -> None:
    tokenizer, stop_id = tokenizer_with(SPECIALS_OF[name]), format_named(name).stop_ids[0]
    n = 0
    for text in OUTPUTS[name]:
        if "<|assistant|>" in text and "<|assistant|>" not in tokenizer.special_ids:
            continue
        ids = [*pieces(name, text, []), stop_id]
        calls, sure = answer_of(name, ids).calls, parse(format_named(name), ids, TOOLS)[1].tool_calls
        for call in calls:
            if len(calls) == len(sure) and '"a": ' not in text:  # none is broken, for the caller to refuse
                json.loads(call.arguments)
                n += 1
    assert n >= 2
