"""Which grammar holds an answer, so that what was asked for is all that can come: JSON, a schema, a tool call."""

from __future__ import annotations

from collections.abc import Sequence

from openglm.formats import ChatFormat
from openglm.server.errors import ApiError
from openglm.types import Grammar, ToolSpec

__all__ = ["call_grammar"]


def call_grammar(
    chat_format: ChatFormat, tools: Sequence[ToolSpec], choice: str, parallel: bool, strict: frozenset[str],
    response: Grammar | None,
) -> Grammar | None:  # fmt: skip
    """None where an answer is free. ApiError for what this format cannot be held to."""
    if choice in ("none", "auto") and not strict:
        return response
    raise ApiError("this tool choice is not supported yet", "tool_choice")
