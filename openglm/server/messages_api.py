"""POST /v1/messages: Anthropic's protocol, another rendering of the same events."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from openglm.server.chat_api import client_name
from openglm.server.errors import ApiError
from openglm.server.events import AnswerEvent, CallArguments, CallOpened, Finish, Observation, Reasoning, Text
from openglm.server.limits import Lease
from openglm.server.protocol import Count, Model, Name, Stop, load_json, parse
from openglm.server.service import ChatTask, Service
from openglm.server.sse import EventStream, sse, while_connected
from openglm.server.worker import Job, Outlet
from openglm.types import Message, ToolCall, ToolSpec

__all__ = ["CountRequest", "MessagesRequest", "count_tokens", "messages"]

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class CacheControl(Model):
    """Prompts that begin alike are kept anyway, so this asks for nothing more."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Model):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolUseBlock(Model):
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Model):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1, max_length=256)]
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(Model):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


Block = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class AnthropicMessage(Model):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(Model):
    name: Name
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    cache_control: CacheControl | None = None


class AnthropicChoice(Model):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Model):
    user_id: Annotated[str, Field(max_length=256)] | None = None


class Thinking(Model):
    type: Literal["disabled"]


class CountRequest(Model):
    """How long a prompt is, in tokens."""

    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=128)] | None = None
    tool_choice: AnthropicChoice | None = None


class MessagesRequest(CountRequest):
    """The next message of a chat, by Anthropic's protocol."""

    max_tokens: Count
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: Metadata | None = None
    thinking: Thinking | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    stream: bool | None = None


