"""/v1/chat/completions against OpenAI's own client: every case streamed and not, and both say the same.

    python -m pytest -q tests/test_server_chat.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import jsonschema
import pytest

from tests.server_helpers import HI, TIME, TOOLS, WEATHER, Server, openai_server

FORMATS = ("chatglm3", "glm-4", "glm-4-0414", "glm-z1", "codegeex4", "chatml", "jinja")


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(openai_server(name)) for name in FORMATS}


@pytest.fixture(params=FORMATS)
def each(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Server:
    return servers[request.param]


@pytest.fixture
def glm(servers: dict[str, Server]) -> Server:
    server = servers["glm-4"]
    server.says("\nHello 北京!")
    return server


def written(server: Server, calls: list[tuple[str, dict[str, Any]]], text: str = "") -> tuple[str, str | None]:
    """(an answer of this format, the token that ends it)"""
    name = server.name
    if name in ("chatml", "jinja"):
        blocks = [
            "<tool_call>\n" + json.dumps({"name": n, "arguments": a}, ensure_ascii=False) + "\n</tool_call>"
            for n, a in calls
        ]
        return "\n".join([text, *blocks] if text else blocks), None
    if name == "codegeex4":
        blocks = ["```json\n" + json.dumps({"name": n, "arguments": a}, ensure_ascii=False) + "\n```" for n, a in calls]
        return "\n".join([text, *blocks] if text else blocks), "<|observation|>"
    if name == "chatglm3":
        turns = [f"{n}\n ```python\ntool_call({', '.join(f'{k}={v!r}' for k, v in a.items())})\n```" for n, a in calls]
    else:
        turns = [f"{n}\n{json.dumps(a, ensure_ascii=False)}" for n, a in calls]
    lead = "Hm.\n</think>\n\n" if name == "glm-z1" else ""
    return lead + "<|assistant|>".join([f"\n{text}", *turns] if text else turns), "<|observation|>"


# -------------------------------------------------------------------- tool calls, in every format

CALLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "one call": [("get_weather", {"city": "北京"})],
    "no arguments": [("get_time", {})],
    "two calls": [("get_weather", {"city": "Paris", "days": 2}), ("get_time", {})],
    "marks in a string": [("get_weather", {"city": "a\n```<x> \"q\" {'}"})],
}


@pytest.mark.parametrize("case", CALLS)
def test_tool_calls(each: Server, case: str) -> None:
    calls = CALLS[case]
    if case == "marks in a string" and each.name == "codegeex4":
        calls = [("get_weather", {"city": "a\n<x> \"q\" {'}"})]
    each.says(*written(each, calls))
    answer = each.chat(tools=TOOLS).choices[0]
    found = [(c.function.name, json.loads(c.function.arguments)) for c in answer.message.tool_calls]
    assert found == calls and answer.finish_reason == "tool_calls" and answer.message.content is None
    assert len({c.id for c in answer.message.tool_calls}) == len(calls)


def test_text_before_a_call_and_text_alone(each: Server) -> None:
    each.says(*written(each, CALLS["one call"], "Let me see."))
    answer = each.chat(tools=TOOLS).choices[0]
    assert answer.message.content.strip() == "Let me see." and len(answer.message.tool_calls) == 1
    lead = "Hm.\n</think>\n\n" if each.name == "glm-z1" else "\n" if each.name not in ("chatml", "jinja") else ""
    each.says(f"{lead}No tool is needed, 不用。")
    answer = each.chat(tools=TOOLS).choices[0]
    assert answer.message.content.strip() == "No tool is needed, 不用。" and answer.message.tool_calls is None
    assert answer.finish_reason == "stop"


def test_plain_text_streams_at_once_though_there_are_tools(each: Server) -> None:
    lead = "Hm.\n</think>\n\n" if each.name == "glm-z1" else "\n" if each.name not in ("chatml", "jinja") else ""
    each.says(f"{lead}The quick brown fox jumps over the lazy dog.")
    chunks = list(each.client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS, stream=True))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 4


def test_arguments_stream_in_pieces(each: Server) -> None:
    each.says(*written(each, [("get_weather", {"city": "Paris and Rome", "days": 3}), ("get_time", {})]))
    chunks = list(each.client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS, stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [c.function.name for c in calls if c.id] == ["get_weather", "get_time"]
    first = [c.function.arguments for c in calls if c.index == 0 and not c.id]
    assert len(first) >= (2 if each.name == "chatglm3" else 6)
    assert json.loads("".join(map(str, first))) == {"city": "Paris and Rome", "days": 3}


def test_a_call_that_is_cut_off_is_one_whose_arguments_end_there(each: Server) -> None:
    each.says(*written(each, [("get_weather", {"city": "Paris", "days": 3})]))
    ids = each.script.ids
    n = next(n for n in range(len(ids)) if "days" in each.tokenizer.decode(ids[:n]))
    for fields in ({}, {"parallel_tool_calls": False}):
        answer = each.chat(tools=TOOLS, max_tokens=n, **fields).choices[0]
        assert answer.finish_reason == "length" and not (answer.message.content or "").strip()
        (call,) = answer.message.tool_calls
        assert call.function.arguments.startswith('{"city": "Paris"')
        with pytest.raises(json.JSONDecodeError):
            json.loads(call.function.arguments)


def test_one_call_at_a_time(each: Server) -> None:
    each.says(*written(each, CALLS["two calls"]))
    answer = each.chat(tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert [c.function.name for c in answer.message.tool_calls] == ["get_weather"]
    assert answer.finish_reason == "tool_calls"


def test_without_tools_or_with_none_a_call_is_text(each: Server) -> None:
    each.says(*written(each, CALLS["one call"]))
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = each.chat(**fields).choices[0]
        assert answer.message.tool_calls is None and "get_weather" in answer.message.content
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_come_is_valid_whatever_the_model_says(each: Server, choice: Any) -> None:
    """The logits are noise: only the grammar makes sense of them."""
    each.says("", noise=True)
    schema = {"type": "object", "properties": {"city": {"enum": ["北京", "Paris"]}, "days": {"type": "integer"}},
              "required": ["city", "days"], "additionalProperties": False}  # fmt: skip
    tools = [{"type": "function", "function": WEATHER["function"] | {"parameters": schema}}, TIME]
    if each.name == "glm-z1":  # noise would think for ever
        each.says("</think>\n\nget_weather\n{\"city\":\"Paris\",\"days\":3}")
    answer = each.chat(tools=tools, tool_choice=choice, max_tokens=900).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
    for call in answer.message.tool_calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            jsonschema.validate(arguments, schema)
        else:
            assert choice == "required" and call.function.name == "get_time" and arguments == {}


def test_strict_tools_hold_the_arguments_of_a_free_answer(each: Server) -> None:
    tools = [{"type": "function", "function": WEATHER["function"] | {"strict": True}}]
    each.says(*written(each, [("get_weather", {"city": "Paris", "days": "three"})]))  # days must be an integer
    each.script.stop_id = each.stop_id
    answer = each.chat(tools=tools, max_tokens=200, logit_bias={}).choices[0]
    for call in answer.message.tool_calls or []:
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    lead = "Hm.\n</think>\n\n" if each.name == "glm-z1" else "\n" if each.name not in ("chatml", "jinja") else ""
    each.says(f"{lead}Just text.")
    assert each.chat(tools=tools).choices[0].message.content.strip() == "Just text."


def test_answers_held_to_a_schema(each: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
              "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    each.says("", noise=True)
    if each.name == "glm-z1":
        each.says('Hm.</think>\n{"a":1,"b":"x"}')
    fmt = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    answer = each.chat(response_format=fmt, max_tokens=500).choices[0]
    jsonschema.validate(json.loads(answer.message.content), schema)
    assert answer.finish_reason == "stop"
    each.says(('Hm.</think>\n' if each.name == "glm-z1" else "") + '{"a": []}')
    answer = each.chat(response_format={"type": "json_object"}, max_tokens=500).choices[0]
    assert isinstance(json.loads(answer.message.content), dict)


def test_reasoning_comes_apart_from_the_answer(servers: dict[str, Server]) -> None:
    for name in ("glm-z1", "chatml"):
        server = servers[name]
        opened = "" if name == "glm-z1" else "<think>\n"
        server.says(f"{opened}First I think.\n</think>\n\nThen I speak.")
        answer = server.chat().choices[0]
        assert answer.message.reasoning_content.strip() == "First I think."
        assert answer.message.content == "Then I speak."
        assert server.chat().usage.completion_tokens_details.reasoning_tokens > 3


# -------------------------------------------------------------------- sampling, stopping, counting


@pytest.mark.parametrize(
    "fields,content,finish",
    [
        ({}, "Hello 北京!", "stop"),
        ({"stop": "北"}, "Hello ", "stop"),
        ({"stop": ["zzz", "lo 北"]}, "Hel", "stop"),
        ({"stop": ["!"]}, "Hello 北京", "stop"),
        ({"stop": ["never"]}, "Hello 北京!", "stop"),
        ({"max_tokens": 1}, "", "length"),
        ({"max_tokens": 2}, None, "length"),
        ({"max_completion_tokens": 2}, None, "length"),
        ({"max_tokens": 2, "max_completion_tokens": 2}, None, "length"),
        ({"temperature": 0, "top_p": 0.1, "seed": 1}, "Hello 北京!", "stop"),
        ({"temperature": 2, "top_p": 0, "seed": 1}, "Hello 北京!", "stop"),
        ({"frequency_penalty": 0.5, "presence_penalty": -0.5}, "Hello 北京!", "stop"),
        ({"n": 1, "user": "me"}, "Hello 北京!", "stop"),
        ({"modalities": ["text"], "store": False, "service_tier": "auto"}, "Hello 北京!", "stop"),
        ({"prompt_cache_key": "k", "safety_identifier": "me"}, "Hello 北京!", "stop"),
        ({"tools": [], "tool_choice": "auto"}, "Hello 北京!", "stop"),
        ({"response_format": {"type": "text"}}, "Hello 北京!", "stop"),
        ({"extra_body": {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2}}, "Hello 北京!", "stop"),
        ({"extra_body": {"temperature": None, "stop": None, "tools": None, "logprobs": None}}, "Hello 北京!", "stop"),
    ],
)  # fmt: skip
def test_fields(glm: Server, fields: dict[str, Any], content: str | None, finish: str) -> None:
    answer = glm.chat(**fields).choices[0]
    assert answer.finish_reason == finish
    assert content is None or answer.message.content == content


def test_n_answers(glm: Server) -> None:
    whole = glm.chat(n=3)
    assert [c.index for c in whole.choices] == [0, 1, 2]
    assert {c.message.content for c in whole.choices} == {"Hello 北京!"}
    assert whole.usage.completion_tokens == 3 * glm.chat().usage.completion_tokens


def test_seeds_and_their_absence(servers: dict[str, Server]) -> None:
    server = servers["glm-4"]
    server.says("", noise=True)
    server.script.stop_id = 0  # noise that does not end by itself
    fields: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12}
    same = [server.chat(seed=5, **fields).choices[0].message.content for _ in range(2)]
    assert same[0] == same[1] != server.chat(seed=6, **fields).choices[0].message.content
    two = server.chat(seed=5, n=2, **fields).choices
    assert two[0].message.content == same[0] != two[1].message.content
    ask = server.client.chat.completions.create
    free = [ask(model="tiny", messages=HI, **fields).choices[0].message.content for _ in range(2)]
    assert free[0] != free[1], "without a seed each answer draws its own"


def test_logprobs(glm: Server) -> None:
    answer = glm.chat(logprobs=True, top_logprobs=3).choices[0]
    tokens = answer.logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == answer.message.content
    assert all(len(t.top_logprobs) <= 3 and t.top_logprobs[0].logprob == t.logprob <= 0 for t in tokens)
    assert all(t.top_logprobs == [] for t in glm.chat(logprobs=True).choices[0].logprobs.content)
    assert glm.chat().choices[0].logprobs is None
    cut = glm.chat(logprobs=True, stop="北").choices[0]
    assert b"".join(bytes(t.bytes) for t in cut.logprobs.content).decode() == "Hello "


def test_logit_bias_forbids(glm: Server) -> None:
    bang = glm.tokenizer.encode("!")[-1]
    assert "!" in glm.chat().choices[0].message.content
    assert "!" not in glm.chat(logit_bias={str(bang): -100}, max_tokens=8, seed=1).choices[0].message.content


def test_usage_and_timings(glm: Server) -> None:
    whole = glm.chat()
    assert whole.usage.prompt_tokens == len(glm.script.seen[-1])
    assert whole.usage.completion_tokens == len(glm.script.ids) + 1, "the token that ends the answer counts"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    timings = whole.timings
    assert timings["prefill_s"] > 0 and timings["context_used"] == whole.usage.total_tokens
    chunks = list(glm.client.chat.completions.create(model="tiny", messages=HI, stream=True))
    assert all(c.usage is None for c in chunks) and all(c.choices for c in chunks), "usage only where asked for"


# -------------------------------------------------------------------- messages, as clients send them

LANGCHAIN: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "id": "call_1", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]  # fmt: skip
OPEN_WEBUI: list[dict[str, Any]] = [
    {"role": "system", "content": "User Context:\n"},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "Hello!", "reasoning_content": None},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
]
AS_ANSWERED: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "", "refusal": None, "annotations": [], "audio": None, "function_call": None,
     "tool_calls": [{"id": "c", "type": "function", "index": 0, "function": {"name": "get_time", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "c", "name": "get_time", "content": [{"type": "text", "text": "noon"}]},
]  # fmt: skip
SHAPES: dict[str, list[dict[str, Any]]] = {
    "langchain": LANGCHAIN, "open webui": OPEN_WEBUI, "an answer sent back": AS_ANSWERED,
    "developer": [{"role": "developer", "content": "Be brief."}, *HI],
    "empty content": [{"role": "user", "content": ""}],
    "reasoning": [*HI, {"role": "assistant", "content": "x", "reasoning_content": "y"}, *HI],
    "two users": [*HI, *HI],
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_message_shapes(each: Server, shape: str) -> None:
    each.says(*written(each, [], "ok"))
    answer = each.chat(messages=SHAPES[shape], tools=TOOLS).choices[0]
    assert answer.message.content.strip() == "ok"


def test_the_prompt_is_the_formats_own(glm: Server) -> None:
    glm.chat(messages=LANGCHAIN, tools=TOOLS)
    text = glm.tokenizer.decode(glm.script.seen[-1], skip_special=False)
    assert text.startswith("[gMASK]<sop><|system|>\n") and text.endswith("<|observation|>\nsunny<|assistant|>")
    assert '<|assistant|>get_weather\n{"city": "Paris"}' in text and "<|user|>\nWeather?" in text
    glm.chat(messages=[{"role": "user", "content": "<|user|> [gMASK]"}])
    ids = glm.script.seen[-1]
    assert ids.count(glm.tokenizer.special_ids["<|user|>"]) == 1, "no text is a special token"
