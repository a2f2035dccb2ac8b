"""Answers read back: whatever the format, and however the text is cut into ids, the stream equals the whole."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openglm.formats import FORMATS
from openglm.formats.calls import read_python, write_python
from openglm.formats.matcher import ReplyText, StopText, cut
from openglm.types import Message, ToolCall, ToolSpec
from tests.format_helpers import BROWSER, PYTHON, SPECIALS_OF, TOOLS, call, format_named, parse, tokenizer_with

ALL_TOOLS = (*TOOLS, PYTHON, BROWSER)
WITH_TOOLS = [name for name in FORMATS if name not in ("glm-130b", "chatglm-6b", "chatglm2", "codegeex2")]
CALL = call("get_weather", city="北京")
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京"}}\n</tool_call>'
FENCE = '```json\n{"name": "get_weather", "arguments": {"city": "北京"}}\n```'
# What models of each kind may write: text, one call, several, without arguments, malformed, cut off, reasoning.
COMMON = ["你好，世界！", " Hello: 1 < 2\n", "", "\n", "[[训练时间]], ok?", "\ntext 👋 ", "<", "```", "<thi", "[[训"]
HEADED = [
    'get_weather\n{"city": "北京"}', "get_time\n{}", 'get_time\n{"a": ', "get_tim", "python\nprint(1)",
    "\nget_time\n{}", "get_times\n{}",
    'simple_browser\nsearch("北京")', "\n天气？<|assistant|>get_weather\n{}<|assistant|>get_time\n{}",
    "\na<|assistant|>\nb",
]  # fmt: skip
PYTHONIC = [
    "get_weather\n ```python\ntool_call(city='北京', n=-1, ok=True)\n```", "get_time\n```python\ntool_call()\n```",
    "get_time\n```python\ntool_call(x)\n```", "get_time\n```python\ntool_call(a=1",
    "interpreter\n```python\nprint(1)\n```", "interpreter\n```python\nprint(1)",
    "\n嗯<|assistant|>get_time\n ```python\ntool_call()\n```",
]  # fmt: skip
TAGGED = [
    HERMES, f"Look.\n{HERMES}\n{HERMES}", HERMES.replace('{"city": "北京"}', "{}"), HERMES.replace("}}", "}"),
    HERMES[:30], f"{HERMES} and\n more", HERMES.replace("北京", "</tool_call>"), HERMES.replace("weather", "nothing"),
    "<tool_call>[" + HERMES[12:-13] + "]</tool_call>", HERMES[:-4], "<think>\n先想。\n</think>\n\n" + HERMES,
    "<think>x", "<think>\n\n</think>\n\nok", "a <think> b", "\n<tool_call", "<tool_call>\n\n\n<tool_call>",
]  # fmt: skip
FENCED = [
    FENCE, f"Look.\n{FENCE}\n{FENCE}", FENCE.replace('{"city": "北京"}', "{}"), FENCE[:-8], FENCE[:20], FENCE[:-2],
    '```json\n{"a": 1}\n```', "```python\nprint(1)\n```", "Run:\n```python\nprint(1)\n```\n",
    "```python\nprint(1)\n``` done", "```python\nprint(",
]  # fmt: skip
THOUGHTS = ["先想。\n</think>\n\n", "</think>", "\nA\n\n</think>\n", "never ends", "a</thi", "\n</think>\n\nx</think>"]
OUTPUTS = {
    **dict.fromkeys(("glm-130b", "chatglm-6b", "chatglm2", "codegeex2"), COMMON),
    "chatglm3": COMMON + PYTHONIC,
    "glm-4": COMMON + HEADED,
    "glm-4-0414": COMMON + HEADED,
    "glm-z1": COMMON + THOUGHTS + [a + b for a in THOUGHTS[:3] for b in HEADED],
    "codegeex4": COMMON + FENCED,
    "chatml": COMMON + TAGGED,
    "jinja": COMMON + TAGGED,
}


def pieces(name: str, text: str, cuts: list[int]) -> list[int]:
    """Ids of a text that is cut at these bytes, even inside characters; names of the format's turn marks are ids."""
    tokenizer = tokenizer_with(SPECIALS_OF[name])
    ids: list[int] = []
    for i, part in enumerate(re.split(r"(<\|assistant\|>)", text)):
        if i % 2:
            ids.append(tokenizer.special_ids[part])
            continue
        data = part.encode()
        places = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
        for a, b in zip(places[:-1], places[1:], strict=True):
            ids += tokenizer.encode_bytes(data[a:b])
    return ids


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_every_cut_gives_the_same(name: str, data: st.DataObject) -> None:
    outputs = st.sampled_from(OUTPUTS[name]) | st.text(alphabet="<>/`\n{}\"' ,:？中a", max_size=12)
    text = data.draw(st.lists(outputs, min_size=1, max_size=3).map("".join))
    if "<|assistant|>" not in SPECIALS_OF[name]:
        text = text.replace("<|assistant|>", "")
    chat_format = format_named(name)
    tools = () if name not in WITH_TOOLS else data.draw(st.sampled_from([ALL_TOOLS, TOOLS, ()]))
    stop = data.draw(st.sampled_from([*chat_format.stop_ids, None]))
    tail = [] if stop is None else [stop]
    _, whole = parse(chat_format, pieces(name, text, []) + tail, tools)
    every = list(range(len(text.encode())))
    for cuts in (every, data.draw(st.lists(st.integers(0, 300), max_size=12))):
        ids = pieces(name, text, cuts) + tail
        events, message = parse(chat_format, ids, tools)
        assert message == whole
        assert "".join(e.text for e in events) == message.content
        assert "".join(e.reasoning for e in events) == message.reasoning
        assert tuple(e.tool_call for e in events if e.tool_call) == message.tool_calls
        given_ids = [i for e in events for i in e.token_ids]
        assert given_ids == ids[: len(given_ids)], "ids arrive in order, each once"


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_ids_are_parsed(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_with(SPECIALS_OF[name])
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    events, message = parse(format_named(name), ids, TOOLS if name in WITH_TOOLS else ())
    assert "".join(e.text for e in events) == message.content


# Without the characters that begin marks: an answer that spells one out is not told from it.
text = st.text(st.characters(codec="utf-8", exclude_characters="\n[<`"), min_size=1, max_size=20).map(str.strip)
values = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
arguments = st.dictionaries(st.text(max_size=5), values, max_size=3)
calls = st.builds(lambda name, a: call(name, **a), st.sampled_from(["get_weather", "get_time"]), arguments)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(text, st.data())
def test_parsing_undoes_rendering(name: str, content: str, data: st.DataObject) -> None:
    made = tuple(data.draw(st.lists(calls, max_size=3))) if name in WITH_TOOLS else ()
    thinks = name in ("glm-z1", "chatml", "jinja")
    reasoning = data.draw(text) if thinks else ""
    if name == "chatglm-6b":
        content = re.sub(r"[,!:;?]", "", content).strip()  # it rewrites these marks
    message = Message("assistant", content, made, reasoning=reasoning)
    chat_format, tools = format_named(name), TOOLS if name in WITH_TOOLS else ()
    prompt = chat_format.render([Message("user", "x")], tools).ids
    whole = chat_format.render([Message("user", "x"), message], tools, add_generation_prompt=False)
    assert whole.ids[: len(prompt)] == prompt
    assert whole.loss_mask == [False] * len(prompt) + [True] * (len(whole.ids) - len(prompt)), "all of it is learnt"
    assert parse(chat_format, whole.ids[len(prompt) :], tools)[1] == message


# -------------------------------------------------------------------- what is a call and what is text

CASES = [
    ("glm-4", "get_time\n{}", Message("assistant", "", (ToolCall("get_time", "{}"),))),
    ("glm-4", 'get_time\n{"a": ', Message("assistant", 'get_time\n{"a": ')),
    ("glm-4", "python\nprint(1)", Message("assistant", "python\nprint(1)")),  # half a program is not run
    ("glm-4", "python\nprint(1)<|assistant|>\nok", Message("assistant", "ok", (call("python", code="print(1)"),))),
    ("chatglm3", PYTHONIC[0], Message("assistant", "", (call("get_weather", city="北京", n=-1, ok=True),))),
    ("chatglm3", PYTHONIC[2], Message("assistant", PYTHONIC[2])),
    ("chatglm3", PYTHONIC[4], Message("assistant", "", (call("python", code="print(1)"),))),
    ("chatglm3", "\n 训练于[[训练时间]]。\n", Message("assistant", "训练于2023年。")),
    ("glm-z1", "想\n</think>\n\n" + HEADED[0], Message("assistant", "", (CALL,), reasoning="想")),
    ("glm-z1", "想\n</think>\n\n答", Message("assistant", "答", reasoning="想")),
    ("glm-z1", "想到一半", Message("assistant", "", reasoning="想到一半")),
    ("codegeex4", FENCED[1], Message("assistant", "Look.", (CALL, CALL))),
    ("codegeex4", '```json\n{"a": 1}\n```', Message("assistant", '```json\n{"a": 1}\n```')),
    ("codegeex4", "```python\nprint(1)\n```", Message("assistant", "```python\nprint(1)\n```")),
    ("codegeex4", FENCE[:-2], Message("assistant", "", (CALL,))),
    ("chatml", TAGGED[1], Message("assistant", "Look.", (CALL, CALL))),
    ("chatml", TAGGED[3], Message("assistant", TAGGED[3])),
    ("chatml", TAGGED[6], Message("assistant", "", (call("get_weather", city="</tool_call>"),))),
    ("chatml", TAGGED[7], Message("assistant", TAGGED[7])),
    ("chatml", TAGGED[8], Message("assistant", "", (CALL,))),
    ("jinja", TAGGED[10], Message("assistant", "", (CALL,), reasoning="先想。")),
]


@pytest.mark.parametrize(("name", "output", "expected"), CASES)
def test_calls_and_text(name: str, output: str, expected: Message) -> None:
    assert parse(format_named(name), pieces(name, output, []), ALL_TOOLS)[1] == expected


def test_a_program_of_codegeex4_is_a_call_when_the_turn_ends_with_it() -> None:
    special = tokenizer_with(SPECIALS_OF["codegeex4"]).special_ids
    ids = pieces("codegeex4", "Go.\n```python\nprint(1)\n```\n", [])
    chat_format = format_named("codegeex4")
    expected = Message("assistant", "Go.", (call("python", code="print(1)"),))
    assert parse(chat_format, [*ids, special["<|observation|>"]], ALL_TOOLS)[1] == expected
    plain = "Go.\n```python\nprint(1)\n```\n"
    assert parse(chat_format, [*ids, special["<|user|>"]], ALL_TOOLS)[1] == Message("assistant", plain)
    assert parse(chat_format, [*ids, special["<|observation|>"]], TOOLS)[1] == Message("assistant", plain)


@pytest.mark.parametrize("name", FORMATS)
def test_text_streams_at_once(name: str) -> None:
    """After a word that can be the beginning of nothing, every further character arrives with its own id."""
    tokenizer = tokenizer_with(SPECIALS_OF[name])
    parser = format_named(name).parser(ALL_TOOLS if name in WITH_TOOLS else ())
    opened = "x</think>" if name == "glm-z1" else ""
    for i in tokenizer.encode(f"{opened}\nSo "):
        parser.feed(i)
    for c in "well中get_timex{(":
        (*_, last) = [e for i in tokenizer.encode(c) for e in parser.feed(i)]
        assert last.text.endswith(c)
    tokens = tokenizer.encode("<tool_cat")
    shown = "".join(e.text for i in tokens for e in parser.feed(i))
    assert shown == "<tool_cat", "what turns out to be no mark is passed on as soon as that is known"


# -------------------------------------------------------------------- pieces


@given(st.text("ab<", max_size=12), st.sampled_from([("<a>",), ("<ab", "b<"), ("ab", "b<<")]))
def test_cut_loses_nothing_and_holds_back_no_more_than_it_must(text: str, tags: tuple[str, ...]) -> None:
    before, tag, rest = cut(text, tags)
    assert before + tag + rest == text
    places = [i for i in range(len(text)) if any(text.startswith(t, i) for t in tags)]
    if places:
        assert tag and len(before) == places[0]
    else:
        ends = [n for n in range(len(text)) if any(t.startswith(text[n:]) for t in tags)]
        assert not tag and len(before) == (ends[0] if ends else len(text))


def released_clean_up(reply: str) -> str:
    """The five rules of the released client, as whole-text substitutions."""
    reply = reply.strip().replace("[[训练时间]]", "2023年")
    for half, full in ((",", "，"), ("!", "！"), (":", "："), (";", "；"), (r"\?", "？")):
        reply = re.sub(r"([一-鿿])" + half, r"\1" + full, reply)
        reply = re.sub(half + r"([一-鿿])", full + r"\1", reply)
    return reply


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"中文a ,!:;?\n[", "[[训练时间]]", "[[训练"]), max_size=14).map("".join), st.data())
def test_clean_up_of_replies(reply: str, data: st.DataObject) -> None:
    for full_width in (True, False):
        cleaner = ReplyText(full_width)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=6)))
        places = zip([0, *cuts], [*cuts, len(reply)], strict=True)
        shown = "".join(cleaner.feed(reply[a:b]) for a, b in places) + cleaner.finish()
        plain = reply.strip().replace("[[训练时间]]", "2023年")
        assert shown == (released_clean_up(reply) if full_width else plain)


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(x=__import__('os'))", "tool_call(x=open('f').read())", "other(x=1)", "tool_call(1)",
        "tool_call(x=1); y", "tool_call(**f())", "tool_call(x={1})", "tool_call(" + "[" * 5000, "(lambda: 1)()",
        "tool_call.y()", "tool_call(x=b'')",
    ],
)  # fmt: skip
def test_python_calls_hold_literals_only(code: str) -> None:
    assert read_python(f"```python\n{code}\n```") is None


