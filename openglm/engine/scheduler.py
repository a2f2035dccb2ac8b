"""Scheduler: which tokens of which requests the next pass runs, and who gives way when pages run out. Pure Python.

    python -m pytest -q tests/test_engine_scheduler.py

Every pass holds the next token of each running request (with drafts to verify) and, in what the token budget leaves,
pieces of prompts. Requests wait in a fair queue: clients take turns, within one client first come, first served. The
first in line is never overtaken, so no one starves; it waits while another one runs the beginning that both have, and
then finds that in the prefix cache. When pages run out the newest running request gives its own back
and goes to the front of the queue; it keeps its drawn tokens and runs prompt and answer again when there is room. The
oldest one therefore always gets on, and every request ends.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from openglm.engine.blocks import BlockManager
from openglm.engine.request import Request

__all__ = ["FairQueue", "Plan", "Scheduler", "Work"]

WORTH_A_PASS = 64  # tokens that a request does not run itself, for which it waits a pass or more


class Work(NamedTuple):
    """Tokens start to start + n_tokens - 1 of one request, the last n_drafts of them guesses.

    n_logits: rows of logits wanted, for the last tokens: none before a prompt's end, else one and one a draft.
    """

    request: Request
    start: int
    n_tokens: int
    n_drafts: int
    n_logits: int


class Plan(NamedTuple):
    """failed: requests that cannot get on though no one else holds a page."""

    work: list[Work]
    failed: list[Request]


class FairQueue:
    """Waiting requests; clients take turns."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Request]] = OrderedDict()  # in the order of their turns; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Request]:
        return (request for queue in self._queues.values() for request in queue)

    def push(self, request: Request) -> None:
        self._queues.setdefault(request.client, deque()).append(request)

    def push_front(self, request: Request) -> None:
        """Next of all, before what was put there earlier."""
        self._queues.setdefault(request.client, deque()).appendleft(request)
        self._queues.move_to_end(request.client, last=False)

    def peek(self) -> Request | None:
        return next(iter(self._queues.values()))[0] if self._queues else None

    def pop(self) -> Request:
        """The first in line; its client's next turn comes after everyone else's."""
        client, queue = next(iter(self._queues.items()))
        request = queue.popleft()
        if queue:
            self._queues.move_to_end(client)
        else:
            del self._queues[client]
        return request

    def remove(self, request: Request) -> None:
        queue = self._queues[request.client]
        queue.remove(request)
        if not queue:
            del self._queues[request.client]


