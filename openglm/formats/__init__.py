"""Chat formats: messages to token ids with a loss mask, in one walk, and generated ids back to a message.

    chat_format = get_format("glm-4", tokenizer)
    rendered = chat_format.render(messages, tools)      # rendered.ids ends at the header of the answer
    parser = chat_format.parser(tools)
    for id in generated: events = parser.feed(id)
    events = parser.finish(); message = parser.message
"""

from __future__ import annotations

import inspect
from typing import Any

from openglm.formats.base import BaseFormat, CallStyle, ChatFormat, Parser, Part, Rendered, render_many
from openglm.formats.chatglm3 import ChatGlm3Format
from openglm.formats.chatml import ChatMlFormat
from openglm.formats.codegeex import CodeGeex2Format, CodeGeex4Format
from openglm.formats.detect import chatml_default, detect_format
from openglm.formats.fill import Glm130bFormat
from openglm.formats.glm4 import Glm0414Format, Glm4Format, GlmZ1Format
from openglm.formats.jinja import JinjaFormat
from openglm.formats.rounds import ChatGlm2Format, ChatGlm6bFormat
from openglm.tokenizer import Tokenizer

__all__ = [
    "FORMATS", "CallStyle", "ChatFormat", "Parser", "Part", "Rendered", "detect_format", "get_format", "render_many",
]  # fmt: skip

FORMATS: dict[str, type[BaseFormat]] = {
    kind.name: kind
    for kind in (
        Glm130bFormat, ChatGlm6bFormat, ChatGlm2Format, ChatGlm3Format, Glm4Format, Glm0414Format, GlmZ1Format,
        CodeGeex2Format, CodeGeex4Format, ChatMlFormat, JinjaFormat,
    )
}  # fmt: skip


def get_format(name: str, tokenizer: Tokenizer, *, template: str | None = None, **options: Any) -> ChatFormat:
    """The chat format of that name.

    template: the model's chat template: "jinja" is made of it, and "chatml" takes its default system text from it;
    the other formats need none. options: of the format's class, such as date of "glm-4", language of "codegeex2",
    default_system of "chatml", bos_token of "jinja". ValueError lists the known formats or options, or says what the
    tokenizer lacks.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown chat format {name!r}; known: {', '.join(FORMATS)}")
    kind = FORMATS[name]
    known = [p for p in inspect.signature(kind).parameters if p not in ("tokenizer", "template")]
    for option in options:
        if option not in known:
            raise ValueError(f"chat format {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    if kind is JinjaFormat:
        options["template"] = template
    elif kind is ChatMlFormat and template and "default_system" not in options:
        options["default_system"] = chatml_default(tokenizer.special_ids, template)
    return kind(tokenizer, **options)
