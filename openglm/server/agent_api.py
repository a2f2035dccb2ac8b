"""POST /v1/chat/completions, where the server may run the tools (docs/SERVING.md); the word about a call that waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from openglm.server.agents import Agents, AgentTask, Answering, stricter
from openglm.server.chat_api import ChatShape, chat_task, client_name, plain_completions, stream_error
from openglm.server.errors import ApiError
from openglm.server.events import AnswerEvent, CallArguments, CallOpened, Finish, Reasoning, Text, fold
from openglm.server.limits import Lease
from openglm.server.protocol import ChatRequest, Model, ServerTool, load_json, parse
from openglm.server.service import ChatTask, Service
from openglm.server.sse import EventStream, while_connected
from openglm.server.worker import Job
from openglm.types import Event, Message, ToolCall, ToolSpec, Usage

__all__ = ["ApprovalRequest", "RoundBackend", "approvals", "chat_completions"]


class RoundBackend:
    """The server's own model as a ChatBackend, for one request. jobs: what it was asked so far."""

    def __init__(self, service: Service, client: str, stop: tuple[str, ...]) -> None:
        self._service, self._client, self._stop = service, client, stop
        self.builtin_tools, self.wants_guide = service.model.builtin_tools, service.model.wants_guide
        self.jobs: list[Job] = []

    def stream(self, messages: Any, tools: Any = None, **sampling: Any) -> Any:
        raise AssertionError("asked through astream")

    async def astream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] | None = None, **sampling: Any
    ) -> AsyncGenerator[Event]:
        task = ChatTask(
            messages=messages, tools=list(tools or ()), sampling=sampling, stop=self._stop,
            response=sampling.pop("grammar", None),
        )  # fmt: skip
        prompt = await asyncio.to_thread(self._service.chat_prompt, task)
        outlet, jobs = await self._service.submit([(prompt, 1)], self._client)
        self.jobs += jobs
        call: CallOpened | None = None
        arguments: list[str] = []
        try:
            async for batch in outlet.batches():
                for _, event in batch:
                    if call is not None and isinstance(event, CallOpened | Finish):
                        yield Event(tool_call=ToolCall(call.name, "".join(arguments), call.id))
                        call, arguments = None, []
                    match event:
                        case Text():
                            yield Event(event.text)
                        case Reasoning():
                            yield Event(reasoning=event.text)
                        case CallOpened():
                            call = event
                        case CallArguments():
                            arguments.append(event.text)
                        case Finish():
                            usage = Usage(jobs[0].n_prompt, jobs[0].answer.n_tokens)
                            yield Event(finish_reason=event.reason, usage=usage)
        finally:
            self._service.cancel(jobs)


class ApprovalRequest(Model):
    """What the user says about a call that waits."""

    id: Annotated[str, Field(min_length=1, max_length=64)]
    decision: Literal["allow", "deny"]


