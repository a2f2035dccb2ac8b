"""Completions, blanks, embeddings, Anthropic's messages, tokens both ways: with the official clients where there are.

    python -m pytest -q tests/test_server_text.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from anthropic import Anthropic
from openai import OpenAI

import openglm
from openglm.chat import ChatModel
from openglm.server.service import load_engine
from tests.format_helpers import call, format_named
from tests.server_helpers import HI, Server, openai_server, running, service_of


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> ChatModel:
    """Random weights with a prefix mask, so that it fills blanks."""
    service = service_of(openglm.load(tiny_checkpoint, device="cpu"))
    return load_engine(openglm.load(tiny_checkpoint, device="cpu"), service.config)


@pytest.fixture(scope="module")
def client(tiny: ChatModel) -> Iterator[OpenAI]:
    with running(service_of(tiny)) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def complete(client: OpenAI, **fields: Any) -> Any:
    """Whole and streamed, which must be the same."""
    fields = {"model": "tiny", "temperature": 0, **fields}
    whole = client.completions.create(**fields)
    texts: dict[int, str] = {}
    for chunk in client.completions.create(**{**fields, "stream": True}):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert [texts.get(c.index, "") for c in whole.choices] == [c.text for c in whole.choices]
    return whole


def post(client: OpenAI, path: str, **body: Any) -> Any:
    return httpx.post(str(client.base_url).removesuffix("/v1/") + path, json=body, timeout=60).json()


# -------------------------------------------------------------------- completions


def test_a_text_is_continued_as_the_model_itself_does(client: OpenAI, tiny: ChatModel) -> None:
    answer = complete(client, prompt="The quick", max_tokens=8)
    assert answer.choices[0].text == tiny.generate("The quick", temperature=0, max_new_tokens=8)
    assert answer.usage.completion_tokens == 8 and answer.choices[0].finish_reason == "length"
    assert len(complete(client, prompt="The quick").usage.model_dump()) and answer.object == "text_completion"


def test_several_prompts_texts_or_ids(client: OpenAI, tiny: ChatModel) -> None:
    ids = tiny.text_ids("The quick")
    answer = complete(client, prompt=["The quick", "北京"], max_tokens=6, n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    same = complete(client, prompt=ids, max_tokens=6).choices[0].text
    assert answer.choices[0].text == answer.choices[1].text == same
    assert complete(client, prompt=[ids, ids], max_tokens=6).choices[1].text == answer.choices[0].text
    assert answer.usage.prompt_tokens == len(ids) + len(tiny.text_ids("北京"))


def test_echo_scores_the_prompt_as_the_model_does(client: OpenAI, tiny: ChatModel) -> None:
    text = "The quick brown fox"
    for max_tokens in (0, 4):
        fields: dict[str, Any] = {"prompt": text, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
        answer = client.completions.create(model="tiny", temperature=0, **fields).choices[0]
        ids = tiny.text_ids(text)
        n = len(ids) - 2
        assert answer.text.startswith(text) and "".join(answer.logprobs.tokens[:n]) == text
        wanted = tiny.engine.logprobs(ids, 2).tolist()
        assert answer.logprobs.token_logprobs[:n] == pytest.approx(wanted, abs=1e-4)
        assert len(answer.logprobs.token_logprobs) == n + max_tokens
        assert all(len(top) <= 2 for top in answer.logprobs.top_logprobs)
        assert answer.logprobs.text_offset[:2] == [0, len(answer.logprobs.tokens[0])]
    assert complete(client, prompt=text, echo=True, max_tokens=4).choices[0].text == answer.text
    alone = client.completions.create(model="tiny", prompt=tiny.tokenizer.encode(text), echo=True, logprobs=0,
                                      max_tokens=0).choices[0]  # fmt: skip
    assert alone.logprobs.token_logprobs[0] is None, "nothing stands in front of the first of bare ids"


def test_a_suffix_makes_a_blank(client: OpenAI, tiny: ChatModel) -> None:
    for budget, mask in ((6, "[MASK]"), (20, "[sMASK]")):
        answer = complete(client, prompt="The quick ", suffix=" jumps.", max_tokens=budget)
        filled = tiny.fill(f"The quick {mask} jumps.", max_new_tokens=budget, repetition_penalty=1.0)
        assert answer.choices[0].text == filled.blanks[0]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a [MASK]", suffix="b")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    "param,fields",
    [
        ("prompt", {"prompt": []}), ("prompt", {"prompt": [999999]}), ("prompt[0][0]", {"prompt": [[-1]]}),
        ("max_tokens", {"max_tokens": 0}), ("best_of", {"best_of": 3}), ("logprobs", {"logprobs": 21}),
        ("suffix", {"suffix": "x", "echo": True}), ("stop", {"stop": ""}), ("foo", {"extra_body": {"foo": 1}}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(client: OpenAI, param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", **fields})
    assert caught.value.param == param


# -------------------------------------------------------------------- blanks


def test_fillings_are_joint_and_their_probabilities_the_models(client: OpenAI, tiny: ChatModel) -> None:
    found = post(client, "/fill", text="The [MASK] jumps over [MASK].", n=3, max_tokens=4)["fillings"]
    assert len(found) == 3 and found == sorted(found, key=lambda f: -f["probability"])
    one = post(client, "/fill", text="The [MASK] jumps.", n=4, max_tokens=4)["fillings"]
    beams = tiny.fill("The [MASK] jumps.", 4, length_penalty=0.0, no_repeat_ngram=0, max_new_tokens=4).candidates[0]
    assert [f["blanks"][0] for f in one] == [text for text, _ in beams]
    assert [f["probability"] for f in one] == pytest.approx([math.exp(score) for _, score in beams])
    for filling in found:
        assert filling["text"].startswith("The ") and len(filling["blanks"]) == 2
    assert post(client, "/fill", text="no blank")["error"]["message"].startswith("the text has no blank")
    assert post(client, "/fill", text="[MASK]" * 17)["error"]["param"] == "text"


# -------------------------------------------------------------------- embeddings


def test_embeddings_are_mean_hidden_states(client: OpenAI, tiny: ChatModel) -> None:
    texts = ["The quick brown fox", "北京"]
    answer = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64
    plain = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for a, b, text in zip(answer.data, plain.data, texts, strict=True):
        assert a.embedding == pytest.approx(b.embedding) and np.linalg.norm(a.embedding) == pytest.approx(1.0)
        ids = tiny.tokenizer.encode(text)
        special = tiny.engine.special_ids
        with torch.inference_mode():
            hidden = tiny.engine._direct._hidden([*ids, special["[gMASK]"], special["<sop>"]])[0, : len(ids)]
        mean = hidden.mean(0) / hidden.mean(0).norm()
        assert a.embedding == pytest.approx(mean.tolist(), abs=1e-5)
    assert answer.usage.prompt_tokens == sum(len(tiny.tokenizer.encode(t)) for t in texts)
    ids_too = client.embeddings.create(model="tiny", input=[tiny.tokenizer.encode(texts[0])])
    assert ids_too.data[0].embedding == pytest.approx(answer.data[0].embedding)
    for value in ("", [], ["ok", ""], "fox " * 500):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="tiny", input=value)
        assert str(caught.value.param).startswith("input")
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="tiny", input="x", dimensions=7)


def test_tokens_both_ways_and_the_prompt_as_it_is(client: OpenAI, tiny: ChatModel) -> None:
    ids = post(client, "/tokenize", text="Hello 北京")["tokens"]
    assert ids == tiny.tokenizer.encode("Hello 北京")
    assert post(client, "/detokenize", tokens=ids)["text"] == "Hello 北京"
    assert post(client, "/detokenize", tokens=[10**6])["error"]["param"] == "tokens[0]"
    messages = [*HI, {"role": "assistant", "content": "Hello"}]
    shown = post(client, "/render", messages=messages, add_generation_prompt=False)
    assert shown["text"] == "[gMASK]<sop><|user|>\nHi<|assistant|>\nHello<|user|>"
    targets = [i for i, t in zip(shown["ids"], shown["loss_mask"], strict=True) if t]
    assert tiny.tokenizer.decode(targets, skip_special=False) == "\nHello<|user|>"


# -------------------------------------------------------------------- Anthropic's messages


@pytest.fixture(scope="module")
def claude() -> Iterator[tuple[Server, Anthropic]]:
    with openai_server("glm-z1") as server:
        base = str(server.client.base_url).removesuffix("/v1/")
        yield server, Anthropic(base_url=base, api_key="none", max_retries=0)


WEATHER: Any = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
ASKED: Any = {"model": "tiny", "max_tokens": 200, "messages": HI}


def told(client: Anthropic, **fields: Any) -> Any:
    """Whole and streamed, as Anthropic's own client puts it together."""
    fields = ASKED | fields
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    shown = [m.model_dump(exclude={"id"}) for m in (whole, streamed)]
    for message in shown:
        for block in message["content"]:
            block.pop("id", None)
            block.pop("parsed_output", None)
    assert shown[0] == shown[1]
    return whole


