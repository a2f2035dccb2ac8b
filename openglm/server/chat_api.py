"""POST /v1/chat/completions: OpenAI's chat protocol."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from openglm.server.errors import ApiError
from openglm.server.events import (
    AnswerEvent,
    CallArguments,
    CallOpened,
    Finish,
    Folded,
    Observation,
    Reasoning,
    Text,
    TokenInfo,
    fold,
)
from openglm.server.limits import Lease
from openglm.server.protocol import ChatRequest, RequestMessage, Sampling, Tool
from openglm.server.service import ChatTask, Service
from openglm.server.sse import DONE, EventStream, sse, while_connected
from openglm.server.worker import Job
from openglm.types import Grammar, Message, ToolCall, ToolSpec

__all__ = [
    "ChatShape", "chat_task", "client_name", "logprobs_of", "plain_choice", "plain_completions", "sampling_of",
    "stops_of", "stream_error", "timings_of", "to_messages", "usage_of",
]  # fmt: skip


async def plain_completions(service: Service, request: Request, asked: ChatRequest, lease: Lease) -> Response:
    """The model's answer; tools are the client's."""
    task = chat_task(asked)
    prompt = await asyncio.to_thread(service.chat_prompt, task)
    outlet, jobs = await service.submit([(prompt, task.n)], client_name(lease, asked.user or asked.safety_identifier))
    shape = ChatShape(service, task.n_top is not None)
    if asked.stream:
        include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        chunks = shape.stream(outlet.batches(), len(jobs), (lambda: spent(jobs)) if include_usage else None)
        return EventStream(chunks, stream_error, service.config.stall_s, lambda: service.cancel(jobs))
    try:
        lists = await while_connected(request, outlet.all(len(jobs)))
    finally:
        service.cancel(jobs)
    return JSONResponse(shape.whole([fold(events) for events in lists], spent(jobs)))


def client_name(lease: Lease, user: str | None) -> str:
    """Whose turn it is in the engine's queue: a caller may speak for many users."""
    return f"{lease.client}/{user}" if user else lease.client


def stream_error(error: ApiError) -> bytes:
    return sse(error.body()) + DONE


# -------------------------------------------------------------------- what is asked for


def sampling_of(asked: Sampling) -> dict[str, Any]:
    """Fields of SamplingParams that the common fields of a request set."""
    if asked.stream_options is not None and not asked.stream:
        raise ApiError("stream_options needs stream: true", "stream_options")
    bias = asked.logit_bias or {}
    for token in bias:
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise ApiError(f"logit_bias: {token!r} is no token id", "logit_bias")
    top_p = asked.top_p if asked.top_p is None else max(asked.top_p, 1e-9)  # 0: the likeliest token alone
    return {
        "temperature": asked.temperature, "top_p": top_p, "top_k": asked.top_k, "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty, "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty, "seed": asked.seed, "min_new_tokens": asked.min_tokens,
        "logit_bias": {int(token): value for token, value in bias.items()} or None,
    }  # fmt: skip


def stops_of(asked: Sampling) -> tuple[str, ...]:
    return (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())


def chat_task(asked: ChatRequest) -> ChatTask:
    sampling = sampling_of(asked)
    limits = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError("max_tokens and max_completion_tokens differ: give one", "max_tokens")
    sampling["max_new_tokens"] = next(iter(limits), None)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", "top_logprobs")
    functions = [tool for tool in asked.tools or () if isinstance(tool, Tool)]
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(functions)]
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ApiError(f"tools[{i}].function.name: {name!r} is there twice", f"tools[{i}].function.name")
    return ChatTask(
        messages=to_messages(asked.messages),
        tools=tools,
        sampling=sampling,
        stop=stops_of(asked),
        n=asked.n or 1,
        n_top=(asked.top_logprobs or 0) if asked.logprobs else None,
        choice=_choice(asked, names),
        parallel=asked.parallel_tool_calls is not False,
        strict=frozenset(tool.function.name for tool in functions if tool.function.strict),
        response=_response(asked),
    )


