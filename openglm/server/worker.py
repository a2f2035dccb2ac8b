"""Worker: the one thread that drives the engine, and the jobs that request handlers give it.

    worker.start(asyncio.get_running_loop())
    outlet = Outlet()
    await worker.submit(Job(ids, params, answer, outlet))
    async for index, event in outlet: ...

Handlers and engine never wait for each other. A step's tokens go to the event loop in one call; there they become
events and lie in the job's outlet until its reader takes them. Of a reader that lags pieces of text are joined, so an
outlet holds no more than the answer does, however slow the reader is.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from openglm.engine import Engine
from openglm.engine.request import NO_TOKEN, Step
from openglm.server.errors import OUR_FAULT, ApiError
from openglm.server.events import Answer, AnswerEvent, Finish, merged
from openglm.types import SamplingParams

__all__ = ["Job", "Outlet", "Timing", "Worker"]

log = logging.getLogger("openglm.server")
T = TypeVar("T")
_LAG = 64  # events that wait for a reader before pieces are joined
_STATS_S = 0.25  # the engine's counters are read at most that often


class Outlet:
    """Events of a request's answers (`n` of them), in order, for one reader: (number of the answer, event).

    A job's failure is raised to the reader. Belongs to the event loop.
    """

    def __init__(self, n: int = 1) -> None:
        self._events: deque[tuple[int, AnswerEvent]] = deque()
        self._wake = asyncio.Event()
        self._open = n
        self._error: ApiError | None = None

    def put(self, index: int, events: list[AnswerEvent]) -> None:
        for event in events:
            if len(self._events) >= _LAG and self._events[-1][0] == index:
                joined = merged(self._events[-1][1], event)
                if joined is not None:
                    self._events[-1] = (index, joined)
                    continue
            self._events.append((index, event))
            self._open -= isinstance(event, Finish)
        self._wake.set()

    def fail(self, error: ApiError) -> None:
        self._error = self._error or error
        self._wake.set()

    def __len__(self) -> int:
        return len(self._events)

    async def batches(self) -> AsyncIterator[list[tuple[int, AnswerEvent]]]:
        """All events that there are, as soon as there are any; the end when every answer has finished."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._events:
                taken = list(self._events)
                self._events.clear()
                yield taken
            if self._error is not None:
                raise self._error
            if self._open <= 0 and not self._events:
                return

    async def all(self, n: int) -> list[list[AnswerEvent]]:
        """The whole event list of each of n answers."""
        lists: list[list[AnswerEvent]] = [[] for _ in range(n)]
        async for batch in self.batches():
            for index, event in batch:
                lists[index].append(event)
        return lists


@dataclass
class Timing:
    """Seconds of time.perf_counter."""

    start: float
    first: float = 0.0
    last: float = 0.0


class Job:
    """One request of the engine. index: its number among the answers that share an outlet.

    client: whose it is; the engine's queue serves clients in turn. ids: the prompt.
    """

    def __init__(
        self,
        ids: list[int],
        params: SamplingParams,
        answer: Answer,
        outlet: Outlet,
        index: int = 0,
        client: str = "",
    ) -> None:
        self.ids, self.params, self.answer, self.outlet = ids, params, answer, outlet
        self.index, self.client = index, client
        self.timing = Timing(time.perf_counter())
        self.request_id: int | None = None  # the worker's
        self.cancelled = False
        self.n_reused = 0  # tokens of the prompt that the prefix cache had
        self.on_end: Callable[[Job], None] = lambda job: None
        self.on_token: Callable[[float], None] = lambda seconds: None

    @property
    def n_prompt(self) -> int:
        return len(self.ids)

    def take(self, step: Step) -> bool:
        """One step, in the event loop; False when the engine need not go on."""
        if self.cancelled or self.answer.finished:
            return True
        if step.finish_reason == "error":
            self.outlet.fail(_failure(step.error))
        elif step.finish_reason == "cancelled":
            self.outlet.fail(ApiError("the answer was cut off: the server is stopping", None, 503))
        else:
            if step.token_id != NO_TOKEN:
                self.on_token(step.at - (self.timing.last or self.timing.start))
                self.timing.first = self.timing.first or step.at
                self.timing.last = step.at
                self.n_reused = step.n_reused
            self.outlet.put(self.index, self.answer.feed(step))
        return not self.answer.stopped