async def approvals(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(ApprovalRequest, load_json(body))
    _agents(service, "id").settle(lease.client, asked.id, asked.decision == "allow")
    return JSONResponse({"id": asked.id, "decision": asked.decision})


def _agents(service: Service, param: str) -> Agents:
    if service.agents is None:
        raise ApiError(
            f"{param}: this server runs no tools itself; it was started without --all-tools and --tools", param
        )
    return service.agents


async def chat_completions(service: Service, request: Request, body: bytes, lease: Lease) -> Response:
    asked = parse(ChatRequest, load_json(body))
    service.check_name(asked.model)
    if any(isinstance(tool, ServerTool) for tool in asked.tools or ()) or asked.conversation or asked.files:
        return await agent_completions(service, request, asked, lease)
    return await plain_completions(service, request, asked, lease)


async def agent_completions(service: Service, request: Request, asked: ChatRequest, lease: Lease) -> Response:
    agents = _agents(service, "tools" if asked.tools else "conversation" if asked.conversation else "files")
    task = _task(agents, asked)
    backend = RoundBackend(service, client_name(lease, asked.user), task.stop)
    shape = ChatShape(service, False)
    answering = Answering(agents, backend, task, lease.client)
    events = _events(agents, answering, asked, task, lease.client)

    def last() -> dict[str, Any]:
        return _spent(answering, backend)

    if asked.stream:
        include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        # What is wrong with the request is told before a stream begins.
        first = await while_connected(request, anext(events))
        chunks = shape.stream(_batches(first, events), 1, last if include_usage else None)
        return EventStream(chunks, stream_error, service.config.stall_s)

    async def whole() -> list[AnswerEvent]:
        return [event async for event in events]

    found = await while_connected(request, whole())
    return JSONResponse(shape.whole([fold(found)], last()))


async def _events(
    agents: Agents, answering: Answering, asked: ChatRequest, task: AgentTask, client: str
) -> AsyncGenerator[AnswerEvent]:
    async with agents.conversation(client, asked.conversation) as conversation:
        note = ""
        if asked.files:
            names = await agents.put_files(conversation, client, asked.files, task.tools)
            note = f"[files in the working folder: {', '.join(names)}]"
        async with aclosing(answering.events(conversation, note)) as events:
            async for event in events:
                yield event


async def _batches(
    first: AnswerEvent, events: AsyncGenerator[AnswerEvent]
) -> AsyncIterator[list[tuple[int, AnswerEvent]]]:
    try:
        yield [(0, first)]
        async for event in events:
            yield [(0, event)]
    finally:
        await events.aclose()


def _task(agents: Agents, asked: ChatRequest) -> AgentTask:
    """ApiError for fields that cannot go with tools of the server."""
    wrong = {
        "n": asked.n not in (None, 1), "logprobs": asked.logprobs, "response_format": asked.response_format is not None,
        "tool_choice": asked.tool_choice not in (None, "auto"),
        "parallel_tool_calls": asked.parallel_tool_calls is False,
    }  # fmt: skip
    for name in (name for name, found in wrong.items() if found):
        raise ApiError(f"{name} cannot be asked for where the server runs the tools", name)
    plain = chat_task(asked)
    if plain.strict:
        raise ApiError("tools with strict cannot stand beside those of the server", "tools")
    tools: dict[str, Any] = {}
    rules: dict[str, str] = {}
    for i, entry in enumerate(asked.tools or ()):
        if isinstance(entry, ServerTool):
            found = agents.tools_of(entry.type, f"tools[{i}]")
            tools |= {tool.spec.name: tool for tool in found}
            rules |= {tool.spec.name: entry.approval for tool in found if entry.approval}
    if not tools:
        param = "conversation" if asked.conversation else "files"
        raise ApiError(f'{param} needs tools of the server, such as {{"type": "all_tools"}}', param)
    for i, spec in enumerate(plain.tools):
        if spec.name in tools:
            raise ApiError(f"tools[{i}].function.name: the server has a tool {spec.name!r} itself", "tools")
    return AgentTask(
        messages=plain.messages, tools=list(tools.values()), external=plain.tools,
        config=stricter(agents.config, rules), sampling=plain.sampling, stop=plain.stop,
    )  # fmt: skip


def _spent(answering: Answering, backend: RoundBackend) -> dict[str, Any]:
    """Tokens of all rounds: each prompt counts, as each was read."""
    jobs = backend.jobs
    n_prompt, n_drawn = sum(job.n_prompt for job in jobs), sum(job.answer.n_tokens for job in jobs)
    seconds = sum(job.timing.last - job.timing.first for job in jobs if job.timing.first)
    n_timed = sum(max(job.answer.n_tokens - 1, 0) for job in jobs)
    rounds = answering.outcome.n_rounds if answering.outcome else len(jobs)
    return {
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_drawn, "total_tokens": n_prompt + n_drawn},
        "timings": {
            "rounds": rounds, "decode_tok_s": round(n_timed / seconds, 3) if seconds > 0 else None,
            "prefill_s": round(sum(max(j.timing.first - j.timing.start, 0.0) for j in jobs), 6),
            "context_used": jobs[-1].n_prompt + jobs[-1].answer.n_tokens if jobs else 0,
        },
    }  # fmt: skip
