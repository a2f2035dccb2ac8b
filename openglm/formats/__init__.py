"""Chat formats: messages to token ids with a loss mask, in one walk, and generated ids back to a message.

    chat_format = get_format("glm-4", tokenizer)
    rendered = chat_format.render(messages, tools)      # rendered.ids ends at the header of the answer
    parser = chat_format.parser(tools)
    for id in generated: events = parser.feed(id)
    events = parser.finish(); message = parser.message
"""

from __future__ import annotations

from openglm.formats.base import ChatFormat, Parser, Part, Rendered, render_many
from openglm.formats.glm4 import Glm4Format
from openglm.tokenizer import Tokenizer

__all__ = ["FORMATS", "ChatFormat", "Parser", "Part", "Rendered", "get_format", "render_many"]

FORMATS: dict[str, type[Glm4Format]] = {"glm-4": Glm4Format}


def get_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of that name; ValueError lists the known ones."""
    if name not in FORMATS:
        raise ValueError(f"unknown chat format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name](tokenizer)