def _failure(error: Exception | None) -> ApiError:
    log.error("a request ended with an error: %r", error)
    if isinstance(error, FloatingPointError | MemoryError):
        return ApiError(str(error), None, 500, "engine_failure")
    return ApiError(OUR_FAULT, None, 500)


class Worker:
    """on_stats: called in the worker's thread with `Engine.describe()` now and then."""

    def __init__(self, engine: Engine, on_stats: Callable[[dict[str, Any]], None] = lambda stats: None) -> None:
        self.engine, self._on_stats = engine, on_stats
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # the thread's
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="openglm-engine", daemon=True)
        self._stats_at = 0.0
        self.live: set[Job] = set()  # the event loop's: jobs that have not ended

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Cut off what runs and end the thread."""
        self._tell(None)
        if self._thread.is_alive():
            self._thread.join()

    # ---------------------------------------------------------------- from the event loop

    async def submit(self, jobs: list[Job]) -> None:
        """Queue requests, all or none. Raises ValueError for what the engine does not take."""
        self.live.update(jobs)
        try:
            await self.call(lambda: self._add(jobs))
        except BaseException:
            for job in jobs:
                self.cancel(job)
            raise

    def cancel(self, job: Job) -> None:
        """End a job at once and free what it held; nothing more goes to its outlet."""
        if job in self.live:
            job.cancelled = True
            self._tell(lambda: self._drop(job))
            self._ended(job)

    async def call(self, work: Callable[[], T]) -> T:
        """The result of work done in the worker's thread, between two passes; the engine is not long in coming."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

        self._tell(run)
        return await asyncio.wrap_future(future)

    def _tell(self, command: Callable[[], None] | None) -> None:
        """Have the thread do something, None: end, after the pass that runs."""
        self._inbox.put(command)
        self.engine.interrupt()

    def _ended(self, job: Job) -> None:
        if job in self.live:
            self.live.discard(job)
            job.on_end(job)

    def _deliver(self, batch: list[tuple[Job, Step]]) -> None:
        for job, step in batch:
            if not job.take(step):
                self._tell(lambda job=job: self._drop(job))  # type: ignore[misc]
            if step.finish_reason is not None or job.answer.finished:
                self._ended(job)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while True:
            try:
                while True:
                    command = self._inbox.get(block=not self.engine.has_work)
                    if command is None:
                        for job in list(self._jobs.values()):
                            self._drop(job)
                        return
                    command()
            except queue.Empty:
                pass
            except Exception:
                log.exception("a command of the worker failed")
            self._pass()

    def _pass(self) -> None:
        try:
            steps = self.engine.step()
        except Exception as error:  # the engine's own bookkeeping failed: no request can be trusted
            log.exception("a pass of the engine failed")
            steps = [Step(NO_TOKEN, 0.0, "error", request_id=id, error=error) for id in self._jobs]
            for id in self._jobs:
                self.engine.cancel(id)
        batch = [(self._jobs[s.request_id], s) for s in steps if s.request_id in self._jobs]
        for _, step in batch:
            if step.finish_reason is not None:
                self._jobs.pop(step.request_id, None)
        if batch:
            self._to_loop(batch)
        now = time.perf_counter()
        if now - self._stats_at > _STATS_S or not self.engine.has_work:
            self._stats_at = now
            self._on_stats(self.engine.describe())

    def _to_loop(self, batch: list[tuple[Job, Step]]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, batch)
        except RuntimeError:
            log.debug("the event loop is closed: %d tokens were dropped", len(batch))

    def _add(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.request_id = self.engine.add_request(job.ids, job.params, job.client)
            self._jobs[job.request_id] = job

    def _drop(self, job: Job) -> None:
        if job.request_id is not None and self._jobs.pop(job.request_id, None) is not None:
            self.engine.cancel(job.request_id)
            self._on_stats(self.engine.describe())