def test_anthropic_text_thinking_and_tools(claude: tuple[Server, Anthropic]) -> None:
    server, client = claude
    server.says("Hm.\n</think>\n\nHello 北京!")
    whole = told(client, system="Be brief.")
    assert [b.type for b in whole.content] == ["thinking", "text"] and whole.stop_reason == "end_turn"
    assert whole.content[1].text == "Hello 北京!" and whole.usage.output_tokens == len(server.script.ids) + 1
    assert "Be brief." in server.tokenizer.decode(server.script.seen[-1])
    assert told(client, max_tokens=2).stop_reason == "max_tokens"
    cut = told(client, stop_sequences=["北", "zzz"])
    assert cut.stop_reason == "stop_sequence" and cut.stop_sequence == "北" and cut.content[-1].text == "Hello "
    server.says('Hm.\n</think>\n\nget_weather\n{"city": "北京"}', "<|observation|>")
    whole = told(client, tools=[WEATHER])
    assert whole.stop_reason == "tool_use" and whole.content[-1].input == {"city": "北京"}
    assert whole.content[-1].name == "get_weather" and whole.content[-1].id
    assert told(client, tools=[WEATHER], tool_choice={"type": "any"}).content[-1].input == {"city": "北京"}
    assert client.messages.count_tokens(model="tiny", messages=HI).input_tokens == len(
        format_named("glm-z1").render([openglm.types.Message("user", "Hi")]).ids
    )


