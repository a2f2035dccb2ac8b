"""What a chat request may not hold: a 4xx in OpenAI's shape that names the field, streamed or not.

    python -m pytest -q tests/test_server_refusals.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server_helpers import CONTEXT, HI, TIME, TOOLS, Server, openai_server


@pytest.fixture(scope="module")
def glm() -> Iterator[Server]:
    with openai_server("glm-4") as server:
        server.says("\nHello")
        yield server


NOT = {"name": "s", "schema": {"not": {}}}


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **fields}]}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": []}),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 7}]}),
    ("messages[0].content[0].type", user([{"type": "image_url", "image_url": {"url": "x"}}])),
    ("messages[0].content[0]", user([{"type": "text"}])),
    ("messages[0].tool_calls", user("x", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{}"}}])),
    ("messages[0].name", {"messages": [{"role": "user", "content": "x", "name": "Bob"}]}),
    ("messages[1].tool_call_id", {"messages": [*HI, {"role": "tool", "content": "x"}]}),
    ("messages[0].audio", {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "1"}}]}),
    ("messages[0].foo", {"messages": [{"role": "user", "content": "x", "foo": 1}]}),
    ("temperature", {"temperature": 3}),
    ("temperature", {"extra_body": {"temperature": "hot"}}),
    ("temperature", {"extra_body": {"temperature": True}}),
    ("top_p", {"top_p": -1}),
    ("n", {"n": 0}),
    ("n", {"n": 99}),
    ("n", {"extra_body": {"n": 1.5}}),
    ("seed", {"seed": 2**70}),
    ("stop", {"stop": ""}),
    ("stop[1]", {"stop": ["a", ""]}),
    ("stop", {"stop": ["a"] * 17}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 10**30}),
    ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {"999999": 1}}),
    ("logit_bias.5", {"logit_bias": {"5": 101}}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("function_call", {"function_call": "auto"}),
    ("prediction", {"prediction": {"type": "content", "content": "x"}}),
    ("reasoning_effort", {"reasoning_effort": "low"}),
    ("web_search_options", {"web_search_options": {}}),
    ("verbosity", {"extra_body": {"verbosity": "low"}}),
    ("metadata", {"metadata": {"a": "b"}}),
    ("store", {"store": True}),
    ("service_tier", {"service_tier": "flex"}),
    ("modalities[0]", {"modalities": ["audio"]}),
    ("no_such_field", {"extra_body": {"no_such_field": 1}}),
    ("stream_options.foo", {"extra_body": {"stream_options": {"foo": 1}}}),
    ("tools[0].type", {"tools": [{"type": "web_search"}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
    ("tools[1].function.name", {"tools": [TIME, TIME]}),
    ("tools[0].function.foo", {"tools": [{"type": "function", "function": {"name": "f", "foo": 1}}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": "sometimes"}),
    ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}}),
    ("tools[0].function.parameters", {"tools": [function(strict=True, parameters={"properties": {"a": {"not": {}}}})]}),
    ("tools[0].function.parameters", {"tool_choice": "required", "tools": [function(parameters={"minProperties": 2})]}),
    ("response_format.type", {"response_format": {"type": "xml"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("response_format.json_schema.schema", {"response_format": {"type": "json_schema", "json_schema": NOT}}),
]  # fmt: skip


@pytest.mark.parametrize("param,fields", REFUSED, ids=[f"{i}-{p}" for i, (p, _) in enumerate(REFUSED)])
def test_what_is_wrong_is_named(glm: Server, param: str, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            glm.client.chat.completions.create(**{"model": "tiny", "messages": HI, "stream": stream, **fields})
        error = caught.value
        assert error.param == param, error.message
        assert error.type == "invalid_request_error" and param.split("[")[0].split(".")[0] in error.message


def test_other_models_and_too_long_prompts(glm: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        glm.client.chat.completions.create(model="gpt-4o", messages=HI)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    histories: list[list[Any]] = [[{"role": "user", "content": "fox " * CONTEXT}], [HI[0]] * 10_000]
    for messages in histories:
        with pytest.raises(openai.BadRequestError) as long:
            glm.client.chat.completions.create(model="tiny", messages=messages)
        assert long.value.code == "context_length_exceeded" and long.value.param == "messages"
        assert str(CONTEXT) in long.value.message


def test_models(glm: Server) -> None:
    found = glm.client.models.list().data
    assert [m.id for m in found] == ["tiny"] and found[0].object == "model"
    one = glm.client.models.retrieve("tiny").model_dump()
    assert one["context_length"] == CONTEXT and one["chat_format"] == "glm-4" and one["tools"] is True
    assert one["fills"] is False and one["thinks"] is False
    with pytest.raises(openai.NotFoundError):
        glm.client.models.retrieve("other/name")
