"""Agent: a model that decides by itself when and which tool to use, until the task is done.

    from openglm.agent.agent import Agent
    from openglm.agent.tools.python import PythonTool

    agent = Agent(openglm.load("model"), [PythonTool()])
    print(agent.run_sync([{"role": "user", "content": "What is 123456789 squared?"}]).answer)

    async for event in agent.run(messages, conversation="a", temperature=0.2): ...     # events as they happen

The backend is any ChatBackend: a model in this process, or a server at a URL. Ending the iteration early, or cancelling
its task, stops the model and every tool that runs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from openglm.agent.asides import Asides
from openglm.agent.browser.citations import cited_by_overlap
from openglm.agent.choice import ANSWER, results_of
from openglm.agent.dispatch import Approve, Dispatcher, argument_error, holders
from openglm.agent.events import (
    AgentConfig,
    AgentEvent,
    Answered,
    Called,
    Finished,
    Outcome,
    Planned,
    Said,
    Stop,
    Thought,
)
from openglm.agent.guide import Guide, Step
from openglm.agent.http_backend import stream_async
from openglm.agent.prompts import (
    ANSWER_NOW,
    LAST_CALL,
    TIME_IS_UP,
    language_of,
    system_text,
)
from openglm.agent.salvage import asks_for_code
from openglm.agent.turn import Turn, add_pieces
from openglm.types import ChatBackend, Event, Message, Tool, ToolCall, ToolSpec, Usage

if TYPE_CHECKING:
    from openglm.agent.trace import TraceWriter

__all__ = ["Agent"]


class Agent:
    """tools: what the agent runs itself. external: what the caller runs: a run ends where one of them is called.

    approve: asks the user whether a call may run, where the policy says so. missing: by name, why tools that a model
    may know are not there, for models that call them all the same. May serve several conversations at once.
    """

    def __init__(
        self,
        backend: ChatBackend,
        tools: Sequence[Tool] = (),
        config: AgentConfig | None = None,
        *,
        external: Sequence[ToolSpec] = (),
        approve: Approve | None = None,
        missing: Mapping[str, str] | None = None,
    ) -> None:
        self.backend, self.tools, self.config = backend, list(tools), config or AgentConfig()
        if self.config.guided is None:
            guided = bool(getattr(backend, "wants_guide", False))
            self.config = dataclasses.replace(self.config, guided=guided)
        self.external, self._approve, self.missing = list(external), approve, dict(missing or {})
        self.builtin: frozenset[str] = getattr(backend, "builtin_tools", frozenset())
        names = [tool.spec.name for tool in self.tools] + [spec.name for spec in self.external]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(f"two tools are named {name!r}: leave one out, or rename it")

    async def run(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        conversation: str = "default",
        trace: TraceWriter | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[AgentEvent]:
        """Events until the last one, Finished. messages: the conversation, which ends with what is to be answered.

        conversation: names the state of the tools. trace: is written every event. sampling: fields of SamplingParams,
        for each answer. Raises ValueError for what the backend cannot be asked.
        """
        queue: asyncio.Queue[AgentEvent | None] = asyncio.Queue()
        parsed = [
            m if isinstance(m, Message) else Message.from_dict(m, f"messages[{i}]") for i, m in enumerate(messages)
        ]
        if not parsed:
            raise ValueError("messages is empty: give at least the user's")

        def emit(event: AgentEvent) -> None:
            if trace is not None:
                trace.write(event)
            queue.put_nowait(event)

        if trace is not None:
            trace.begin(parsed, [tool.spec for tool in self.tools], self.external, self.config, sampling)
        record = _unrecorded if trace is None else trace.write
        run = _Run(self, parsed, conversation, emit, record, sampling)
        task = asyncio.create_task(run.work())
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if trace is not None:
                trace.close()

    def run_sync(
        self, messages: Sequence[Message | Mapping[str, Any]], conversation: str = "default", **sampling: Any
    ) -> Outcome:
        """What came of a whole run, for programs without asyncio. The tools keep their state: see `close`."""

        async def whole() -> Outcome:
            async for event in self.run(messages, conversation, **sampling):
                if isinstance(event, Finished):
                    return event.outcome
            raise AssertionError("a run ends with Finished")

        return asyncio.run(whole())

    async def end(self, conversation: str) -> None:
        """Let go of what the tools hold for a conversation."""
        for holder in holders(self.tools):
            await holder.end(conversation)

    async def close(self) -> None:
        """Let go of everything that the tools hold."""
        for holder in holders(self.tools):
            await holder.close()


def _unrecorded(answer: Answered) -> None:
    """Of a run without a trace."""


class _Run:
    """One run: its conversation and what is spent. record: told of each answer as the backend gave it."""

    def __init__(
        self, agent: Agent, messages: list[Message], conversation: str, emit: Callable[[AgentEvent], None],
        record: Callable[[Answered], None], sampling: dict[str, Any],
    ) -> None:  # fmt: skip
        self._agent, self._config, self._emit, self._record = agent, agent.config, emit, record
        self._sampling = {name: value for name, value in sampling.items() if value is not None}
        # Unless the caller wants it otherwise: chance serves neither arguments nor what a small model says of results.
        self._steady = {} if "temperature" in self._sampling else {"temperature": 0.0}
        self._messages = messages
        self._calls = Dispatcher(
            agent.tools, agent.config, conversation, agent._approve, emit, agent.builtin, agent.missing
        )
        self._open: list[ToolCall] = []  # calls without a result yet
        self._pending: tuple[ToolCall, ...] = ()
        self._wrong: dict[str, int] = {}  # calls of a tool in a row whose arguments did not fit
        self._n_rounds = self._n_prompt = self._n_drawn = 0
        self._turn: Turn | None = None
        self._asides = Asides(self._text)
        self._guided = bool(agent.config.guided)
        self._bodies = {tool.spec.name for tool in agent.tools if tool.spec.builtin}  # called with code or words
        self._guide = Guide(self._asides, self._bodies, agent.config.system, agent.builtin)

    async def work(self) -> None:
        started = time.monotonic()
        stop: Stop
        try:
            async with asyncio.timeout(self._config.time_s):
                self._begin()
                if self._config.plan:
                    await self._plan()
                stop = await self._rounds()
        except TimeoutError:
            stop = "time"
            self._close_turn()
        answer = next((m.content for m in reversed(self._messages) if m.role == "assistant"), "")
        self._emit(
            Finished(
                Outcome(
                    answer, stop, tuple(self._messages), tuple(self._calls.records), self._pending, self._n_rounds,
                    Usage(self._n_prompt, self._n_drawn), time.monotonic() - started,
                )
            )
        )  # fmt: skip

    def _begin(self) -> None:
        if self._messages[0].role == "system":
            return
        system = self._config.system
        if system is None and not self._guided:  # a guided one is told of one tool at a time, see Guide
            system = system_text([tool.spec for tool in self._agent.tools], language_of(self._messages))
        if system:
            self._messages.insert(0, Message("system", system))

    def _close_turn(self) -> None:
        """What was said until the time was up stays; calls that were running have a result all the same."""
        if self._turn is not None:
            self._turn.finish()
            said = self._turn.message
            self._turn = None
            if said.content or said.reasoning:
                self._messages.append(dataclasses.replace(said, tool_calls=()))
        self._messages += [Message("tool", TIME_IS_UP, (), call.id, call.name) for call in self._open]

    # ---------------------------------------------------------------- rounds

    async def _rounds(self) -> Stop:
        circles = 0
        for number in range(1, self._config.n_rounds + 1):
            message = await self._answer(number, await self._next(number))
            if not message.tool_calls:
                if number < self._config.n_rounds and self._said_nothing(message):
                    continue
                return "length" if self._cut_off else "answer"
            external = {spec.name for spec in self._agent.external}
            own = [call for call in message.tool_calls if call.name not in external]
            self._pending = tuple(call for call in message.tool_calls if call.name in external)
            self._open = list(own)
            records = await self._calls.run(own)
            self._open = []
            circles = circles + 1 if records and all(r.status == "repeated" for r in records) else 0
            results = [Message("tool", r.observation.content, (), r.call.id, r.call.name) for r in records]
            if results and number == self._config.n_rounds - 1:
                note = LAST_CALL[language_of(self._messages)]
                results[-1] = dataclasses.replace(results[-1], content=f"{results[-1].content}\n{note}")
            self._messages += results
            if self._pending:
                return "calls"
            if self._n_drawn >= self._config.max_tokens:
                return "tokens"
            if circles == 2:
                return "repeats"
        return "rounds"

    def _said_nothing(self, message: Message) -> bool:
        """Whether a model has no words for what its tools gave. It is then asked for them, once."""
        before = self._messages[-2]
        note = f"\n{ANSWER_NOW[language_of(self._messages)]}"
        if message.content.strip() or before.role != "tool" or before.content.endswith(note):
            return False
        self._messages.pop()
        self._messages[-1] = dataclasses.replace(before, content=before.content + note)
        return True

    async def _next(self, number: int) -> Step | None:
        """What comes next in a guided run; None where the model is free to call any tool."""
        if not self._guided:
            return None
        if number == self._config.n_rounds:
            return Step(ANSWER)
        step = await self._guide.step(self._messages, self._specs, self._calls.records)
        if step is None:  # without grammars it goes on unguided
            self._guided = False
            self._begin()
        return step

    @property
    def _specs(self) -> list[ToolSpec]:
        return [*self._calls.specs, *self._agent.external]

    async def _answer(self, number: int, step: Step | None) -> Message:
        """The model's next message, with the arguments of its calls put right where that can be done.

        step: the tool that a guided model is to call, or the answer; None: it may call any.
        """
        self._n_rounds, self._cut_off = number, False
        if step is None:
            message = await self._written(number, self._messages, self._specs)
        else:
            message = await self._stepped(number, step)
        calls = [await self._checked(call, number) for call in message.tool_calls]
        message = self._cited(dataclasses.replace(message, tool_calls=tuple(calls)), number)
        self._messages.append(message)
        return message

    async def _stepped(self, number: int, step: Step, again: bool = False) -> Message:
        """The message of this step. Words beside a call are dropped. again: it takes the place of another step."""
        records, call, message = self._calls.records, step.call, Message("assistant")
        specs = [spec for spec in self._specs if spec.name == step.name]
        told = self._guide.told(self._messages, specs, records)
        if call is None:
            message = await self._written(number, told, specs, held=bool(specs))
            if not specs:
                return message
            # Without a call they are drawn, unswayed by words that may be an answer.
            call = next(iter(message.tool_calls), None) or await self._asides.call(told, specs[0])
            if call is None:
                self._emit(Said(message.content, number))
                return message
            other = None if again else await self._guide.instead(call, self._messages, self._specs, records)
            if other is not None:
                return await self._stepped(number, other, again=True)
        calls = (dataclasses.replace(call, id=f"call_{number}_1"),)
        return dataclasses.replace(message, content="", tool_calls=calls)

    async def _written(
        self, number: int, messages: Sequence[Message], specs: Sequence[ToolSpec], held: bool = False
    ) -> Message:
        """What the model writes, said as it comes. held: it is to be a call, and is not said."""
        question = next((m.content for m in reversed(self._messages) if m.role == "user"), "")
        has_python = "python" in self._bodies and any(spec.name == "python" for spec in specs)
        runs_code = has_python and (held or not asks_for_code(question))
        # An answer that turns out to be a call of a tool is one, also where none was offered.
        emit = self._emit if not held else lambda event: self._emit(event) if isinstance(event, Thought) else None
        turn = Turn(number, specs or self._specs, emit, runs_code=runs_code)
        self._turn = None if held else turn
        offered = () if held and self._guide.writes_program(specs, self._messages) else specs
        steady = held or (self._guided and bool(results_of(self._messages)))
        async with aclosing(self._stream(messages, offered, **(self._steady if steady else {}))) as events:
            async for event in events:
                turn.feed(event)
        turn.finish()
        self._cut_off = turn.cut_off
        self._turn = None
        return turn.message

    def _cited(self, message: Message, number: int) -> Message:
        """An answer that cites nothing, with the mark of the page that it is from."""
        question = next((m.content for m in reversed(self._messages) if m.role == "user"), "")
        mark = "" if message.tool_calls else cited_by_overlap(message.content, question, self._calls.records)
        if not mark:
            return message
        self._emit(Said(mark, number))
        return dataclasses.replace(message, content=message.content + mark)

    async def _stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], **more: Any
    ) -> AsyncGenerator[Event]:
        """Events of one answer, which are counted and recorded."""
        left = max(1, self._config.max_tokens - self._n_drawn)
        limit = min(left, self._sampling.get("max_new_tokens", left))
        sampling = {**self._sampling, "max_new_tokens": limit, **more}
        pieces: list[tuple[str, str]] = []
        finish, usage, n_drawn, whole = None, None, 0, False
        try:
            async with aclosing(stream_async(self._agent.backend, messages, tools or None, **sampling)) as events:
                async for event in events:
                    n_drawn += len(event.token_ids)
                    finish, usage = event.finish_reason or finish, event.usage or usage
                    add_pieces(pieces, event)
                    yield event
            whole = True
        finally:
            spent = usage or Usage(0, n_drawn)
            self._n_prompt += spent.prompt_tokens
            self._n_drawn += spent.completion_tokens
            self._record(Answered(tuple(pieces), finish, spent, whole))

    async def _text(self, messages: Sequence[Message], **more: Any) -> str:
        """An answer that is no part of the conversation."""
        text: list[str] = []
        steady = self._steady if "grammar" in more else {}
        async with aclosing(self._stream(messages, (), **{**steady, **more})) as events:
            async for event in events:
                text.append(event.text)
        return "".join(text)

    async def _plan(self) -> None:
        """Asks for a plan, and puts it in front of the conversation."""
        plan = await self._asides.plan(self._messages, [tool.spec.name for tool in self._agent.tools])
        if not plan:
            return
        self._emit(Planned(plan))
        heading = {"zh": "计划：", "en": "The plan:"}[language_of(self._messages)]
        first = self._messages[0]
        if first.role == "system":
            self._messages[0] = dataclasses.replace(first, content=f"{first.content}\n\n{heading}\n{plan}")
        else:
            self._messages.insert(0, Message("system", f"{heading}\n{plan}"))

    async def _checked(self, call: ToolCall, number: int) -> ToolCall:
        """The call, as it will be made. A tool's second wrong call in a row gets its arguments drawn to the schema."""
        spec = self._calls.spec(call.name)
        problem = None if spec is None else argument_error(call, spec)
        self._wrong[call.name] = self._wrong.get(call.name, 0) + 1 if problem else 0
        repaired = None
        if spec is not None and problem and self._wrong[call.name] > 1:
            repaired = await self._asides.repaired(self._messages, call, spec, problem)
        self._emit(Called(repaired or call, number, repaired is not None))
        return repaired or call
