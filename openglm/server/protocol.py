"""What requests may hold, as pydantic models: strict types, bounded numbers, no field that is not known.

    parse(ChatRequest, body)          # ApiError names the field that is wrong: "messages[0].content"

A field of OpenAI's protocol that we do not support is unknown here, or may only hold the value that changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from openglm.server.errors import ApiError

__all__ = [
    "ChatRequest", "CompletionRequest", "Count", "FunctionChoice", "Model", "Name", "Part", "RequestMessage",
    "Sampling", "ServerTool", "Stop", "TokenId", "Tool", "ToolChoice", "load_json", "param_of", "parse",
]  # fmt: skip

_MAX_DEPTH = 96  # of nested JSON
M = TypeVar("M", bound=BaseModel)


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Name = Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
Conversation = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]


class StreamOptions(Model):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(Model):
    """How to draw: OpenAI's fields, and the extensions top_k, min_p, repetition_penalty, min_tokens."""

    model: str | None = Field(None, description="Name of the served model; may be left out.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class Part(Model):
    """A part of a message: text. refusal counts as text of the assistant."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Model):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class Call(Model):
    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None


class RequestMessage(Model):
    """annotations, audio and function_call may stand there empty, as clients send answers back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = Field(None, description="Of a tool message: the tool.")
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class Function(Model):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    type: Literal["function"]
    function: Function


class ServerTool(Model):
    """Tools that the server runs itself: all it has, or those of one kind. approval: overrides the server's rule."""

    type: Literal[
        "all_tools", "python", "code_interpreter", "simple_browser", "web_browser", "cogview", "drawing_tool"
    ]
    approval: Literal["ask", "always", "never"] | None = None


AnyTool = Annotated[Tool | ServerTool, Field(discriminator="type")]


class FunctionName(Model):
    name: str


class FunctionChoice(Model):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | FunctionChoice


class JsonSchema(Model):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling):
    """The next message of a chat."""

    messages: Annotated[list[RequestMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[AnyTool], Field(max_length=128)] | None = None
    conversation: Conversation | None = Field(None, description="Keeps the state of the server's tools.")
    files: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=32)] | None = Field(
        None, description="Uploaded files, for the server's tools."
    )
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = Field(None, description="As user.")
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Prompts that begin alike are kept anyway, so this asks for nothing more."
    )


class CompletionRequest(Sampling):
    """A text continued. With `suffix` the text between both is written, by models that fill blanks."""

    prompt: str | Annotated[list[str], Field(max_length=128)] | list[TokenId] | list[list[TokenId]]
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None


# -------------------------------------------------------------------- reading


def load_json(body: bytes) -> Any:
    """The JSON value of a body; ApiError for what is none, nested too deeply, or holds half of a surrogate pair."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ApiError(f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise ApiError(f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    _check(value, (), 0)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check(value: Any, path: tuple[str | int, ...], depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ApiError(f"the value is nested more than {_MAX_DEPTH} deep", param_of(path[:3]) or None)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ApiError("the text holds half of a surrogate pair, which is no character", param_of(path)) from None
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check(name, path, depth + 1)
            _check(item, (*path, name), depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check(item, (*path, i), depth + 1)


def param_of(path: Sequence[str | int]) -> str:
    """As OpenAI writes it: messages[0].content."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def parse(kind: type[M], value: Any) -> M:
    """A checked request. ApiError names the first field that is wrong."""
    if not isinstance(value, dict):
        raise ApiError(f"the body must be a JSON object, not {type(value).__name__}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _api_error(kind, value, error) from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None


def _api_error(kind: type[BaseModel], value: Any, error: ValidationError) -> ApiError:
    """Of the errors of all branches of a union, the one that got furthest tells most."""
    found = [(_real_path(value, e["loc"], e["type"]), e) for e in error.errors(include_url=False)]
    first = found[0][0][:1]
    path, worst = max((f for f in found if f[0][:1] == first), key=lambda f: len(f[0]))
    param = param_of(path)
    if worst["type"] == "union_tag_invalid":  # of a field that says which model it is: that field is wrong
        name = worst["ctx"]["discriminator"]
        if name.endswith("()"):  # a function of ours reads it
            worst["msg"], name = worst["msg"].replace(name, "'type'"), "'type'"
        param += "." + name.strip("'")
    others = {e["msg"] for p, e in found if p == path}
    message = " or: ".join(sorted(others)) if len(others) < 4 else worst["msg"]
    if worst["type"] == "extra_forbidden":
        message = "this field is unknown or not supported"
        return ApiError(f"{param}: {message}", param, code="unknown_parameter")
    if worst["type"] == "missing":
        return ApiError(f"{param}: this field is missing", param, code="missing_required_parameter")
    return ApiError(f"{param}: {message[0].lower()}{message[1:]}", param, code="invalid_value")


def _real_path(value: Any, loc: Sequence[str | int], kind: str) -> tuple[str | int, ...]:
    """A location without the names of union branches, which are no part of the value."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not (kind == "missing" and i == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)