def test_anthropic_histories(claude: tuple[Server, Anthropic]) -> None:
    server, client = claude
    server.says("</think>\n\nok")
    history: Any = [
        *HI,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
            {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}}]},
    ]  # fmt: skip
    assert told(client, messages=history, tools=[WEATHER]).content[-1].text == "ok"
    Message, wanted = openglm.types.Message, call("get_weather", city="Paris")
    spec = openglm.types.ToolSpec("get_weather", "", WEATHER["input_schema"])
    messages = [Message("user", "Hi"), Message("assistant", "Let me see.", (wanted,), reasoning="hm"),
                Message("tool", "sunny", (), "t1"), Message("user", "And now?")]  # fmt: skip
    assert server.script.seen[-1] == format_named("glm-z1").render(messages, [spec]).ids


def test_anthropic_errors(claude: tuple[Server, Anthropic]) -> None:
    import anthropic

    for field, value in (
        ("thinking", {"type": "enabled", "budget_tokens": 2000}), ("temperature", 2), ("mcp_servers", []),
        ("tool_choice", {"type": "any"}), ("messages[0].content[0].type", None),
        ("messages", [*HI, {"role": "assistant", "content": "I begin"}]),
    ):  # fmt: skip
        body: dict[str, Any] = {field: value} if value is not None else {
            "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]
        }  # fmt: skip
        with pytest.raises(anthropic.BadRequestError) as caught:
            claude[1].messages.create(**{**ASKED, "extra_body": body})
        body_told: Any = caught.value.body
        assert body_told["type"] == "error" and body_told["error"]["type"] == "invalid_request_error"
        assert field.split(".type")[0] in body_told["error"]["message"], json.dumps(body_told)
