"""What a request of the Responses protocol may hold, and the task that it makes: items to messages, flat tools to ours.

task = responses_task(parse(ResponsesRequest, {"input": "Hello!"}))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from openglm.server.chat_api import plain_choice
from openglm.server.errors import ApiError
from openglm.server.protocol import Count, Model, Name
from openglm.server.service import ChatTask
from openglm.types import Grammar, Message, ToolCall, ToolSpec

__all__ = ["ResponsesRequest", "renamed", "responses_task", "without_nulls"]

Id = Annotated[str, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
Empty = Annotated[list[Any], Field(max_length=0)]


class TextPart(Model):
    """annotations and logprobs may stand there as they were answered: they change nothing."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Empty | None = None
    logprobs: list[Any] | None = None


class RefusalPart(Model):
    type: Literal["refusal"]
    refusal: str


class InputMessage(Model):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]]
    type: Literal["message"] | None = None
    id: Id | None = None
    status: Status | None = None


class FunctionCall(Model):
    type: Literal["function_call"]
    call_id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    id: Id | None = None
    status: Status | None = None


class FunctionCallOutput(Model):
    type: Literal["function_call_output"]
    call_id: Id
    output: str | list[TextPart]
    id: Id | None = None
    status: Status | None = None


class ReasoningText(Model):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Model):
    type: Literal["reasoning"]
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    id: Id | None = None
    status: Status | None = None
    encrypted_content: None = None


def _kind(item: Any) -> str:
    """A message need not say that it is one."""
    return str(item.get("type") or "message") if isinstance(item, dict) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")] | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]  # fmt: skip


class FunctionTool(Model):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Model):
    type: Literal["function"]
    name: str


class TextFormat(Model):
    """schema, name, description, strict: of the type json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Model):
    format: TextFormat | None = None


class ResponsesStream(Model):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Model):
    """The next message of a chat, by OpenAI's Responses protocol, with nothing the server would have to remember."""

    input: str | Annotated[list[Item], Field(min_length=1)]
    model: str | None = Field(None, description="Name of the served model; may be left out.")
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: ResponsesStream | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Prompts that begin alike are kept anyway, so this asks for nothing more."
    )
    service_tier: Literal["auto", "default"] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    store: bool | None = Field(None, description="Must not be true.")
    previous_response_id: str | None = Field(None, description="Must be null.")

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.include)

    def tool_choice_dump(self) -> Any:
        choice = self.tool_choice
        return choice.model_dump() if isinstance(choice, NamedChoice) else choice or "auto"


def without_nulls(value: Any) -> Any:
    """A request whose items hold no nulls: clients that send an answer back put them where it had nothing."""
    if not isinstance(value, dict) or not isinstance(value.get("input"), list):
        return value
    items = [{k: v for k, v in i.items() if v is not None} if isinstance(i, dict) else i for i in value["input"]]
    return {**value, "input": items}


def responses_task(asked: ResponsesRequest) -> ChatTask:
    """ApiError names the field that does not fit the others."""
    for name in ("store", "previous_response_id"):
        if getattr(asked, name):
            raise ApiError(f"{name}: this server keeps nothing between requests: send the whole conversation", name)
    names = [tool.name for tool in asked.tools or ()]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ApiError(f"tools[{i}].name: {name!r} is there twice", f"tools[{i}].name")
    if asked.top_logprobs and not asked.wants_logprobs:
        raise ApiError('top_logprobs needs include: ["message.output_text.logprobs"]', "top_logprobs")
    return ChatTask(
        messages=_messages(asked),
        tools=[ToolSpec(t.name, t.description or "", t.parameters or {}) for t in asked.tools or ()],
        sampling={
            "temperature": asked.temperature, "max_new_tokens": asked.max_output_tokens,
            "top_p": asked.top_p if asked.top_p is None else max(asked.top_p, 1e-9),
        },
        n_top=(asked.top_logprobs or 0) if asked.wants_logprobs else None,
        choice=_choice(asked, names),
        parallel=asked.parallel_tool_calls is not False,
        strict=frozenset(tool.name for tool in asked.tools or () if tool.strict),
        response=_response(asked),
    )  # fmt: skip


def renamed(error: ApiError) -> ApiError:
    """An error of the layers below, which name fields as the chat protocol does, with the names of this one."""
    message, param = error.message, error.param
    for old, new in (("response_format.json_schema.schema", "text.format.schema"),
                     (".function.parameters", ".parameters")):  # fmt: skip
        message, param = message.replace(old, new), param.replace(old, new) if param else None
    param = "input" if param == "messages" else param
    return ApiError(message, param, error.status, error.code, error.headers)


def _choice(asked: ResponsesRequest, names: Sequence[str]) -> str:
    choice = asked.tool_choice
    if choice is None or isinstance(choice, str):
        return plain_choice(choice, names)
    plain_choice("required", names)
    if choice.name not in names:
        raise ApiError(f"tool_choice.name: {choice.name!r} is not among the tools", "tool_choice.name")
    return f"name:{choice.name}"


def _response(asked: ResponsesRequest) -> Grammar | None:
    wanted = asked.text.format if asked.text else None
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        for name in ("name", "schema_", "description", "strict"):
            if getattr(wanted, name) is not None:
                field = f"text.format.{name.rstrip('_')}"
                raise ApiError(f"{field} needs the type json_schema", field)
        return None if wanted.type == "text" else Grammar("json_schema", '{"type":"object"}')
    for name in ("name", "schema_"):
        if getattr(wanted, name) is None:
            field = f"text.format.{name.rstrip('_')}"
            raise ApiError(f"{field}: this field is missing", field)
    return Grammar("json_schema", json.dumps(wanted.schema_))


# -------------------------------------------------------------------- items to messages


def _messages(asked: ResponsesRequest) -> list[Message]:
    """An assistant's reasoning, text and calls are items of their own here, and one message there."""
    found: list[Message] = [Message("system", asked.instructions)] if asked.instructions else []
    if isinstance(asked.input, str):
        return [*found, Message("user", asked.input)]
    reasoning, text, pending = "", "", False
    calls: list[ToolCall] = []

    def flush() -> None:
        nonlocal reasoning, text, calls, pending
        if pending:
            found.append(Message("assistant", text, tuple(calls), reasoning=reasoning))
        reasoning, text, calls, pending = "", "", [], False

    for item in asked.input:
        match item:
            case ReasoningItem():
                if text or calls:
                    flush()
                parts = item.content or item.summary or ()
                reasoning, pending = reasoning + "".join(part.text for part in parts), True
            case InputMessage() if item.role == "assistant":
                if text or calls:
                    flush()
                text, pending = _text(item.content), True
            case FunctionCall():
                calls.append(ToolCall(item.name, item.arguments, item.call_id))
                pending = True
            case FunctionCallOutput():
                flush()
                found.append(Message("tool", _text(item.output), (), item.call_id))
            case InputMessage():
                flush()
                found.append(Message("user" if item.role == "user" else "system", _text(item.content)))
    flush()
    return found


def _text(value: str | Sequence[TextPart | RefusalPart]) -> str:
    if isinstance(value, str):
        return value
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in value)