async def messages(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(MessagesRequest, load_json(body))
    service.check_name(asked.model)
    if asked.messages[-1].role == "assistant":
        raise ApiError("messages: the last one is the assistant's, and an answer that is begun by the client is not "
                       "supported: end with the user's", "messages")  # fmt: skip
    sampling = {"max_new_tokens": asked.max_tokens, "temperature": asked.temperature, "top_p": asked.top_p,
                "top_k": asked.top_k}  # fmt: skip
    prompt = await asyncio.to_thread(service.chat_prompt, _task(asked, sampling, tuple(asked.stop_sequences or ())))
    client = client_name(lease, asked.metadata.user_id if asked.metadata else None)
    outlet, jobs = await service.submit([(prompt, 1)], client)
    shape = Shape(service.name, jobs[0])
    if asked.stream:
        return EventStream(shape.stream(outlet), _stream_error, service.config.stall_s, lambda: service.cancel(jobs))
    try:
        lists = await while_connected(request, outlet.all(1))
    finally:
        service.cancel(jobs)
    return JSONResponse(shape.whole(lists[0]))


async def count_tokens(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(CountRequest, load_json(body))
    service.check_name(asked.model)
    prompt = await asyncio.to_thread(service.chat_prompt, _task(asked, {}, ()))
    return JSONResponse({"input_tokens": len(prompt.ids)})


def _stream_error(error: ApiError) -> bytes:
    return sse(error.anthropic_body(), "error")


# -------------------------------------------------------------------- what is asked for


def _task(asked: CountRequest, sampling: dict[str, Any], stop: tuple[str, ...]) -> ChatTask:
    tools = [ToolSpec(t.name, t.description or "", t.input_schema) for t in asked.tools or ()]
    choice, names = asked.tool_choice, [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ApiError(f"tools[{i}].name: {name!r} is there twice", f"tools[{i}].name")
    wanted = "auto"
    if choice is not None:
        wanted = {"auto": "auto", "none": "none", "any": "required", "tool": f"name:{choice.name}"}[choice.type]
        if choice.type in ("any", "tool") and not tools:
            raise ApiError("tool_choice asks for a call, but there are no tools", "tool_choice")
        if choice.type == "tool" and choice.name not in names:
            raise ApiError(f"tool_choice.name: {choice.name!r} is not among the tools", "tool_choice.name")
    return ChatTask(
        messages=_messages(asked), tools=tools, sampling=sampling, stop=stop, choice=wanted,
        parallel=not (choice and choice.disable_parallel_tool_use),
    )  # fmt: skip


def _messages(asked: CountRequest) -> list[Message]:
    found: list[Message] = []
    if asked.system:
        found.append(Message("system", _text(asked.system)))
    for i, m in enumerate(asked.messages):
        if isinstance(m.content, str):
            found.append(Message(m.role, m.content))
        else:
            found += _of_blocks(m.role, m.content, f"messages[{i}].content")
    return found


def _of_blocks(role: Literal["user", "assistant"], blocks: Sequence[Block], where: str) -> Iterator[Message]:
    """Results of tools are messages of their own, in front of the user's text."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    n_results = 0
    for j, block in enumerate(blocks):
        fits = isinstance(block, TextBlock) or (role == "user") == isinstance(block, ToolResultBlock)
        if not fits:
            raise ApiError(f"{where}[{j}].type: {block.type} is no part of the {role}'s message", f"{where}[{j}].type")
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                calls.append(ToolCall(block.name, json.dumps(block.input, ensure_ascii=False), block.id))
            case ToolResultBlock():
                n_results += 1
                text = _text(block.content or "")
                yield Message("tool", f"error: {text}" if block.is_error else text, (), block.tool_use_id)
    if role == "assistant" or texts or not n_results:
        yield Message(role, "".join(texts), tuple(calls), reasoning="".join(thoughts))


def _text(value: str | Sequence[TextBlock]) -> str:
    return value if isinstance(value, str) else "".join(block.text for block in value)


# -------------------------------------------------------------------- what is answered


class Shape:
    """Renders one event list as Anthropic's: blocks that open, grow and close."""

    def __init__(self, model: str, job: Job) -> None:
        self._id, self._model, self._job = f"msg_{secrets.token_hex(12)}", model, job
        self._kind, self._index = "", -1  # of the block that is open, "" for none

    def _message(self, content: list[dict[str, Any]], reason: str | None, stop: str | None) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content,
            "stop_reason": reason, "stop_sequence": stop, "usage": self._usage(),
        }  # fmt: skip

    def _usage(self) -> dict[str, int]:
        return {"input_tokens": self._job.n_prompt, "output_tokens": self._job.answer.n_tokens}

    def whole(self, events: Sequence[AnswerEvent]) -> dict[str, Any]:
        """Made of the stream's own events, put together."""
        blocks: list[dict[str, Any]] = []
        end: dict[str, Any] = {}
        pieces: list[str] = []
        for value in self._events(events):
            match value["type"]:
                case "content_block_start":
                    blocks.append(dict(value["content_block"]))
                    pieces = []
                case "content_block_delta":
                    delta = value["delta"]
                    pieces.append(delta[{"text_delta": "text", "thinking_delta": "thinking"}.get(
                        delta["type"], "partial_json")])  # fmt: skip
                case "content_block_stop":
                    _close(blocks[-1], "".join(pieces))
                case "message_delta":
                    end = value["delta"]
        return self._message(blocks, end["stop_reason"], end["stop_sequence"])

    async def stream(self, outlet: Outlet) -> AsyncIterator[bytes]:
        yield _sse({"type": "message_start", "message": self._message([], None, None)})
        async for batch in outlet.batches():
            yield b"".join(_sse(value) for value in self._events([event for _, event in batch]))
        yield _sse({"type": "message_stop"})

    def _events(self, events: Sequence[AnswerEvent]) -> Iterator[dict[str, Any]]:
        for event in events:
            match event:
                case Text():
                    yield from self._grow("text", {"type": "text", "text": ""}, "text_delta", event.text)
                case Reasoning():
                    thought = {"type": "thinking", "thinking": "", "signature": ""}
                    yield from self._grow("thinking", thought, "thinking_delta", event.text)
                case CallOpened():
                    id = f"toolu_{event.id.removeprefix('call_')}"
                    call: dict[str, Any] = {"type": "tool_use", "id": id, "name": event.name, "input": {}}
                    yield from self._open(f"call{event.index}", call)
                case CallArguments():
                    yield self._delta({"type": "input_json_delta", "partial_json": event.text})
                case Observation():
                    raise AssertionError("the tools of this protocol are the client's")
                case Finish():
                    yield from self._shut()
                    reason = "stop_sequence" if event.stop_string is not None else REASONS[event.reason]
                    delta = {"stop_reason": reason, "stop_sequence": event.stop_string}
                    yield {"type": "message_delta", "delta": delta, "usage": self._usage()}

    def _grow(self, kind: str, block: dict[str, Any], delta: str, text: str) -> Iterator[dict[str, Any]]:
        if self._kind != kind:
            yield from self._open(kind, block)
        yield self._delta({"type": delta, kind: text})

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._shut()
        self._kind, self._index = kind, self._index + 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _shut(self) -> Iterator[dict[str, Any]]:
        if self._kind:
            yield {"type": "content_block_stop", "index": self._index}
        self._kind = ""


def _close(block: dict[str, Any], text: str) -> None:
    if block["type"] != "tool_use":
        block[block["type"]] = text
        return
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    block["input"] = value if isinstance(value, dict) else {"arguments": text}  # of no object, for its caller to refuse


def _sse(value: dict[str, Any]) -> bytes:
    return sse(value, value["type"])