def _tool(tool: Tool, where: str) -> ToolSpec:
    f = tool.function
    return ToolSpec(f.name, f.description or "", f.parameters or {})


def _choice(asked: ChatRequest, names: Sequence[str]) -> str:
    choice = asked.tool_choice
    if choice is None or isinstance(choice, str):
        return plain_choice(choice, names)
    plain_choice("required", names)
    if choice.function.name not in names:
        raise ApiError(f"tool_choice names {choice.function.name!r}, which is not among the tools", "tool_choice")
    return f"name:{choice.function.name}"


def plain_choice(choice: str | None, names: Sequence[str]) -> str:
    """auto, none or required, as asked for. ApiError where a call is required and there are no tools."""
    if choice not in (None, "none", "auto") and not names:
        raise ApiError("tool_choice asks for a call, but there are no tools", "tool_choice")
    return choice or "auto"


def _response(asked: ChatRequest) -> Grammar | None:
    wanted = asked.response_format
    if wanted is None or wanted.type == "text":
        if wanted is not None and wanted.json_schema is not None:
            raise ApiError("response_format.json_schema needs the type json_schema", "response_format.json_schema")
        return None
    if wanted.type == "json_object":
        return Grammar("json_schema", '{"type":"object"}')
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError("response_format.json_schema.schema: this field is missing", "response_format.json_schema")
    return Grammar("json_schema", json.dumps(wanted.json_schema.schema_))


def to_messages(messages: Sequence[RequestMessage]) -> list[Message]:
    """ApiError names the field of a message that its role does not have."""
    found: list[Message] = []
    for i, m in enumerate(messages):
        where = f"messages[{i}]"
        assistant, tool = m.role == "assistant", m.role == "tool"
        for name, fits in (
            ("tool_calls", assistant), ("reasoning_content", assistant), ("refusal", assistant),
            ("tool_call_id", tool), ("name", tool),
        ):  # fmt: skip
            if getattr(m, name) and not fits:
                raise ApiError(f"{where}.{name} is not supported in a message of the {m.role}", f"{where}.{name}")
        content = _content(m, where)
        if m.content is None and not (m.tool_calls or m.refusal):
            raise ApiError(f"{where}.content: this field is missing", f"{where}.content")
        if tool and not (m.tool_call_id or m.name):
            raise ApiError(f"{where}.tool_call_id: this field is missing", f"{where}.tool_call_id")
        calls = tuple(ToolCall(c.function.name, c.function.arguments, c.id) for c in m.tool_calls or ())
        role = "system" if m.role == "developer" else m.role
        found.append(Message(role, content, calls, m.tool_call_id, m.name, m.reasoning_content or ""))
    return found


def _content(m: RequestMessage, where: str) -> str:
    if not isinstance(m.content, list):
        return m.content or m.refusal or ""
    texts = []
    for j, part in enumerate(m.content):
        text = part.text if part.type == "text" else part.refusal
        if text is None:
            raise ApiError(f"{where}.content[{j}].{part.type}: this field is missing", f"{where}.content[{j}]")
        texts.append(text)
    return "".join(texts)


# -------------------------------------------------------------------- what is answered


def usage_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """Tokens: of the prompt once, of all answers together (a token that ends an answer is one of them)."""
    n_prompt, n_drawn = jobs[0].n_prompt, sum(job.answer.n_tokens for job in jobs)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_drawn,
        "total_tokens": n_prompt + n_drawn,
        "prompt_tokens_details": {"cached_tokens": jobs[0].n_reused},
        "completion_tokens_details": {"reasoning_tokens": sum(job.answer.n_reasoning_tokens for job in jobs)},
    }


