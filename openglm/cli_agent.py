"""`openglm chat`, and the agent in it where tools are asked for.

python -m openglm chat --all-tools
python -m openglm chat --url http://localhost:8000 --tools my_functions.py --approval '*=ask'
python -m openglm replay ~/.local/state/openglm/traces/*.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import queue
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from openglm import cli_chat
from openglm.agent.agent import Agent
from openglm.agent.events import (
    AgentConfig,
    Asked,
    Called,
    Finished,
    Observed,
    Outcome,
    Output,
    Planned,
    Said,
    Thought,
)
from openglm.agent.trace import TraceWriter
from openglm.cli_agent_options import agent_config, agent_options, wants_agent
from openglm.cli_chat import Chat, chat_partner, interruptible
from openglm.cli_chat_commands import Stats
from openglm.cli_chat_input import state_folder
from openglm.cli_chat_view import notice, shortened
from openglm.cli_options import Parser, answer_limits, clean, common_options, sampling
from openglm.cli_tools import toolbox_config
from openglm.types import ChatBackend, Message, ToolCall

if TYPE_CHECKING:
    from openglm.agent.toolbox import Toolbox

__all__ = ["AgentChat", "AgentThread", "chat", "chat_options"]

T = TypeVar("T")
STOPS = {
    "rounds": "stopped at its limit of rounds (--rounds)", "tokens": "stopped at its limit of tokens",
    "time": "stopped at its limit of time", "length": "the answer was cut at its length limit",
    "repeats": "stopped: the model made the same calls again and again",
}  # fmt: skip


def chat_options(p: Parser) -> None:
    cli_chat.chat_options(p)
    agent_options(p)
    common_options(p, json_output=False)


def chat(o: argparse.Namespace) -> int:
    """`openglm chat`, with an agent where tools are asked for."""
    system, params = clean(o.system) if o.system else None, sampling(o) | answer_limits(o)
    if not wants_agent(o):
        if o.image_model:
            raise ValueError("--image-model goes with --all-tools")
        backend, name, context = chat_partner(o)
        return Chat(backend, name, context, system, params, remote=o.url is not None).run()
    from openglm.agent.toolbox import Toolbox

    config = agent_config(o)
    backend, name, context = chat_partner(o)
    builtin: frozenset[str] = getattr(backend, "builtin_tools", frozenset())
    toolbox = Toolbox(dataclasses.replace(toolbox_config(o, o.all_tools), builtin=builtin))
    return AgentChat(backend, name, context, system, params, toolbox, config, trace_folder(o.trace)).run()


# -------------------------------------------------------------------- asyncio in a thread


class AgentThread:
    """A thread whose event loop lives as long as the chat: tools keep their connections in it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="agent")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def iterate(self, events: AsyncGenerator[T]) -> Iterator[T]:
        """The events, one by one. Closing the iterator stops what makes them, and waits until it has stopped."""
        found: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()
        stopped = threading.Event()

        async def pump() -> None:
            last: BaseException | None = None
            try:
                async for event in events:
                    found.put(event)
            except Exception as error:
                last = error
            finally:
                await events.aclose()
                found.put(last)
                stopped.set()

        future = asyncio.run_coroutine_threadsafe(pump(), self.loop)
        try:
            while (event := found.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            future.cancel()
            stopped.wait(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


# -------------------------------------------------------------------- chat


class AgentChat(Chat):
    """A chat whose answers come from an agent. trace_dir: gets a trace of each question; None: none is written."""

    def __init__(
        self, backend: ChatBackend, name: str, context: int | None, system: str | None, sampling: Mapping[str, Any],
        toolbox: Toolbox, config: AgentConfig, trace_dir: Path | None,
    ) -> None:  # fmt: skip
        super().__init__(backend, name, context, system, sampling, remote=True)
        self.toolbox, self.config, self._trace_dir = toolbox, config, trace_dir
        self.agents = AgentThread()
        self._allowed: set[str] = set()  # tools that the user allowed for good
        self._sources: dict[int, Any] = {}  # pages by number, of the whole conversation
        self._waiting: dict[str, asyncio.Future[bool]] = {}  # answers of the user, by call

    def run(self) -> int:
        if self.terminal:
            names = ", ".join(tool.spec.name for tool in self.toolbox.tools)
            print(f"Tools: {names or 'none'}.")
        for missing in self.toolbox.missing:
            notice(f"no {missing.name}: {missing.why}")
        for row in self.toolbox.rows():
            if row.ready and row.note:
                notice(f"{row.name}: {row.note}")
        try:
            return super().run()
        finally:
            self.agents.run(self.toolbox.close())
            self.agents.close()

    def ask(self, question: Message) -> bool:
        """One turn, and further ones while the model calls functions whose results are typed by hand."""
        self.conversation.unanswered = question
        messages = [*self.conversation.all(), question]
        start = len(messages) - 1
        while True:
            new = self._run_agent(messages)
            if new is None:
                return False
            messages += new
            results = self._results(new[-1]) if new and new[-1].tool_calls else None
            if results is None:
                if new and new[-1].tool_calls:
                    messages[-1] = dataclasses.replace(messages[-1], tool_calls=())
                self.conversation.answered(messages[start:])
                return True
            messages += results

    def _run_agent(self, messages: list[Message]) -> list[Message] | None:
        """What a run adds to the conversation; None where it failed. Stopped by Ctrl-C: what was done so far."""
        agent = Agent(
            self.backend,
            self.toolbox.tools,
            self.config,
            external=self.conversation.tools,
            approve=self._approve,
            missing=self.toolbox.reasons,
        )
        seen: list[Any] = []
        error, started, stats = None, time.monotonic(), Stats()
        trace = self._trace()
        events = self.agents.iterate(agent.run(messages, "terminal", trace, **self.sampling))
        with interruptible(True) as interrupt:
            self.view.begin()
            try:
                for event in interrupt.until_hit(events):
                    stats.first_s = stats.first_s if seen else time.monotonic() - started
                    seen.append(event)
                    if isinstance(event, Asked):
                        interrupt.waits = True
                        self._decide(event)
                        interrupt.waits = False
                    else:
                        self._tell(event)
            except KeyboardInterrupt:
                interrupt.hit = True
            except ValueError as wrong:
                error = str(wrong)
            finally:
                getattr(events, "close", lambda: None)()
                self.view.end()
        if error is not None:
            notice(error)
            return None
        stats.total_s = time.monotonic() - started
        stats.n_pieces = sum(isinstance(e, Said | Thought) for e in seen)
        outcome = seen[-1].outcome if seen and isinstance(seen[-1], Finished) else None
        stats.usage = outcome.usage if outcome else None
        self.stats.append(stats)
        if outcome is None:
            notice("stopped")
            return so_far(seen)
        self._after(outcome)
        return list(outcome.messages[_place(outcome.messages, messages[-1]) + 1 :])

    def _after(self, outcome: Outcome) -> None:
        from openglm.agent.browser.citations import footnotes, sources_in

        self._sources |= sources_in(record.observation.data for record in outcome.calls)
        for source in footnotes(outcome.answer, self._sources).notes:
            self.view.result(f"source {source.number}", f"{source.title} {source.url}")
        if outcome.stop in STOPS:
            notice(STOPS[outcome.stop])

    def _trace(self) -> TraceWriter | None:
        return None if self._trace_dir is None else TraceWriter.new(self._trace_dir, self.name)

    # ---------------------------------------------------------------- showing

    def _tell(self, event: Any) -> None:
        match event:
            case Planned(text):
                self.view.reasoning(f"{text}\n")
            case Thought(text):
                self.view.reasoning(text)
            case Said(text):
                self.view.text(text)
            case Called(call):
                self.view.call(call)
            case Output(_, "progress", text):
                self.view.progress(text)
            case Observed():
                self._observed(event)

    def _observed(self, event: Observed) -> None:
        text = shortened(event.observation.content)
        state = "" if event.status == "done" else f" ({event.status})"
        self.view.result(f"{event.name}{state}, {event.seconds:.1f} s", text)
        for file in event.observation.files:
            path = _kept(Path("openglm-files"), file.name, file.read())
            self.view.result("file", f"{path} ({file.description or file.mime})")

    # ---------------------------------------------------------------- approval

    async def _approve(self, call: ToolCall) -> bool:
        """In the agent's thread: waits for what `_decide` says."""
        self._waiting[call.id or ""] = asyncio.get_running_loop().create_future()
        return await self._waiting[call.id or ""]

    def _decide(self, asked: Asked) -> None:
        """In the terminal's."""
        allowed = asked.name in self._allowed
        try:
            if not allowed:
                self.view.end()
                text = self.input.read(f"allow {asked.name}? [y]es, [n]o, [a]lways> ").strip().lower()
                allowed = text in ("y", "yes", "a", "always")
                if text in ("a", "always"):
                    self._allowed.add(asked.name)
                self.view.begin()
        except EOFError:
            self.view.begin()
        finally:
            self.agents.loop.call_soon_threadsafe(self._settle, asked.call_id, allowed)

    def _settle(self, call_id: str, allowed: bool) -> None:
        answer = self._waiting.pop(call_id)  # made right after the question was told, in this thread
        if not answer.done():
            answer.set_result(allowed)


def _place(messages: Sequence[Message], last: Message) -> int:
    return next(i for i in reversed(range(len(messages))) if messages[i] is last)


def so_far(events: Sequence[Any]) -> list[Message]:
    """The conversation of a run that was stopped: whole rounds with their results, then what was said last."""
    messages: list[Message] = []
    rounds = sorted({e.round for e in events if isinstance(e, Said | Called)})
    observed = {e.call_id: e for e in events if isinstance(e, Observed)}
    for number in rounds:
        text = "".join(e.text for e in events if isinstance(e, Said) and e.round == number)
        calls = tuple(e.call for e in events if isinstance(e, Called) and e.round == number)
        if any(call.id not in observed for call in calls):
            calls = ()
        messages.append(Message("assistant", text, calls))
        messages += [Message("tool", observed[c.id or ""].observation.content, (), c.id, c.name) for c in calls]
    return messages or [Message("assistant", "")]


def _kept(folder: Path, name: str, content: bytes) -> Path:
    """The file, under a name of its own: nothing is written over."""
    folder.mkdir(exist_ok=True)
    wanted = Path(name)
    for n in range(10_000):
        path = folder / (wanted.name if n == 0 else f"{wanted.stem}-{n}{wanted.suffix}")
        try:
            with open(path, "xb") as file:
                file.write(content)
            return path
        except FileExistsError:
            continue
    raise ValueError(f"{folder} holds too many files named {wanted.name}: clear it")


def trace_folder(option: str | None) -> Path | None:
    if option == "none":
        return None
    return state_folder() / "traces" if option is None else Path(option)
