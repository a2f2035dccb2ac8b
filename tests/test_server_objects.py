"""What is answered, field by field, beside what OpenAI and Anthropic answer: objects, headers, errors, events.

python -m pytest -q tests/test_server_objects.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

from openglm.chat import ChatModel
from openglm.engine import Engine, EngineOptions
from tests.server_helpers import CONTEXT, HI, TOOLS, Server, openai_server, running, scripted, service_of


@pytest.fixture(scope="module")
def glm() -> Iterator[Server]:
    with openai_server("glm-4") as server:
        server.says("\nHello 北京!")
        yield server


HEAD = {"id", "object", "created", "model", "choices", "service_tier", "system_fingerprint"}


def test_the_objects_are_openais(glm: Server) -> None:
    client = glm.client.with_options()
    asked: dict[str, Any] = {"model": "tiny", "messages": HI, "logprobs": True, "top_logprobs": 1}
    raw = client.chat.completions.with_raw_response.create(**asked)
    whole = json.loads(raw.text)
    assert raw.headers["x-request-id"].startswith("req_") and raw.headers["content-type"] == "application/json"
    assert set(whole) == HEAD | {"usage", "timings"} and whole["object"] == "chat.completion"
    assert re.fullmatch(r"chatcmpl-\w{24}", whole["id"]) and re.fullmatch(r"fp_\w{10}", whole["system_fingerprint"])
    choice = whole["choices"][0]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"] == {"role": "assistant", "content": "Hello 北京!", "refusal": None, "annotations": []}
    assert choice["logprobs"]["refusal"] is None
    assert all(set(t) == {"token", "bytes", "logprob", "top_logprobs"} for t in choice["logprobs"]["content"])
    assert all(set(t["top_logprobs"][0]) == {"token", "bytes", "logprob"} for t in choice["logprobs"]["content"])
    usage = {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details"}
    assert set(whole["usage"]) == usage and whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}

    url = f"{client.base_url}chat/completions"
    streamed = httpx.post(url, json={**asked, "stream": True, "stream_options": {"include_usage": True}})
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = streamed.text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]" and all(e.startswith("data: {") for e in events[:-2])
    chunks = [json.loads(e[6:]) for e in events[:-2]]
    assert all(c["object"] == "chat.completion.chunk" and c["usage"] is None for c in chunks[:-1])
    assert all(set(c) == HEAD | {"usage"} for c in chunks[:-1]) and set(chunks[-1]) == HEAD | {"usage", "timings"}
    assert {c["system_fingerprint"] for c in chunks} == {whole["system_fingerprint"]}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    text = client.completions.create(model="tiny", prompt="Hi")
    assert text.system_fingerprint == whole["system_fingerprint"] and text.id.startswith("cmpl-")


def test_usage_says_what_the_prefix_cache_saved() -> None:
    """One request after the other: the second one's prompt is the first one's, and whole pages of it are kept."""
    model, _ = scripted("glm-4", "\nHello")
    engine = Engine(model.engine.model, model.engine.special_ids, model.engine.vocab_size,
                    EngineOptions(n_parallel=2, pool_tokens=2 * CONTEXT))  # fmt: skip
    model = ChatModel(engine, model.tokenizer, model.chat_format, model.meta)
    long: list[Any] = [{"role": "user", "content": "Tell me of the fox and the dog. " * 8}]
    with running(service_of(model)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        first, second = (client.chat.completions.create(model="tiny", messages=long, max_tokens=2) for _ in range(2))
        third = client.responses.create(model="tiny", input=long, max_output_tokens=16)
    assert first.usage and second.usage and third.usage and first.usage.prompt_tokens_details
    n, page = first.usage.prompt_tokens, engine.scheduler.blocks.page_size
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert (
        second.usage.prompt_tokens_details
        and second.usage.prompt_tokens_details.cached_tokens == (n - 1) // page * page
    )
    assert third.usage.input_tokens_details.cached_tokens == (n - 1) // page * page > 0


@pytest.mark.parametrize(
    "status,path,key,code",
    [
        (401, "chat/completions", "wrong", "invalid_api_key"),
        (404, "models/other", "right", "model_not_found"),
        (404, "nowhere", "right", None),
        (405, "embeddings", "right", None),
    ],
)
def test_errors_are_openais(status: int, path: str, key: str, code: str | None) -> None:
    with running(service_of(scripted("glm-4", "\nHello")[0], api_keys=("right",))) as url:
        ask = httpx.post if status == 401 else httpx.get
        answer = ask(f"{url}/v1/{path}", headers={"Authorization": f"Bearer {key}"})
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["code"] == code


def test_options_of_a_stream_need_one(glm: Server) -> None:
    for path, body in (("chat/completions", {"messages": HI}), ("completions", {"prompt": "Hi"})):
        asked = {**body, "stream_options": {"include_usage": True}}
        answer = httpx.post(f"{glm.client.base_url}{path}", json=asked)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream_options"


def test_what_was_answered_may_be_sent_back_as_the_clients_dump_it(glm: Server) -> None:
    client, tool = glm.client, TOOLS[1]
    glm.says("get_time\n{}", "<|observation|>")
    message = client.chat.completions.create(model="tiny", messages=HI, tools=[tool]).choices[0].message
    flat: Any = {"type": "function", **tool["function"]}
    items = client.responses.create(model="tiny", input=HI, tools=[flat]).output
    glm.says("\nHello 北京!")
    said: Any = message.model_dump()
    result: Any = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "noon"}
    whole = client.chat.completions.create(model="tiny", messages=[*HI, said, result])
    assert whole.choices[0].message.content == "Hello 北京!"
    again: Any = [item.model_dump() for item in items]
    answer: Any = {"type": "function_call_output", "call_id": again[0]["call_id"], "output": "noon"}
    text = client.responses.create(model="tiny", input=[*HI, *again, answer])
    assert glm.script.seen[-1] == glm.script.seen[-2] and text.output_text == "Hello 北京!"
    dumped: Any = [item.model_dump() for item in text.output]
    client.responses.create(model="tiny", input=[*HI, *dumped, *HI])
    for wrong, param in (
        ({"type": "item_reference", "id": "x"}, "input[0].type"), ({"type": "function_call", "name": "x"}, "call_id"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "input[0].content[0].type"),
    ):  # fmt: skip
        refused = httpx.post(f"{client.base_url}responses", json={"input": [wrong]})
        assert refused.status_code == 400 and refused.json()["error"]["param"].endswith(param), refused.text


def test_files_are_listed(glm: Server) -> None:
    assert glm.client.files.list().data == []
    first, second = (glm.client.files.create(file=(f"{i}.txt", b"x"), purpose="user_data") for i in range(2))
    assert [file.id for file in glm.client.files.list()] == [second.id, first.id]


def test_messages_have_anthropics_ids_and_headers(glm: Server) -> None:
    url = str(glm.client.base_url).removesuffix("/v1/")
    glm.says('get_weather\n{"city": "Paris"}', "<|observation|>")
    tool = {"name": "get_weather", "input_schema": TOOLS[0]["function"]["parameters"]}
    asked = {"model": "tiny", "messages": HI, "max_tokens": 64, "tools": [tool]}
    answer = httpx.post(f"{url}/v1/messages", json=asked)
    assert answer.headers["request-id"].startswith("req_") and "x-request-id" not in answer.headers
    value = answer.json()
    keys = {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"}
    assert set(value) == keys and value["id"].startswith("msg_") and value["stop_reason"] == "tool_use"
    (block,) = value["content"]
    assert block["id"].startswith("toolu_") and block["input"] == {"city": "Paris"}
    (model,) = Anthropic(base_url=url, api_key="none").models.list()
    assert (model.id, model.type, model.display_name) == ("tiny", "model", "tiny") and model.created_at.year > 2000
    refused = httpx.post(f"{url}/v1/messages", json={**asked, "model": "other"}).json()
    assert refused["type"] == "error" and refused["error"]["type"] == "not_found_error"
    glm.says("\nHello 北京!")
