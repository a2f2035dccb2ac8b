"""ChatML and Jinja templates against transformers' apply_chat_template, and the sandbox that templates run in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openglm.formats import ChatFormat, detect_format, get_format
from openglm.formats.template import Template
from openglm.tokenizer import SPECIALS
from openglm.types import Message, ToolCall, ToolSpec
from tests.format_helpers import CHATML, TEMPLATE, TOOLS, call, parse, targets, tokenizer_with, written

SYSTEM = Message("system", "简短。")
CHAT = [Message("user", "你好"), Message("assistant", "Hello!"), Message("user", "1+1=?")]
WORK = [
    Message("user", "天气 & time?"),
    Message("assistant", "Let me see.", (call("get_weather", city="北京"), call("get_time"))),
    Message("tool", "sunny <b>"),
    Message("tool", "noon"),
    Message("assistant", "晴。"),
    Message("user", "Thanks"),
]
# Hermes calls as Qwen's models have them, in our own writing.
QWEN_STYLE = """\
{%- set system = messages[0].content if messages[0].role == 'system' else 'You help.' %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": ' }}
    {{- '<args-json-object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'tool' %}
        {%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}{{- '<|im_start|>user\\n' }}{% endif %}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% else %}{{- '\\n' }}{% endif %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- ('\\n' if message.content or not loop.first else '') + '<tool_call>\\n{"name": ' }}
        {{- (call.function.name | tojson) + ', "arguments": ' + (call.function.arguments | tojson) }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def reference_ids(template: str, messages: list[Message], tools: list[ToolSpec], prompt: bool) -> list[int]:
    """transformers' own rendering and encoding with the same vocabulary."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library
    from transformers import PreTrainedTokenizerFast

    ours = tokenizer_with(CHATML)
    library = Library.from_str(ours.files["tokenizer.json"].decode())
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CHATML])
    assert {name: library.token_to_id(name) for name in CHATML} == ours.special_ids
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|im_end|>")
    plain: list[dict[str, Any]] = []
    for m in messages:
        calls = [{"function": {"name": c.name, "arguments": json.loads(c.arguments)}} for c in m.tool_calls]
        plain.append({"role": m.role, "content": m.content, **({"tool_calls": calls} if calls else {})})
    functions: list[Any] = [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
        for t in tools
    ]
    text = theirs.apply_chat_template(
        plain, tools=functions or None, chat_template=template, add_generation_prompt=prompt, tokenize=False
    )
    return theirs.encode(text, add_special_tokens=False)


CONVERSATIONS = [
    (CHAT, []), ([SYSTEM, *CHAT], []), (WORK, list(TOOLS)), ([SYSTEM, *WORK], list(TOOLS)), (WORK[:4], list(TOOLS)),
    (WORK[:3], [TOOLS[0]]), ([Message("system", ""), *CHAT], []), ([Message("system", ""), *WORK], list(TOOLS)),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "tools"), CONVERSATIONS)
@pytest.mark.parametrize("template", [QWEN_STYLE, TEMPLATE])
def test_jinja_equals_transformers(template: str, messages: list[Message], tools: list[ToolSpec]) -> None:
    chat_format = get_format("jinja", tokenizer_with(CHATML), template=template)
    parts = chat_format.parts(messages, tools)
    tokenizer = tokenizer_with(CHATML)
    joined = written(chat_format.render(messages, tools), tokenizer)
    assert joined == tokenizer.decode(reference_ids(template, messages, tools, True), skip_special=False)
    if not any(part.target for part in parts):  # texts are cut where an answer begins; without one, ids agree too
        assert chat_format.render(messages, tools).ids == reference_ids(template, messages, tools, True)


@pytest.mark.parametrize(("messages", "tools"), CONVERSATIONS)
def test_chatml_equals_transformers(messages: list[Message], tools: list[ToolSpec]) -> None:
    tokenizer = tokenizer_with(CHATML)
    chat_format = get_format("chatml", tokenizer, template=QWEN_STYLE)
    assert chat_format.render(messages, tools).ids == reference_ids(QWEN_STYLE, messages, tools, True)
    end = tokenizer.encode("\n")  # the template writes it after the stop token, where no model ever gets
    whole = [*messages, Message("assistant", "2")]
    assert chat_format.render(whole, tools, False).ids + end == reference_ids(QWEN_STYLE, whole, tools, False)


def test_chatml_targets() -> None:
    answered = [*CHAT, Message("assistant", "2", reasoning="1 and 1")]
    assert targets("chatml", answered) == "Hello!<|im_end|><think>\n1 and 1\n</think>\n\n2<|im_end|>"
    earlier = [CHAT[0], Message("assistant", "Hello!", reasoning="Greet."), CHAT[2], Message("assistant", "2")]
    assert targets("chatml", earlier) == "Hello!<|im_end|>2<|im_end|>", "earlier reasoning is left out"
    assert targets("chatml", WORK[:5], TOOLS).startswith('Let me see.\n<tool_call>\n{"name": "get_weather", ')


@pytest.mark.parametrize("template", [QWEN_STYLE, TEMPLATE])
def test_jinja_targets_are_those_of_chatml(template: str) -> None:
    tokenizer = tokenizer_with(CHATML)
    jinja, chatml = get_format("jinja", tokenizer, template=template), get_format("chatml", tokenizer)
    for messages in (CHAT, [*CHAT, Message("assistant", "2")], WORK[:5], [SYSTEM, *WORK]):
        found = [written(f.render(messages, TOOLS, False), tokenizer, True) for f in (jinja, chatml)]
        assert found[0] == found[1].replace("\n<|im_end|>", "<|im_end|>") and found[0].endswith("<|im_end|>")
    assert jinja.stop_ids[0] == tokenizer.special_ids["<|im_end|>"]


def test_detection_takes_the_template_at_its_word() -> None:
    special = tokenizer_with(CHATML).special_ids
    assert detect_format(special, QWEN_STYLE) == "chatml"
    assert detect_format(special, QWEN_STYLE.replace("You may call", "You can call")) == "jinja"
    no_newline = QWEN_STYLE.replace("'<|im_end|>\\n' }}\n{%- endfor", "'<|im_end|>' }}\n{%- endfor")
    assert no_newline != QWEN_STYLE and detect_format(special, no_newline) == "jinja"
    assert detect_format(special, "{% for") == "jinja"


# -------------------------------------------------------------------- specials


LOOSE = (  # a template that does all it can to texts: joins, drops, cuts, turns into JSON
    "{{ bos_token }}{% for m in messages %}<|im_{{ 'start' }}|>{{ m.role }}\n{{ m.content | replace('x', '') | trim }}"
    "{{ m.content[:5] }}{{ m.content[5:] }}{{ m.content.split('x') | join }}{{ m | tojson }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["<|im_", "end|>", "<|imx_end|>", "<", "x", "|im_start|>", "\ue000", "\\ue000"])))
def test_no_template_makes_a_special_of_text(words: list[str]) -> None:
    template = Template(LOOSE, tokenizer_with(CHATML).special_ids)
    message = Message("user", "".join(words))
    pieces = template.pieces([message])
    start, end = (template.special_ids[f"<|im_{name}|>"] for name in ("start", "end"))
    assert [p for p in pieces if isinstance(p, int)] == [start, end, start]
    content = message.content
    # what is left is what the template makes of the text where nothing is special
    assert pieces[1] == (
        f"user\n{content.replace('x', '').strip()}{content}{content.replace('x', '')}"
        + json.dumps({"role": "user", "content": content}, ensure_ascii=False)
    )


# -------------------------------------------------------------------- the sandbox


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ messages.__init__.__globals__ }}", "unsafe"),
        ("{% for i in range(1000000000) %}{% endfor %}", "[Rr]ange"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ 1 / 0 }}", "zero"),
        ("{{ 'x' * 10000000000 }}", "not allowed"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "not allowed"),
        ("{% for m in %}", "no Jinja template"),
    ],
)  # fmt: skip
def test_what_templates_may_not_do(template: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        get_format("jinja", tokenizer_with(CHATML), template=template)
    assert "\n" not in str(error.value)


def test_what_templates_expect_to_find() -> None:
    text = (
        "{{ bos_token }}{{ strftime_now('%Y')[:2] }}{% for m in messages %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ eos_token }}{% break %}{% endfor %}{{ {'b': '<é', 'a': [1]} | tojson(indent=1) }}"
    )
    template = Template(text, {"<s>": 1, "</s>": 2}, "<s>", "</s>")
    assert template.pieces([Message("user", "q"), Message("user", "r")]) == [
        1, "20q", 2, json.dumps({"b": "<é", "a": [1]}, indent=1, ensure_ascii=False),
    ]  # fmt: skip


# -------------------------------------------------------------------- other families' manners

LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
LLAMA_STYLE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}"
    "{% endfor %}<|eot_id|>{% endfor %}{% if tools %}{% endif %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def llama() -> ChatFormat:
    return get_format("jinja", tokenizer_with(LLAMA), template=LLAMA_STYLE)


def test_calls_that_are_the_whole_answer(llama: ChatFormat) -> None:
    tokenizer = tokenizer_with(LLAMA)
    special = tokenizer.special_ids
    assert llama.stop_ids == (special["<|eot_id|>"],)
    made = Message("assistant", "", (call("get_weather", city="北京"),))
    prompt = llama.render(CHAT, TOOLS).ids
    assert prompt[0] == special["<|begin_of_text|>"]
    whole = llama.render([*CHAT, made], TOOLS, False)
    assert parse(llama, whole.ids[len(prompt) :], TOOLS)[1] == made
    body = '{"name": "get_time", "parameters": {}}'
    expected = Message("assistant", "", (ToolCall("get_time", "{}"),))
    assert parse(llama, [special["<|python_tag|>"], *tokenizer.encode(body)], TOOLS)[1] == expected
    assert parse(llama, tokenizer.encode(f"\n[{body}]"), TOOLS)[1] == expected
    for text in ('{"a": 1}', body[:-1], "[1, 2]", "So: " + body, body.replace("get_time", "rm")):
        assert parse(llama, tokenizer.encode(text), TOOLS)[1] == Message("assistant", text)


def test_reasoning_that_the_prompt_opens() -> None:
    tokenizer = tokenizer_with(SPECIALS)
    template = (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
    )
    chat_format = get_format("jinja", tokenizer, template=template)
    expected = Message("assistant", "答", reasoning="想")
    assert parse(chat_format, tokenizer.encode("\n想</think>\n答"), ())[1] == expected
    # the header that the history shows is shorter than the prompt's: the target begins where they part
    rendered = chat_format.render([Message("user", "q"), Message("assistant", "答"), Message("user", "r")])
    assert written(rendered, tokenizer, targets_only=True) == "答<|user|>"


def test_calls_behind_role_tokens() -> None:
    """A template of GLM-4's manner that is none of the known ones: calls are read in that manner."""
    tokenizer = tokenizer_with(SPECIALS)
    template = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{{ tools }}<|assistant|>"
    chat_format = get_format("jinja", tokenizer, template=template)
    ids = tokenizer.encode("get_time\n{}")
    stop = tokenizer.special_ids["<|observation|>"]
    assert stop in chat_format.stop_ids
    expected = Message("assistant", "", (ToolCall("get_time", "{}"),))
    assert parse(chat_format, [*ids, stop], TOOLS)[1] == expected
    assert parse(chat_format, tokenizer.encode("\nHi"), TOOLS)[1] == Message("assistant", "Hi")


def test_answers_that_cannot_be_found_are_not_learnt_in_silence() -> None:
    template = "<|im_start|>{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    chat_format = get_format("jinja", tokenizer_with(CHATML), template=template)
    assert not any(chat_format.render([*CHAT]).loss_mask)
    with pytest.raises(ValueError, match="writes messages before number 1 anew"):
        chat_format.render(CHAT, (), False)