class Scheduler:
    """n_parallel: requests that run at once. step_tokens: tokens of one pass.

    whole_prompts: a prompt's pending tokens run in one piece, over the budget if it must be (prefix models).
    """

    def __init__(self, blocks: BlockManager, n_parallel: int, step_tokens: int, whole_prompts: bool = False) -> None:
        if n_parallel < 1:
            raise ValueError(f"n_parallel must be at least 1, not {n_parallel}")
        if step_tokens < n_parallel:
            raise ValueError(f"step_tokens ({step_tokens}) must hold one token of each of {n_parallel} requests")
        self.blocks, self.n_parallel, self.step_tokens = blocks, n_parallel, step_tokens
        self.whole_prompts = whole_prompts
        self.waiting = FairQueue()
        self.running: list[Request] = []  # oldest admission first
        self.n_preemptions = 0
        self.n_reused = 0  # tokens that the prefix cache saved
        self._n_admitted = 0

    def add(self, request: Request) -> None:
        assert request.state == "waiting" and not request.pages
        self.waiting.push(request)

    # ---------------------------------------------------------------- one pass

    def schedule(self) -> Plan:
        """The next pass. Its results go to `advance` (or `finish`), request by request, before the next call."""
        failed = self._grow()
        self._trim_drafts()
        work: list[Work] = []
        budget = self.step_tokens
        for request in self.running:
            if request.n_pending == 1:
                n_drafts = len(request.drafts)
                work.append(Work(request, request.n_cached, 1 + n_drafts, n_drafts, 1 + n_drafts))
                budget -= 1 + n_drafts
        for request in self.running:
            if request.n_pending > 1:
                budget -= self._prefill(request, budget, work)
        while budget > 0 and len(self.running) < self.n_parallel and self._admit():
            n = self._prefill(self.running[-1], budget, work)
            if n == 0:
                break
            budget -= n
        if not self.running and not failed and (stuck := self.waiting.peek()) is not None:
            failed.append(stuck)  # all pages are free, and still too few for it
        return Plan(work, failed)

    def _prefill(self, request: Request, budget: int, work: list[Work]) -> int:
        """Plan a piece of a prompt; returns its tokens."""
        pending = request.n_pending
        n = min(pending, budget)
        if self.whole_prompts and n < pending:
            if any(w.n_tokens - w.n_drafts > 1 for w in work):
                return 0  # one prompt over the budget is enough
            n = pending if budget > 0 else 0
        if n > 0:
            work.append(Work(request, request.n_cached, n, 0, 1 if n == pending else 0))
        return n

    def _grow(self) -> list[Request]:
        """Pages for every token that is known, the oldest request first; the newest gives way."""
        failed: list[Request] = []
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if self._reserve(request, len(request.ids)):
                index += 1
            elif len(self.running) > 1:
                self._preempt(self.running[-1])
            else:
                failed.append(request)
                break
        return failed

    def _reserve(self, request: Request, n_tokens: int) -> bool:
        missing = self._missing(request, n_tokens)
        if missing > 0:
            pages = self.blocks.allocate(missing)
            if pages is None:
                return False
            request.pages += pages
        return True

    def ahead(self, n_steps: int) -> int:
        """Steps, n_steps at most, that all running requests can be written on without a new plan; each is at its last
        token. They get pages for them, as far as free ones go; no one gives way."""
        n = min(n_steps, *(r.n_left for r in self.running))
        while n > 1 and sum(self._missing(r, len(r.ids) + n - 1) for r in self.running) > self.blocks.n_free:
            n -= 1
        for request in self.running:
            self._reserve(request, len(request.ids) + n - 1)
        return min(n, *(len(r.pages) * self.blocks.page_size - r.n_cached for r in self.running))

    def _missing(self, request: Request, n_tokens: int) -> int:
        """Pages that a request lacks for so many tokens."""
        return max(self.blocks.pages_for(n_tokens) - len(request.pages), 0)

    def _trim_drafts(self) -> None:
        """Guesses take only budget and pages that are left over."""
        spare = self.step_tokens - len(self.running)
        for request in self.running:
            if not request.drafts:
                continue
            # The last token of an answer is never run, so nothing is guessed behind it.
            del request.drafts[max(min(spare, request.n_left - 1), 0) if request.n_pending == 1 else 0 :]
            if not self._reserve(request, len(request.ids) + len(request.drafts)):
                del request.drafts[len(request.pages) * self.blocks.page_size - len(request.ids) :]
            spare -= len(request.drafts)

    def _admit(self) -> bool:
        """Let the first in line run if its tokens fit and every running request can still grow by a page."""
        request = self.waiting.peek()
        if request is None:
            return False
        shared = self.blocks.match(request.ids)
        if self._is_coming(request, len(shared)):
            self.blocks.release(shared)
            return False
        missing = self.blocks.pages_for(len(request.ids)) - len(shared)
        pages = self.blocks.allocate(missing) if self.blocks.n_free >= missing + len(self.running) else None
        if pages is None:
            self.blocks.release(shared)
            return False
        self.waiting.pop()
        request.pages = shared + pages
        request.n_shared = len(shared)
        request.n_cached = len(shared) * self.blocks.page_size
        request.state, request.order = "running", self._n_admitted
        self._n_admitted += 1
        self.n_reused += request.n_cached
        if not request.n_preempted:
            request.n_reused = request.n_cached
        self.running.append(request)
        return True

    def _is_coming(self, request: Request, n_shared: int) -> bool:
        """Whether half or more of what a request has to run is being run for another one with the same beginning, and
        that is enough to be worth a pass."""
        size = self.blocks.page_size
        first, n = n_shared * size, len(request.ids)
        half = first + max(-(-(n - first) // 2), WORTH_A_PASS)
        wanted = -(-half // size) * size  # in whole pages; at least one token is left over
        if not self.blocks.share or wanted >= n:
            return False
        beginning = request.ids[:wanted]
        return any(r.n_pending > 1 and len(r.ids) >= wanted and r.ids[:wanted] == beginning for r in self.running)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._drop_pages(request)
        request.state = "waiting"
        request.n_preempted += 1
        self.n_preemptions += 1
        self.waiting.push_front(request)

    def _drop_pages(self, request: Request) -> None:
        self.blocks.release(request.pages)
        request.pages, request.drafts = [], []
        request.n_cached = request.n_shared = 0

    # ---------------------------------------------------------------- results

    def advance(self, work: Work, drawn: Sequence[int] = ()) -> None:
        """A piece of work was run and these tokens drawn behind it, one after the other: of n drafts the first
        len(drawn) - 1 were right, or several steps were run.

        Only now, with sound logits, are full pages shared: no one inherits what a failed request left.
        """
        request = work.request
        assert request.state == "running" and request.n_cached == work.start
        assert bool(drawn) == bool(work.n_logits) and (len(drawn) <= work.n_drafts + 1 or work.n_tokens == 1)
        request.n_cached += work.n_tokens - work.n_drafts + max(len(drawn) - 1, 0)
        request.ids += drawn
        request.drafts = []
        if drawn and request.n_cached // self.blocks.page_size > request.n_shared:
            request.n_shared = self.blocks.register(request.pages, request.ids, request.n_shared, request.n_cached)

    def finish(self, request: Request) -> None:
        """Take a request out, at whatever point it is; its pages go back."""
        if request.state == "running":
            self.running.remove(request)
        elif request.state == "waiting":
            self.waiting.remove(request)
        self._drop_pages(request)
        request.state = "finished"

    def check_integrity(self) -> None:
        """AssertionError unless requests, queue and pages agree."""
        self.blocks.check_integrity([r.pages for r in self.running])
        assert len(self.running) <= self.n_parallel
        assert [r.order for r in self.running] == sorted({r.order for r in self.running})
        for request in self.running:
            assert request.state == "running" and len(set(request.pages)) == len(request.pages)
            assert 0 <= request.n_cached < len(request.ids)
            assert len(request.pages) * self.blocks.page_size >= request.n_cached
            assert request.n_shared * self.blocks.page_size <= request.n_cached
        for request in self.waiting:
            assert request.state == "waiting" and not request.pages and request.n_cached == 0
        assert all(self.waiting._queues.values()), "a client without requests is in line"
