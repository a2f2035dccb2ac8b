"""Shared vocabulary of the package: messages, tool calls, sampling parameters, events. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BUILTIN_TOOLS", "Event", "Message", "Role", "SamplingParams", "ToolCall", "ToolSpec", "IGNORE"]

Role = Literal["system", "user", "assistant", "tool"]
ROLES = ("system", "user", "assistant", "tool")

# Tools that GLM models know without a schema, and the one argument under which their raw body is passed on as JSON.
BUILTIN_TOOLS = {"python": "code", "simple_browser": "code", "cogview": "prompt"}

IGNORE = -100  # target id that carries no loss, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class ToolCall:
    """One function call of an assistant turn; `arguments` is a JSON text."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class ToolSpec:
    """A function the model may call; `parameters` is its JSON schema.

    builtin: one of the tools that GLM models know by `name` (see BUILTIN_TOOLS): called with a raw body, not with JSON.
    Formats without such tools declare it as an ordinary function.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    builtin: bool = False

    def __post_init__(self) -> None:
        if self.builtin and self.name not in BUILTIN_TOOLS:
            raise ValueError(f"no built-in tool {self.name!r}: known are {', '.join(BUILTIN_TOOLS)}")

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ToolSpec:
        """From OpenAI form ({"type": "function", "function": {...}}), the bare function object, or {"type": "python"}
        for a built-in tool.
        """
        if "function" not in value and "name" not in value and value.get("type") in BUILTIN_TOOLS:
            return cls.of_builtin(value["type"])
        function = value.get("function", value)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("a tool needs a function with a 'name'")
        return cls(function["name"], str(function.get("description", "")), function.get("parameters") or {})

    @classmethod
    def of_builtin(cls, name: str) -> ToolSpec:
        """The built-in tool of that name, with a schema for formats that declare it as a function."""
        if name not in BUILTIN_TOOLS:
            raise ValueError(f"no built-in tool {name!r}: known are {', '.join(BUILTIN_TOOLS)}")
        argument = BUILTIN_TOOLS[name]
        schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
        descriptions = {
            "python": "Runs Python code and returns what it prints.",
            "simple_browser": "Searches the web and opens pages: search(query), mclick(ids), open_url(url).",
            "cogview": "Draws an image from an English description.",
        }
        return cls(name, descriptions[name], schema, builtin=True)


@dataclass(frozen=True)
class Message:
    """One message of a conversation, in OpenAI's shape. name: of a tool message, the tool that gave the result.

    reasoning: what an assistant thought before it answered, without the marks around it.
    """

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str = ""

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], where: str = "message") -> Message:
        """Validate a plain dict; raises ValueError naming the field. Calls may be OpenAI's or bare objects."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be an object, not {type(value).__name__}")
        unknown = set(value) - {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content"}
        if unknown:
            raise ValueError(f"{where} has an unknown field {sorted(unknown)[0]!r}")
        role, content = value.get("role"), value.get("content")
        if role not in ROLES:
            raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}")
        if content is None:
            content = ""
        if not isinstance(content, str):
            raise ValueError(f"{where}.content must be text, not {type(content).__name__}")
        calls = tuple(
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(value.get("tool_calls") or ())
        )
        if calls and role != "assistant":
            raise ValueError(f"{where}.tool_calls belongs to the assistant, not to {role}")
        reasoning = value.get("reasoning_content") or ""
        for field, text in (("reasoning_content", reasoning), ("name", value.get("name") or "")):
            if not isinstance(text, str):
                raise ValueError(f"{where}.{field} must be text, not {type(text).__name__}")
        if reasoning and role != "assistant":
            raise ValueError(f"{where}.reasoning_content belongs to the assistant, not to {role}")
        return cls(role, content, calls, value.get("tool_call_id"), value.get("name"), reasoning)


def _tool_call(value: Any, where: str) -> ToolCall:
    import json

    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, not {type(value).__name__}")
    function = value.get("function", value)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} needs a function 'name'")
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(function["name"], arguments, value.get("id"))


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off.

    seed: None draws a fresh one; the same seed and prompt give the same tokens.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p must be in [0, 1), not {self.min_p}")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")


@dataclass(frozen=True)
class Event:
    """One piece of a streamed answer. `text` may be empty; `finish_reason` is set on the last one only.

    reasoning: a piece of what the model thinks before it answers; no part of `text`.
    finish_reason: "stop" (a stop id), "tool_calls", "length" (max_new_tokens or the context is full).
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    tool_call: ToolCall | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    reasoning: str = ""
