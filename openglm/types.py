"""Shared vocabulary of the package: messages, tools and their calls, sampling parameters, events. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

__all__ = [
    "BUILTIN_TOOLS", "CallDelta", "ChatBackend", "Event", "Grammar", "IGNORE", "Message", "Observation", "Role",
    "SamplingParams", "StatefulTool", "Tool", "ToolCall", "ToolContext", "ToolFile", "ToolSpec", "Usage", "safe_json",
]  # fmt: skip

Role = Literal["system", "user", "assistant", "tool"]
ROLES = ("system", "user", "assistant", "tool")

# Tools that GLM models know without a schema, and the one argument under which their raw body is passed on as JSON.
BUILTIN_TOOLS = {"python": "code", "simple_browser": "code", "cogview": "prompt"}

IGNORE = -100  # target id that carries no loss, as in torch.nn.functional.cross_entropy


def safe_json(value: object) -> str:
    """JSON that can be sent to anyone: no NaN (ValueError), and half of a surrogate pair only as an escape."""
    import json

    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, allow_nan=False)
    return text


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
class ToolFile:
    """A file that a tool made: its bytes, or the path where they lie (one of the two). name: relative, with slashes.

    description: what a model that sees no pictures is told of it.
    """

    name: str
    mime: str
    content: bytes | None = None
    path: Path | None = None
    description: str = ""

    def __post_init__(self) -> None:
        if (self.content is None) == (self.path is None):
            raise ValueError(f"the file {self.name!r} of a tool needs its bytes or its path, and not both")

    def read(self) -> bytes:
        return self.path.read_bytes() if self.path is not None else self.content or b""


@dataclass(frozen=True)
class Observation:
    """What came of a tool call. content: for the model; files, data (JSON): for people, pages and other tools.

    error: the call failed, and content says why in words that help to make a better one.
    """

    content: str
    files: tuple[ToolFile, ...] = ()
    data: Mapping[str, Any] | None = None
    error: bool = False


def no_output(stream: str, text: str) -> None:
    """The `on_output` of a caller that does not watch."""


@dataclass(frozen=True)
class ToolContext:
    """What a tool knows of the call besides its arguments.

    conversation: tools that keep state keep one for each. timeout_s: None leaves it to the tool.
    on_output(stream, text): told of output as it comes, from any thread; stream is "stdout", "stderr" or "progress".
    """

    conversation: str = "default"
    call_id: str | None = None
    timeout_s: float | None = None
    on_output: Callable[[str, str], None] = no_output


class Tool(Protocol):
    """Something a model may call. `call` is given arguments that fit `spec.parameters`.

    It raises ValueError for arguments it cannot serve, with the remedy; other failures are an Observation with error
    set. When its task is cancelled it stops what it began before CancelledError goes on.
    """

    @property
    def spec(self) -> ToolSpec: ...

    async def call(self, arguments: dict[str, Any], context: ToolContext) -> Observation: ...


@runtime_checkable
class StatefulTool(Protocol):
    """A Tool that holds processes, connections or files between calls."""

    async def end(self, conversation: str) -> None:
        """Let go of what is held for one conversation."""

    async def close(self) -> None:
        """Let go of everything; later calls are refused."""


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
            if role != "assistant" and "content" not in value:
                raise ValueError(f"{where}.content is missing: give the text of the message")
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


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like, in full. text: the JSON schema (as JSON), regular expression or EBNF grammar.

    kind: "json" (any JSON; no text), "json_schema", "regex", "ebnf" (GBNF's notation; the start symbol is `root`).
    continues: the answer goes on from other text, so that a space at its start counts (see `Tokenizer.decode`).
    """

    kind: Literal["json", "json_schema", "regex", "ebnf"]
    text: str = ""
    continues: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("json", "json_schema", "regex", "ebnf"):
            raise ValueError(f"grammar.kind must be json, json_schema, regex or ebnf, not {self.kind!r}")
        if not isinstance(self.text, str) or bool(self.text) != (self.kind != "json"):
            raise ValueError(f"grammar.text of kind {self.kind} must be {'empty' if self.kind == 'json' else 'a text'}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch a filter off.

    seed: None draws a fresh one; the same seed and prompt give the same tokens, whatever else runs beside them.
    stop_ids, stop_strings: what ends an answer; of a stop string nothing is in the text. min_new_tokens: no stop id
    and no end of the grammar before that many tokens, unless the grammar leaves nothing but its end.
    repetition_penalty: over prompt and answer (CTRL); frequency_penalty, presence_penalty: over the answer (OpenAI).
    logit_bias: token id to what is added to its logit, -inf forbids it. top_logprobs: likeliest tokens reported.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # kept as sorted pairs
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    top_logprobs: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._normalise()
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
                limits = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise ValueError(f"{name} must be {limits}, not {value!r}")
        for name in ("max_new_tokens", "min_new_tokens", "top_k", "top_logprobs", "seed"):
            if not isinstance(getattr(self, name), int) and (name, self.seed) != ("seed", None):
                raise ValueError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens ({self.max_new_tokens})")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if not self.min_p < 1.0:
            raise ValueError(f"min_p must be in [0, 1), not {self.min_p}")
        if not self.repetition_penalty > 0.0:
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be of at most 64 bits, not {self.seed}")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar must be a Grammar, not {type(self.grammar).__name__}")

    def _normalise(self) -> None:
        """Collections become tuples, so that equal parameters are equal and can be keys."""
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        try:
            bias = sorted({int(token): float(value) for token, value in pairs}.items())
        except (TypeError, ValueError):
            raise ValueError("logit_bias must give a number for each token id, such as {12: -100}") from None
        if any(not value < math.inf for _, value in bias):
            raise ValueError("logit_bias must be finite, or -inf to forbid a token")
        if isinstance(self.stop_strings, str):
            raise ValueError(f"stop_strings must be a list of texts, such as [{self.stop_strings!r}]")
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise ValueError("stop_strings must be texts that are not empty")
        object.__setattr__(self, "logit_bias", tuple(bias))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        try:
            object.__setattr__(self, "stop_ids", tuple(index(token) for token in self.stop_ids))
        except TypeError:
            raise ValueError(f"stop_ids must be token ids, not {self.stop_ids!r}") from None


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_new_tokens", 1, math.inf), ("min_new_tokens", 0, math.inf), ("temperature", 0.0, 1e38),
    ("top_k", 0, math.inf), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0), ("repetition_penalty", 0.0, 1e38),
    ("frequency_penalty", -1e38, 1e38), ("presence_penalty", -1e38, 1e38), ("top_logprobs", 0, 20),
)  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer: its prompt, and what was drawn for it."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class CallDelta:
    """A piece of a tool call that is still being written. name: of the tool, on the first piece, which opens the call;
    empty on those that follow. arguments: all pieces together are the call's.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class Event:
    """One piece of a streamed answer. `text` may be empty; `finish_reason` is set on the last one only.

    reasoning: a piece of what the model thinks before it answers; no part of `text`.
    finish_reason: "stop" (a stop id or stop string, or the grammar is complete), "tool_calls", "length"
    (max_new_tokens or the context is full).
    usage: on the last one, where it is known (a server may keep it to itself).
    call_delta: where pieces of calls were asked for (`ChatFormat.parser`); the whole `tool_call` follows at its end.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    tool_call: ToolCall | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    reasoning: str = ""
    usage: Usage | None = None
    call_delta: CallDelta | None = None


class ChatBackend(Protocol):
    """Whatever answers a conversation: a ChatModel in this process, or a server at a URL (agent/http_backend.py)."""

    def stream(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[ToolSpec | Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> Iterator[Event]:
        """The assistant's next message as events; the last one carries the finish reason.

        sampling: fields of SamplingParams. Closing or dropping the iterator ends the answer. Raises ValueError, in one
        line, for what cannot be asked.
        """
        ...
