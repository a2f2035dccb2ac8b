"""Service: one model being served. Makes requests of the engine out of what the protocols ask for.

Rendering, tokenising and compiling grammars run in threads beside the event loop; the engine runs in the `Worker`'s.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from openglm import __version__
from openglm.agent.images import ImageBackend
from openglm.chat import ChatModel
from openglm.engine import Engine
from openglm.engine.grammar import Grammars
from openglm.formats.base import BaseFormat
from openglm.server.config import ServeConfig
from openglm.server.errors import ApiError
from openglm.server.events import Answer, PlainReader, Reader, TokenSpelling
from openglm.server.files import FileStore
from openglm.server.limits import Gate, Turns
from openglm.server.metrics import Metrics
from openglm.server.tool_grammar import call_grammar
from openglm.server.worker import Job, Outlet, Worker
from openglm.types import Grammar, Message, SamplingParams, ToolSpec

if TYPE_CHECKING:
    from openglm.agent.toolbox import ToolboxConfig
    from openglm.server.agents import Agents

__all__ = ["ChatTask", "Prompt", "Service", "load_engine"]

log = logging.getLogger("openglm.server")
T = TypeVar("T")
Choice = str  # "none", "auto", "required", or "name:" and a tool's name


@dataclass(frozen=True, kw_only=True)
class ChatTask:
    """What a chat protocol asks for, whichever it is.

    sampling: fields of SamplingParams. n_top: likeliest tokens to be told; None: no log-probabilities. choice: none,
    auto, required, or "name:" with a tool's name. strict: names of tools whose arguments must follow their schema.
    response: what the text of an answer must look like.
    """

    messages: Sequence[Message]
    tools: Sequence[ToolSpec] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    n: int = 1
    n_top: int | None = None
    choice: Choice = "auto"
    parallel: bool = True
    strict: frozenset[str] = frozenset()
    response: Grammar | None = None


@dataclass(frozen=True)
class Prompt:
    """A request of the engine, ready but for what belongs to one run of it. reader: makes a fresh one."""

    ids: list[int]
    params: SamplingParams
    reader: Callable[[], Reader]
    stop: tuple[str, ...] = ()
    n_top: int | None = None
    max_calls: int | None = None


class Service:
    """model: what is served, or what loads it: then the server answers at once and requests wait for it.

    on_failure: called with what loading raised. images: draws what is asked of /v1/images/generations; closed at the
    end.
    """

    def __init__(
        self,
        model: ChatModel | Callable[[], ChatModel],
        config: ServeConfig | None = None,
        name: str = "glm-nano",
        on_failure: Callable[[Exception], None] = lambda error: None,
        images: ImageBackend | None = None,
    ) -> None:
        self.config = config or ServeConfig()
        self.name = self.config.name or name
        self.gate, self.metrics = Gate(self.config), Metrics()
        self.images, self.image_turns = images, Turns(self.config.max_image_queue)
        self.state = "loading"  # ready, failed, stopping
        self.created = int(time.time())
        self.fingerprint = ""  # of what answers, once it is loaded
        self._source, self._on_failure = model, on_failure
        self._ready = asyncio.Event()
        self.files = FileStore()
        self.agents: Agents | None = None  # where the server runs tools
        self.on_ready: Callable[[], None] = lambda: None
        self.n_at_stop = self.n_cut = 0  # answers that ran when the server was told to stop; those it cut off
        self._model: ChatModel | None = None
        self._worker: Worker | None = None

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Load in the background and run the engine."""
        try:
            source = self._source
            model = source if isinstance(source, ChatModel) else await asyncio.to_thread(source)
            self._model = model
            about = repr((__version__, self.name, model.engine.config, model.meta.description, model.meta.generation))
            self.fingerprint = f"fp_{hashlib.sha256(about.encode()).hexdigest()[:10]}"
            if self.config.toolbox is not None:
                self.agents = await asyncio.to_thread(self._make_agents, self.config.toolbox)
            self._worker = Worker(model.engine, self._take_stats)
            self._worker.start(asyncio.get_running_loop())
            if self.state == "loading":
                self.state = "ready"
                self.on_ready()
        except Exception as error:
            self.state = "failed"
            self._on_failure(error)
        self._ready.set()

    def _make_agents(self, config: ToolboxConfig) -> Agents:
        """ValueError for tools that were named and cannot be used."""
        from openglm.agent.toolbox import Toolbox
        from openglm.server.agents import Agents

        images = config.images if self.images is None else self.images
        toolbox = Toolbox(dataclasses.replace(config, builtin=self.model.builtin_tools, images=images))
        return Agents(toolbox, self.config.agent, self.files, self.config.trace_dir, self.name)

    def _take_stats(self, stats: dict[str, Any]) -> None:
        self.metrics.stats = stats

    def announce_stop(self) -> int:
        """Take no more requests; how many answers still run."""
        if self.state in ("loading", "ready"):
            self.state, self.n_at_stop = "stopping", self.n_live
        return self.n_at_stop

    async def stop(self) -> None:
        """End what still runs, which is told so, and the engine's thread."""
        self.announce_stop()
        if self.images is not None:
            await self.images.close()
        if self.agents is not None:
            await self.agents.close()
        if self._worker is None:
            return
        cut = list(self._worker.live)
        for job in cut:
            job.outlet.fail(ApiError("the answer was cut off: the server is stopping", None, 503))
            self._worker.cancel(job)
        self.n_cut = len(cut)
        await asyncio.to_thread(self._worker.stop)

    async def ready(self) -> ChatModel:
        """The model, once it is loaded; 503 when the server cannot answer."""
        await self._ready.wait()
        if self.state == "stopping":
            raise ApiError("the server is stopping", None, 503, "stopping", {"Retry-After": "5", "Connection": "close"})
        if self._model is None:
            raise ApiError("the model could not be loaded", None, 503, "not_loaded")
        return self._model

    @property
    def model(self) -> ChatModel:
        assert self._model is not None, "await ready() first"
        return self._model

    @property
    def worker(self) -> Worker:
        assert self._worker is not None, "await ready() first"
        return self._worker

    @property
    def n_live(self) -> int:
        """Answers that are being made or wait for it."""
        return len(self._worker.live) if self._worker else 0

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                f"the model {name!r} is not served here: this is {self.name!r}", "model", 404, "model_not_found"
            )

    # ---------------------------------------------------------------- prompts

    def chat_prompt(self, task: ChatTask) -> Prompt:
        """Slow: to be run in a thread. Raises ApiError, or ValueError for what model or format do not do."""
        chat_format = self.model.require_format()
        tools = () if task.choice == "none" else tuple(task.tools)
        context = self.model.engine.config.max_seq_len
        if 2 * len(task.messages) > context:  # every message takes a few tokens
            raise _too_long(f"{len(task.messages)} messages", context)
        ids = chat_format.render(list(task.messages), tools).ids
        if len(ids) >= context:
            raise _too_long(f"{len(ids)} tokens", context)
        grammar = call_grammar(chat_format, tools, task.choice, task.parallel, task.strict, task.response)
        sampling = dict(task.sampling) if grammar is None else {**task.sampling, "grammar": grammar}
        params = self.params(len(ids), chat_format.stop_ids, sampling, task.n_top)
        max_calls = None if task.parallel else 1
        return Prompt(ids, params, lambda: chat_format.parser(tools, pieces=True), task.stop, task.n_top, max_calls)

    def text_prompt(
        self, ids: list[int], sampling: dict[str, Any], stop: tuple[str, ...], n_top: int | None,
        stop_ids: Sequence[int] | None = None, reader: Callable[[], Reader] | None = None,
    ) -> Prompt:  # fmt: skip
        """Plain text behind these ids. stop_ids, reader: others than a continued text's."""
        model = self.model
        if len(ids) >= model.engine.config.max_seq_len:
            raise _too_long(f"{len(ids)} tokens", model.engine.config.max_seq_len, "prompt")
        stops = model.text_stops() if stop_ids is None else tuple(stop_ids)
        params = self.params(len(ids), stops, sampling, n_top)
        return Prompt(ids, params, reader or (lambda: PlainReader(model.tokenizer, stops)), stop, n_top)

    def params(
        self, n_prompt: int, stop_ids: Sequence[int], sampling: dict[str, Any], n_top: int | None
    ) -> SamplingParams:
        """The checkpoint's defaults under what was asked for, checked against the engine."""
        engine = self.model.engine
        room = engine.config.max_seq_len - n_prompt
        most = room if self.config.max_tokens is None else min(room, self.config.max_tokens)
        defaults = {"max_new_tokens": most, **self.model.meta.generation}
        given = {name: value for name, value in sampling.items() if value is not None}
        params = SamplingParams(**{**defaults, "stop_ids": tuple(stop_ids), "top_logprobs": n_top or 0, **given})
        if self.config.max_tokens is not None and params.max_new_tokens > self.config.max_tokens:
            params = dataclasses.replace(params, max_new_tokens=self.config.max_tokens)
        if params.grammar is not None and engine.grammar_state is not None:
            engine.grammar_state(params.grammar)  # compiled here, where no one else waits for it
        return params

    # ---------------------------------------------------------------- running

    async def submit(self, prompts: Sequence[tuple[Prompt, int]], client: str) -> tuple[Outlet, list[Job]]:
        """Run each prompt that many times; answer i of the outlet is job i. 429 when too many wait already."""
        worker, n = self.worker, sum(copies for _, copies in prompts)
        limit = self.model.engine.options.n_parallel + self.config.max_queue
        if len(worker.live) + n > limit:
            raise ApiError(
                f"{len(worker.live)} answers are being made or waited for, and {limit} may be: try again shortly",
                None, 429, "queue_full", {"Retry-After": str(max(1, min(30, len(worker.live) // 16)))},
            )  # fmt: skip
        outlet = Outlet(n)
        jobs: list[Job] = []
        for prompt, copies in prompts:
            for copy in range(copies):
                seed = prompt.params.seed
                params = dataclasses.replace(prompt.params, seed=None if seed is None else seed + copy)
                spelling = None if prompt.n_top is None else TokenSpelling(self.model.tokenizer, prompt.n_top)
                answer = Answer(prompt.reader(), prompt.stop, spelling, prompt.max_calls)
                jobs.append(Job(prompt.ids, params, answer, outlet, len(jobs), client))
        for job in jobs:
            job.on_token, job.on_end = self._counter(job), self._job_ended
            self.metrics.prompt_tokens.inc(len(job.ids))
        await worker.submit(jobs)
        return outlet, jobs

    def _counter(self, job: Job) -> Callable[[float], None]:
        first, between = self.metrics.first.observe, self.metrics.between.observe
        return lambda seconds: between(seconds) if job.timing.first else first(seconds)

    def _job_ended(self, job: Job) -> None:
        self.metrics.generated_tokens.inc(job.answer.n_tokens)
        self.metrics.tool_calls.inc(job.answer.n_calls)
        reason = "cancelled" if job.cancelled else "finished" if job.answer.finished else "failed"
        self.metrics.finished.labels(reason).inc()

    def cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.worker.cancel(job)


def _too_long(what: str, context: int, param: str = "messages") -> ApiError:
    return ApiError(
        f"the prompt has {what}, but the context holds {context} tokens with the answer: shorten it",
        param, 400, "context_length_exceeded",
    )  # fmt: skip


def load_engine(model: ChatModel, config: ServeConfig) -> ChatModel:
    """The model with an engine of the server's sizes, whose grammars know what its chat format reads as text."""
    old, chat_format = model.engine, model.chat_format
    grammars = old.grammar_state
    if model._tokenizer is not None and isinstance(chat_format, BaseFormat):
        grammars = Grammars(model._tokenizer, chat_format.syntax(()).spelled)
    engine = Engine(old.model, old.special_ids, old.vocab_size, config.engine, grammar_state=grammars)
    return ChatModel(engine, model._tokenizer, chat_format, model.meta)
