"""Renderings of the original code: ChatGLM2 and ChatGLM3 with their real vocabulary, and published vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openglm.formats import get_format
from openglm.formats.calls import read_python
from openglm.tokenizer import Tokenizer
from openglm.types import Message, ToolCall, ToolSpec


@pytest.fixture(scope="module")
def chatglm3(shared_data: Path) -> Tokenizer:
    return Tokenizer.load(shared_data / "tokenizers" / "chatglm3", roles=True)


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> Any:
    return json.loads((shared_data / "golden" / "chat-chatglm3" / "renderings.json").read_text(encoding="utf-8"))


def as_messages(conversation: dict[str, Any]) -> tuple[list[Message], list[ToolSpec]]:
    """The original client's history in our terms: metadata is the name of a call."""
    messages, tools = [], []
    last = {"role": conversation["role"], "content": conversation["query"]}
    for item in [*conversation["history"], last]:
        role: Any = "tool" if item["role"] == "observation" else item["role"]
        if item.get("metadata") == "interpreter":
            code = item["content"].removeprefix("```python\n").removesuffix("\n```")
            calls = (ToolCall("python", json.dumps({"code": code})),)
            messages.append(Message("assistant", "", calls))
        elif item.get("metadata"):
            arguments = read_python(item["content"])
            assert arguments is not None
            messages.append(Message("assistant", "", (ToolCall(item["metadata"], arguments),)))
        else:
            messages.append(Message(role, item["content"]))
        tools += [ToolSpec(t["name"], t["description"], t["parameters"]) for t in item.get("tools", [])]
    return messages, tools


def test_every_chatglm3_conversation(chatglm3: Tokenizer, golden: Any) -> None:
    chat_format = get_format("chatglm3", chatglm3)
    assert len(golden["conversations"]) >= 6
    for conversation in golden["conversations"]:
        messages, tools = as_messages(conversation)
        assert chat_format.render(messages, tools).ids == conversation["input_ids"], conversation["name"]


def test_tools_alone_make_the_released_declaration(chatglm3: Tokenizer, golden: Any) -> None:
    """The sentence in front of the tools is ours to write when the conversation has no system text."""
    (conversation,) = (c for c in golden["conversations"] if c["name"] == "tools_first_question")
    messages, tools = as_messages(conversation)
    chat_format = get_format("chatglm3", chatglm3)
    assert chat_format.render(messages[1:], tools).ids == conversation["input_ids"]
    program = [c for c in golden["conversations"] if c["name"] == "code_interpreter"]
    for conversation in program:
        messages, _ = as_messages(conversation)
        assert chat_format.render(messages[1:], [ToolSpec.of_builtin("python")]).ids == conversation["input_ids"]


def test_chatglm2_prompts(chatglm3: Tokenizer, golden: Any) -> None:
    chat_format = get_format("chatglm2", chatglm3)
    for case in golden["chatglm2_prompts"]:
        pairs = [*case["history"], [case["query"], None]]
        messages = [
            Message(role, text)  # type: ignore[arg-type]
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
            if text is not None
        ]
        assert chat_format.render(messages).ids == case["input_ids"]


def test_published_vectors(chatglm3: Tokenizer) -> None:
    user = [Message("user", "你好")]
    assert get_format("chatglm3", chatglm3).render(user).ids == [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]
    assert get_format("chatglm2", chatglm3).render(user).ids == [
        64790, 64792, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211, 39701, 13, 13, 55437, 31211,
    ]  # fmt: skip
    # CodeGeeX2's own vocabulary file puts no space in front.
    code = get_format("codegeex2", chatglm3)
    prefix, sop, text = code.parts([Message("user", "write a bubble sort function")])
    assert isinstance(text.content, str)
    assert [prefix.content, sop.content, *chatglm3.encode(text.content, dummy_prefix=False)] == [
        64790, 64792, 31010, 3239, 30954, 16719, 13, 31010, 3072, 260, 17338, 3482, 1674, 13,
    ]  # fmt: skip


def test_stop_ids(chatglm3: Tokenizer) -> None:
    assert set(get_format("chatglm3", chatglm3).stop_ids) == {2, 64795, 64797}
    assert get_format("chatglm2", chatglm3).stop_ids == (2,) == get_format("codegeex2", chatglm3).stop_ids


def test_answers_are_read_back_through_the_real_vocabulary(chatglm3: Tokenizer) -> None:
    """Its dummy spaces neither stay in the text nor eat the text's own."""
    chat_format = get_format("chatglm3", chatglm3)
    tools = [ToolSpec("get_weather", "天气", {}), ToolSpec.of_builtin("python")]
    prompt = chat_format.render([Message("user", "x")], tools)
    for answer in (
        Message("assistant", "1 + 1 = 2\n\n  缩进 👋"),
        Message("assistant", "", (ToolCall("get_weather", '{"city": "北京", "days": 2}'),)),
        Message("assistant", "", (ToolCall("python", json.dumps({"code": "for i in (1, 2):\n    print(i)"})),)),
        Message("assistant", "先看看。", (ToolCall("get_weather", "{}"), ToolCall("get_weather", '{"a b": [true]}'))),
    ):
        whole = chat_format.render([Message("user", "x"), answer], tools, add_generation_prompt=False)
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        parser = chat_format.parser(tools)
        for i in whole.ids[len(prompt.ids) :]:
            parser.feed(i)
        parser.finish()
        assert parser.message == answer