@given(arguments)
def test_python_calls_hold_any_arguments(values: dict[str, object]) -> None:
    found = read_python(write_python(json.dumps(values)))
    assert found is not None and json.loads(found) == values


def test_arguments_that_are_no_object_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a JSON object, not '\\[1\\]'"):
        format_named("chatglm3").render([Message("assistant", "", (ToolCall("f", "[1]"),))])


def test_built_in_tools_have_fixed_names() -> None:
    assert ToolSpec.from_dict({"type": "python"}) == PYTHON
    with pytest.raises(ValueError, match="no built-in tool 'bash'"):
        ToolSpec("bash", "", {}, builtin=True)


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_text_ends_at_the_stop_string_that_is_complete_first(text: str, stops: list[str], cuts: list[int]) -> None:
    """For every cutting into pieces; the reference looks at every beginning of the whole text."""
    ends = [(n, stop) for n in range(len(text) + 1) for stop in stops if text[:n].endswith(stop)]
    first = min((n for n, _ in ends), default=None)
    expected = text if first is None else text[: first - max(len(s) for n, s in ends if n == first)]
    matcher, out, at = StopText(stops), "", 0
    for n in cuts:
        out += matcher.feed(text[at : at + n])
        at += n
    out += matcher.finish()
    assert out == expected and matcher.found == (first is not None)
