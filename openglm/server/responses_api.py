"""POST /v1/responses: OpenAI's Responses protocol, another rendering of the same events.

    client.responses.create(model="glm-nano", input="Hello!", stream=True)

Nothing is kept between requests: `store` and `previous_response_id` are refused, the conversation comes in `input`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from openglm.server.chat_api import client_name, logprobs_of
from openglm.server.errors import ApiError
from openglm.server.events import AnswerEvent, CallArguments, CallOpened, Finish, Observation, Reasoning, Text
from openglm.server.limits import Lease
from openglm.server.protocol import load_json, parse
from openglm.server.responses_input import ResponsesRequest, renamed, responses_task, without_nulls
from openglm.server.service import Service
from openglm.server.sse import EventStream, sse, while_connected
from openglm.server.worker import Job, Outlet

__all__ = ["responses"]


async def responses(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(ResponsesRequest, without_nulls(load_json(body)))
    service.check_name(asked.model)
    try:
        prompt = await asyncio.to_thread(service.chat_prompt, responses_task(asked))
    except ApiError as error:
        raise renamed(error) from None
    client = client_name(lease, asked.user or asked.safety_identifier)
    outlet, jobs = await service.submit([(prompt, 1)], client)
    shape = Shape(asked, service.name, jobs[0])
    if asked.stream:
        return EventStream(
            shape.stream(outlet), shape.stream_error, service.config.stall_s, lambda: service.cancel(jobs)
        )  # fmt: skip
    try:
        lists = await while_connected(request, outlet.all(1))
    finally:
        service.cancel(jobs)
    return JSONResponse(shape.whole(lists[0]))


class Shape:
    """Renders one event list as items that open, grow and close; the whole response is made of the same events."""

    def __init__(self, asked: ResponsesRequest, model: str, job: Job) -> None:
        self._asked, self._model, self._job = asked, model, job
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self._items: list[dict[str, Any]] = []  # that are closed
        self._open: dict[str, Any] | None = None  # the item that grows,
        self._pieces: list[str] = []  # and what it has grown by
        self._tokens: list[dict[str, Any]] = []
        self._number = -1
        self._finish: Finish | None = None

    # ---------------------------------------------------------------- whole

    def whole(self, events: Sequence[AnswerEvent]) -> dict[str, Any]:
        *_, last = self._events(events)
        found: dict[str, Any] = last["response"]
        return found

    def _response(self, status: str, error: ApiError | None = None) -> dict[str, Any]:
        asked = self._asked
        cut_off = status == "incomplete"
        told = None if error is None else {"code": "server_error", "message": error.message}
        tools = [tool.model_dump(by_alias=True) for tool in asked.tools or ()]
        text = asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text else {}
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status,
            "completed_at": int(time.time()) if status == "completed" else None, "background": False, "error": told,
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None, "metadata": asked.metadata or {}, "model": self._model, "output": [*self._items],
            "parallel_tool_calls": asked.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "service_tier": "default", "store": False,
            "temperature": self._job.params.temperature, "text": {"format": {"type": "text"}, **text},
            "tool_choice": asked.tool_choice_dump(), "tools": tools, "top_logprobs": asked.top_logprobs or 0,
            "top_p": self._job.params.top_p, "truncation": "disabled",
            "usage": None if self._finish is None else self._usage(), "user": asked.user,
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        answer, n_prompt = self._job.answer, self._job.n_prompt
        return {
            "input_tokens": n_prompt,
            "input_tokens_details": {"cached_tokens": self._job.n_reused, "cache_write_tokens": 0},
            "output_tokens": answer.n_tokens, "total_tokens": n_prompt + answer.n_tokens,
            "output_tokens_details": {"reasoning_tokens": answer.n_reasoning_tokens},
        }  # fmt: skip

    # ---------------------------------------------------------------- streamed

    async def stream(self, outlet: Outlet) -> AsyncIterator[bytes]:
        begun = self._response("in_progress")
        yield b"".join(_sse(self._event(kind, response=begun)) for kind in ("response.created", "response.in_progress"))
        async for batch in outlet.batches():
            yield b"".join(_sse(value) for value in self._events([event for _, event in batch]))

    def stream_error(self, error: ApiError) -> bytes:
        told = self._event("error", code=error.code or error.type, message=error.message, param=error.param)
        return _sse(told) + _sse(self._event("response.failed", response=self._response("failed", error)))

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number, **fields}

    def _events(self, events: Sequence[AnswerEvent]) -> Iterator[dict[str, Any]]:
        for event in events:
            match event:
                case Text():
                    if not self._is("message"):
                        yield from self._start({"type": "message", "role": "assistant", "content": []}, "msg")
                    tokens = logprobs_of(event.tokens) if self._asked.wants_logprobs else []
                    self._tokens += tokens
                    yield self._grow("response.output_text.delta", event.text, content_index=0, logprobs=tokens)
                case Reasoning():
                    if not self._is("reasoning"):
                        yield from self._start({"type": "reasoning", "summary": [], "content": []}, "rs")
                    yield self._grow("response.reasoning_text.delta", event.text, content_index=0)
                case CallOpened():
                    call = {"type": "function_call", "call_id": event.id, "name": event.name, "arguments": ""}
                    yield from self._start(call, "fc")
                case CallArguments():
                    yield self._grow("response.function_call_arguments.delta", event.text)
                case Observation():
                    raise AssertionError("the tools of this protocol are the client's")
                case Finish():
                    cut_off = event.reason == "length"
                    yield from self._close("incomplete" if cut_off else "completed")
                    self._finish = event
                    status = "incomplete" if cut_off else "completed"
                    yield self._event(f"response.{status}", response=self._response(status))

    def _is(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items)}

    def _start(self, item: dict[str, Any], prefix: str) -> Iterator[dict[str, Any]]:
        yield from self._close("completed")
        self._open = {"id": f"{prefix}_{secrets.token_hex(16)}", "status": "in_progress", **item}
        self._pieces, self._tokens = [], []
        yield self._event("response.output_item.added", output_index=len(self._items), item=dict(self._open))
        if "content" in item:
            yield self._event("response.content_part.added", **self._place(), content_index=0, part=self._part(""))

    def _grow(self, kind: str, piece: str, **fields: Any) -> dict[str, Any]:
        self._pieces.append(piece)
        return self._event(kind, **self._place(), delta=piece, **fields)

    def _part(self, text: str) -> dict[str, Any]:
        if self._is("reasoning"):
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._tokens}

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """status: of the item that is open, if one is."""
        if self._open is None:
            return
        text, place = "".join(self._pieces), self._place()
        if self._is("function_call"):
            item = {**self._open, "status": status, "arguments": text}
            name = {"name": item["name"]}
            yield self._event("response.function_call_arguments.done", **place, **name, arguments=text)
        else:
            part = self._part(text)
            item = {**self._open, "status": status, "content": [part]}
            place["content_index"] = 0
            if self._is("reasoning"):
                yield self._event("response.reasoning_text.done", **place, text=text)
            else:
                yield self._event("response.output_text.done", **place, text=text, logprobs=self._tokens)
            yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._open = None


def _sse(value: dict[str, Any]) -> bytes:
    return sse(value, value["type"])
