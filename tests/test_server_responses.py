"""/v1/responses against OpenAI's own client: whole and streamed say the same, and the events keep their order.

python -m pytest -q tests/test_server_responses.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import jsonschema
import pytest
from pydantic import BaseModel

from tests.server_helpers import CONTEXT, Server, openai_server

WEATHER = {
    "type": "function", "name": "get_weather", "description": "weather", "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip
TIME = {"type": "function", "name": "get_time", "parameters": None, "strict": None}
TOOLS: list[Any] = [WEATHER, TIME]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CALLS = 'get_weather\n{"city": "北京"}<|assistant|>get_time\n{}'


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(openai_server(name)) for name in ("glm-4", "glm-z1")}


@pytest.fixture
def glm(servers: dict[str, Server]) -> Server:
    servers["glm-4"].says("\nHello 北京!")
    return servers["glm-4"]


def same(response: Any) -> dict[str, Any]:
    """A response without what differs from run to run: identities and times."""
    value: dict[str, Any] = response.model_dump()
    for name in ("id", "created_at", "completed_at"):
        value.pop(name)
    for item in value["output"]:
        assert item.pop("id") and item.pop("call_id", "call")
    return value


def ask(server: Server, **fields: Any) -> Any:
    """The response, asked for twice: whole and streamed. They must be the same."""
    fields = {"model": "tiny", "input": "Hi", **fields}
    whole = server.client.responses.create(**fields)
    events = list(server.client.responses.create(**fields, stream=True))
    check_order(events)
    assert same(events[-1].response) == same(whole)
    assert events[-1].type == f"response.{whole.status}"
    return whole


def check_order(events: list[Any]) -> None:
    """Every rule that the events of a response keep."""
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    final = events[-1].response
    assert {e.response.id for e in (*events[:2], events[-1])} == {final.id}
    at = 2
    items: list[Any] = []
    while events[at].type == "response.output_item.added":
        item, index = events[at].item, len(items)
        inner = []
        for event in events[at:]:
            inner.append(event)
            if event.type == "response.output_item.done":
                break
        at += len(inner)
        assert all(e.output_index == index for e in inner)
        assert all(getattr(e, "item_id", item.id) == item.id for e in inner)
        done = inner[-1].item
        kind = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}
        name = f"response.{kind[item.type]}"
        parts = item.type != "function_call"
        assert (item.status, done.id) == ("in_progress", item.id)
        opening = ["response.output_item.added"] + ["response.content_part.added"] * parts
        closing = [f"{name}.done"] + ["response.content_part.done"] * parts + ["response.output_item.done"]
        deltas = inner[len(opening) : -len(closing)]
        assert [e.type for e in inner] == [*opening, *[f"{name}.delta"] * len(deltas), *closing] and deltas
        text = "".join(e.delta for e in deltas)
        if parts:
            assert text == inner[-3].text == inner[-2].part.text == done.content[0].text and item.content == []
            assert all(e.content_index == 0 for e in inner[1:-1])
        else:
            assert text == inner[-2].arguments == done.arguments and item.arguments == ""
            assert item.name == done.name == inner[-2].name and item.call_id == done.call_id
        items.append(done)
    assert at == len(events) - 1 and [i.id for i in final.output] == [i.id for i in items]
    assert final.output == items


# -------------------------------------------------------------------- what is answered


def test_text(glm: Server) -> None:
    answer = ask(glm, temperature=0.5, top_p=0.5, metadata={"a": "b"}, user="me", instructions="Be brief.")
    assert answer.output_text == "Hello 北京!" and answer.status == "completed"
    assert answer.output[0].role == "assistant" and answer.incomplete_details is None and answer.error is None
    assert (answer.temperature, answer.top_p, answer.metadata, answer.instructions) == (
        0.5,
        0.5,
        {"a": "b"},
        "Be brief.",
    )
    usage = answer.usage
    assert usage.input_tokens == len(glm.script.seen[-1]) and usage.output_tokens == len(glm.script.ids) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert (answer.store, answer.tool_choice, answer.tools, answer.text.format.type) == (False, "auto", [], "text")


def test_an_answer_that_is_cut_off(glm: Server) -> None:
    answer = ask(glm, max_output_tokens=3)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[-1].status == "incomplete" and answer.max_output_tokens == 3
    glm.says(CALLS, "<|observation|>")
    ids = glm.script.ids
    n = next(n for n in range(len(ids)) if '"city": "' in glm.tokenizer.decode(ids[:n]))
    answer = ask(glm, tools=TOOLS, max_output_tokens=n)
    assert answer.status == "incomplete" and answer.output[0].status == "incomplete"
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.output[0].arguments)


def test_calls(servers: dict[str, Server]) -> None:
    for name, lead in (("glm-4", ""), ("glm-z1", "Hm.\n</think>\n\n")):
        servers[name].says(lead + CALLS, "<|observation|>")
        answer = ask(servers[name], tools=TOOLS)
        calls = [item for item in answer.output if item.type == "function_call"]
        assert [(c.name, json.loads(c.arguments)) for c in calls] == [
            ("get_weather", {"city": "北京"}),
            ("get_time", {}),
        ]
        assert len({c.call_id for c in calls}) == 2 and answer.status == "completed" and answer.output_text == ""
        assert [t.name for t in answer.tools] == ["get_weather", "get_time"]
        one = ask(servers[name], tools=TOOLS, parallel_tool_calls=False)
        assert [item.type for item in one.output if item.type != "reasoning"] == ["function_call"]
        none = ask(servers[name], tools=TOOLS, tool_choice="none")
        assert "get_weather" in none.output_text


def test_text_in_front_of_a_call_and_reasoning_in_front_of_text(servers: dict[str, Server]) -> None:
    servers["glm-4"].says(f"\nLet me see.<|assistant|>{CALLS}", "<|observation|>")
    assert [item.type for item in ask(servers["glm-4"], tools=TOOLS).output] == ["message"] + ["function_call"] * 2
    servers["glm-z1"].says("First I think.\n</think>\n\nThen I speak.")
    answer = ask(servers["glm-z1"])
    assert answer.output[0].type == "reasoning" and answer.output[0].content[0].text.strip() == "First I think."
    assert answer.output_text == "Then I speak." and answer.usage.output_tokens_details.reasoning_tokens > 3


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_that_must_come(glm: Server, choice: Any) -> None:
    glm.says("", noise=True)
    answer = ask(glm, tools=[{**WEATHER, "parameters": SCHEMA}], tool_choice=choice, max_output_tokens=900)
    (call,) = answer.output
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    assert answer.tool_choice == choice or answer.tool_choice.name == "get_weather"


def test_answers_held_to_a_schema(glm: Server) -> None:
    glm.says("", noise=True)
    text = {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA, "strict": True}}
    answer = ask(glm, text=text, max_output_tokens=500)
    jsonschema.validate(json.loads(answer.output_text), SCHEMA)
    assert answer.text.format.schema_ == SCHEMA
    glm.says('{"b": 1}')
    assert json.loads(ask(glm, text={"format": {"type": "json_object"}}).output_text) == {"b": 1}


def test_the_client_parses_a_stream(glm: Server) -> None:
    class Answer(BaseModel):
        a: int

    glm.says('{"a":12}')
    with glm.client.responses.stream(model="tiny", input="Hi", text_format=Answer) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert final.output_parsed == Answer(a=12) and "response.output_text.delta" in kinds
    assert glm.client.responses.parse(model="tiny", input="Hi", text_format=Answer).output_parsed == Answer(a=12)


def test_logprobs(glm: Server) -> None:
    answer = ask(glm, include=["message.output_text.logprobs"], top_logprobs=2)
    tokens = answer.output[0].content[0].logprobs
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == answer.output_text
    assert all(len(t.top_logprobs) == 2 and t.logprob <= 0 for t in tokens)
    assert ask(glm).output[0].content[0].logprobs == []


# -------------------------------------------------------------------- what is asked


def test_a_conversation_of_items(glm: Server) -> None:
    glm.says(CALLS, "<|observation|>")
    first = ask(glm, tools=TOOLS)
    glm.says("\nok")
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in ("Weather", "?")]},
        *[item.model_dump(exclude_none=True) for item in first.output],
        *[{"type": "function_call_output", "call_id": item.call_id, "output": f"result {i}"}
          for i, item in enumerate(first.output)],
    ]  # fmt: skip
    answer = ask(glm, input=items, tools=TOOLS)
    text = glm.tokenizer.decode(glm.script.seen[-1], skip_special=False)
    assert text.endswith(
        "<|user|>\nWeather?<|assistant|>get_weather\n{\"city\": \"北京\"}<|assistant|>get_time\n{}"
        "<|observation|>\nresult 0<|observation|>\nresult 1<|assistant|>"
    )  # fmt: skip
    assert "Be brief." in text
    again = [*items, *[item.model_dump(exclude_none=True) for item in answer.output], {"role": "user", "content": "x"}]
    ask(glm, input=again, tools=TOOLS)
    assert glm.tokenizer.decode(glm.script.seen[-1], skip_special=False).endswith(
        "<|assistant|>\nok<|user|>\nx<|assistant|>"
    )


def test_reasoning_goes_back_into_the_prompt(servers: dict[str, Server]) -> None:
    server = servers["glm-z1"]
    server.says("I plan.\n</think>\n\n" + CALLS, "<|observation|>")
    first = ask(server, tools=TOOLS)
    server.says("x\n</think>\n\nok")
    results = [{"type": "function_call_output", "call_id": c.call_id, "output": "r"} for c in first.output[1:]]
    items = [{"role": "user", "content": "Hi"}, *[i.model_dump(exclude_none=True) for i in first.output], *results]
    ask(server, input=items, tools=TOOLS)
    assert "I plan." in server.tokenizer.decode(server.script.seen[-1], skip_special=False)


NOT = {"type": "json_schema", "name": "s", "schema": {"not": {}}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"nothing": 1}, "nothing"), ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"reasoning": {"effort": "low"}}, "reasoning"), ({"background": True}, "background"), ({"stop": "x"}, "stop"),
    ({"truncation": "auto"}, "truncation"), ({"conversation": "c"}, "conversation"), ({"input": []}, "input"),
    ({"input": 3}, "input"), ({"max_output_tokens": 0}, "max_output_tokens"), ({"temperature": 3}, "temperature"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"), ({"tools": [TIME, TIME]}, "tools[1].name"),
    ({"tool_choice": "required"}, "tool_choice"), ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"text": {"format": NOT}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_object", "name": "s"}}}, "text.format.name"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"), ({"input": "a b " * CONTEXT}, "input"),
    ({"tools": [{**WEATHER, "strict": True, "parameters": {"not": {}}}]}, "tools[0].parameters"),
    ({"model": "other"}, "model"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_refusals_name_the_field(glm: Server, fields: dict[str, Any], param: str, stream: bool) -> None:
    body = {"model": "tiny", "input": "Hi", "stream": stream, **fields}
    answer = httpx.post(f"{glm.client.base_url}responses", json=body, timeout=60)
    assert answer.status_code == (404 if "model" in fields else 400), answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param) and error["message"], error


def test_a_fault_in_mid_stream_ends_with_a_failed_response(glm: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run = glm.script.run
    monkeypatch.setattr(glm.script, "run", lambda chunks: run(chunks) * float("nan"))
    text = httpx.post(f"{glm.client.base_url}responses", json={"input": "Hi", "stream": True}, timeout=60).text
    values = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert [v["sequence_number"] for v in values] == list(range(len(values)))
    assert values[-1]["type"] == "response.failed" and values[-1]["response"]["error"]["message"]
    kinds = [event.type for event in glm.client.responses.create(model="tiny", input="Hi", stream=True)]
    assert kinds[-2:] == ["error", "response.failed"]
