"""Tokenizers with any special tokens, conversations and readers that the tests of chat formats share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from openglm.formats import ChatFormat, Rendered, get_format
from openglm.tokenizer import SPECIALS, Tokenizer
from openglm.tokenizer.train import train_bpe
from openglm.types import Event, Message, ToolCall, ToolSpec
from tests.conftest import TINY_TEXT

WEATHER = ToolSpec("get_weather", "天气 now", {"type": "object", "properties": {"city": {"type": "string"}}})
TOOLS = (WEATHER, ToolSpec("get_time", "time", {}))
PYTHON, BROWSER, COGVIEW = (ToolSpec.of_builtin(name) for name in ("python", "simple_browser", "cogview"))

ROUNDS = ("<pad>", "</s>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The special tokens that each format's models have.
SPECIALS_OF = {
    "glm-130b": (*ROUNDS, "<ENC>"),
    "chatglm-6b": (*ROUNDS, "<ENC>"),
    "chatglm2": ROUNDS,
    "codegeex2": ROUNDS,
    "chatglm3": (*ROUNDS, *SPECIALS[6:]),
    "glm-4": SPECIALS,
    "glm-4-0414": SPECIALS,
    "glm-z1": SPECIALS,
    "codegeex4": (*SPECIALS, "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"),
    "chatml": CHATML,
    "jinja": CHATML,
}
# Our own template in ChatML's manner, with tools, and reasoning in the last answer only.
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'Be kind.') }}
    {{- '\\n\\nTools, to be called within <tool_call></tool_call>:' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content and loop.last %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if not loop.previtem or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


@cache
def tokenizer_with(names: tuple[str, ...]) -> Tokenizer:
    """A tiny byte-level tokenizer with these special tokens."""
    tiny = train_bpe(TINY_TEXT, 600, at_most=True)
    config = json.loads(tiny.files["tokenizer_config.json"])
    first = min(config["special_ids"].values())
    config["special_ids"] = {name: first + i for i, name in enumerate(names)}
    return Tokenizer({**tiny.files, "tokenizer_config.json": json.dumps(config).encode()})


@cache
def format_named(name: str) -> ChatFormat:
    template = TEMPLATE if name == "jinja" else None
    return get_format(name, tokenizer_with(SPECIALS_OF[name]), template=template)


def written(rendered: Rendered, tokenizer: Tokenizer, targets_only: bool = False) -> str:
    """Text of rendered ids, specials by name. What a user wrote must not hold such names, or it looks the same."""
    ids = [i for i, t in zip(rendered.ids, rendered.loss_mask, strict=True) if t or not targets_only]
    return tokenizer.decode(ids, skip_special=False)


def shown(name: str, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), prompt: bool = True) -> str:
    return written(format_named(name).render(messages, tools, prompt), tokenizer_with(SPECIALS_OF[name]))


def targets(name: str, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), prompt: bool = False) -> str:
    return written(format_named(name).render(messages, tools, prompt), tokenizer_with(SPECIALS_OF[name]), True)


def parse(
    chat_format: ChatFormat, ids: Sequence[int], tools: Sequence[ToolSpec], pieces: bool = False
) -> tuple[list[Event], Message]:
    parser = chat_format.parser(tools, pieces)
    events = [event for i in ids for event in parser.feed(i)] + parser.finish()
    return events, parser.message


def call(name: str, **arguments: object) -> ToolCall:
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