def timings_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """Our extension. prefill_s: until the first token, waiting included. decode_tok_s: tokens a second after it."""
    first = min(job.timing.first or job.timing.start for job in jobs)
    last = max(job.timing.last or job.timing.start for job in jobs)
    n = sum(max(job.answer.n_tokens - 1, 0) for job in jobs)
    return {
        "prefill_s": round(first - jobs[0].timing.start, 6),
        "decode_tok_s": round(n / (last - first), 3) if last > first else None,
        "context_used": max(job.n_prompt + job.answer.n_tokens for job in jobs),
    }


def spent(jobs: Sequence[Job]) -> dict[str, Any]:
    return {"usage": usage_of(jobs), "timings": timings_of(jobs)}


class ChatShape:
    """Renders event lists as OpenAI's objects. logprobs: whether they were asked for."""

    def __init__(self, service: Service, logprobs: bool) -> None:
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "object": "", "created": int(time.time()), "model": service.name,
            "service_tier": "default", "system_fingerprint": service.fingerprint,
        }  # fmt: skip
        self._logprobs = logprobs

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    # ---------------------------------------------------------------- whole

    def whole(self, answers: Sequence[Folded], last: Mapping[str, Any]) -> dict[str, Any]:
        """last: usage and timings."""
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        return self._object("chat.completion", choices) | dict(last)

    def _choice(self, index: int, answer: Folded) -> dict[str, Any]:
        assert answer.finish is not None
        content = answer.text if answer.text or not answer.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in answer.calls
            ]
        if answer.observations:
            message["observations"] = [o.as_dict() for o in answer.observations]
        logprobs = {"content": logprobs_of(answer.tokens), "refusal": None} if self._logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish.reason}

    # ---------------------------------------------------------------- streamed

    async def stream(
        self, batches: AsyncIterator[list[tuple[int, AnswerEvent]]], n: int,
        last: Callable[[], Mapping[str, Any]] | None,
    ) -> AsyncIterator[bytes]:  # fmt: skip
        """Chunks of n answers. last: gives usage and timings at the end, where they were asked for."""
        usage: dict[str, Any] = {} if last is None else {"usage": None}
        delta = {"role": "assistant", "content": ""}
        yield b"".join(self._chunk(index, delta, None, None, usage) for index in range(n))
        async for batch in batches:
            yield b"".join(self._event(index, event, usage) for index, event in batch)
        if last is not None:
            yield sse(self._object("chat.completion.chunk", []) | dict(last()))
        yield DONE

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None, tokens: Sequence[TokenInfo] | None,
        usage: dict[str, Any],
    ) -> bytes:  # fmt: skip
        told = tokens is not None and self._logprobs
        logprobs = {"content": logprobs_of(tokens or ()), "refusal": None} if told else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return sse(self._object("chat.completion.chunk", [choice]) | usage)

    def _event(self, index: int, event: AnswerEvent, usage: dict[str, Any]) -> bytes:
        match event:
            case Text():
                return self._chunk(index, {"content": event.text}, None, event.tokens, usage)
            case Reasoning():
                return self._chunk(index, {"reasoning_content": event.text}, None, None, usage)
            case CallOpened():
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": event.id, "type": "function", "function": function}
                return self._chunk(index, {"tool_calls": [call]}, None, None, usage)
            case CallArguments():
                call = {"index": event.index, "function": {"arguments": event.text}}
                return self._chunk(index, {"tool_calls": [call]}, None, None, usage)
            case Observation():
                return self._chunk(index, {"observations": [event.as_dict()]}, None, None, usage)
            case Finish():
                return self._chunk(index, {}, event.reason, None, usage)


def logprobs_of(tokens: Sequence[TokenInfo]) -> list[dict[str, Any]]:
    def one(spelled: bytes, logprob: float) -> dict[str, Any]:
        return {"token": spelled.decode("utf-8", "replace"), "bytes": list(spelled), "logprob": max(logprob, -9999.0)}

    return [
        one(t.spelled, t.logprob) | {"top_logprobs": [one(spelled, logprob) for spelled, logprob in t.top]}
        for t in tokens
    ]
