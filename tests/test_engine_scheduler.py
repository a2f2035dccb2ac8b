"""openglm.engine.scheduler: turns, budgets, preemption; random traffic with every invariant checked. No model."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from openglm.engine.blocks import BlockManager
from openglm.engine.request import Request
from openglm.engine.scheduler import FairQueue, Plan, Scheduler


def make(n_pages: int = 16, n_parallel: int = 4, step_tokens: int = 8, whole: bool = False) -> Scheduler:
    return Scheduler(BlockManager(n_pages, 4, share=not whole), n_parallel, step_tokens, whole)


def request(number: int, n_prompt: int, max_new_tokens: int = 8, client: str = "") -> Request:
    return Request(number, [number * 1000 + i for i in range(n_prompt)], n_prompt, max_new_tokens, client=client)


def carry_out(scheduler: Scheduler, plan: Plan) -> list[Request]:
    """Every token that is drawn is the next number; requests that have all of theirs are finished and returned."""
    done = []
    for work in plan.work:
        r = work.request
        scheduler.advance(work, [r.ids[-1] + 1] if work.n_logits else [])
        if r.n_left == 0:
            scheduler.finish(r)
            done.append(r)
    scheduler.check_integrity()
    return done


def test_clients_take_turns_and_keep_their_order() -> None:
    queue = FairQueue()
    for number, client in enumerate("aaaabbc"):
        queue.push(request(number, 1, client=client))
    order: list[int] = []
    while queue:
        if len(order) == 3:
            queue.push(request(9, 1, client="d"))  # a newcomer waits one round, not for all of a's
        first = queue.peek()
        assert first is queue.pop()
        order.append(first.id)
    assert order == [0, 4, 6, 1, 5, 9, 2, 3]


def test_a_long_prompt_runs_in_pieces_between_the_tokens_of_others() -> None:
    scheduler = make(n_pages=32)
    short, long = request(1, 2, 20), request(2, 30)
    scheduler.add(short)
    carry_out(scheduler, scheduler.schedule())
    scheduler.add(long)
    pieces = []
    while long.n_drawn == 0:
        plan = scheduler.schedule()
        assert sum(w.n_tokens for w in plan.work) <= 8
        assert (short, 1, 1) in [(w.request, w.n_tokens, w.n_logits) for w in plan.work]
        pieces += [(w.start, w.n_tokens, w.n_logits) for w in plan.work if w.request is long]
        carry_out(scheduler, plan)
    assert pieces == [(0, 7, 0), (7, 7, 0), (14, 7, 0), (21, 7, 0), (28, 2, 1)]


def test_a_beginning_that_many_have_is_run_once() -> None:
    scheduler = make(n_pages=400, n_parallel=8, step_tokens=50)
    beginning = list(range(120))
    alike = [Request(i, [*beginning, *range(1000 * i, 1000 * i + 20)], 140, 4) for i in range(1, 4)]
    other = request(9, 30)
    for one in [*alike, other]:
        scheduler.add(one)
    while alike[0].n_drawn == 0:
        plan = scheduler.schedule()
        assert {w.request for w in plan.work} == {alike[0]}, "the first in line is not overtaken"
        carry_out(scheduler, plan)
    plan = scheduler.schedule()
    assert [(w.request, w.start) for w in plan.work[:3]] == [(alike[0], 140), (alike[1], 120), (alike[2], 120)]
    carry_out(scheduler, plan)
    while scheduler.running:
        carry_out(scheduler, scheduler.schedule())
    assert all(r.state == "finished" for r in [*alike, other]) and scheduler.n_reused == 240


@pytest.mark.parametrize("share", [True, False])
def test_who_waits_for_a_beginning_goes_on_without_it(share: bool) -> None:
    """The one that runs it is cancelled; and without a prefix cache there is nothing to wait for."""
    scheduler = Scheduler(BlockManager(400, 4, share=share), 8, 50)
    first, second = (Request(i, [*range(120), i], 121, 4) for i in (1, 2))
    scheduler.add(first)
    scheduler.add(second)
    carry_out(scheduler, scheduler.schedule())
    carry_out(scheduler, scheduler.schedule())
    assert second.state == "waiting"
    if share:
        scheduler.finish(first)
    plan = scheduler.schedule()
    assert [(w.request, w.start) for w in plan.work if w.request is second] == [(second, 0)]
    carry_out(scheduler, plan)


def test_prefix_models_run_a_prompt_in_one_piece() -> None:
    scheduler = make(n_pages=64, whole=True)
    for number, n_prompt in enumerate((30, 30, 3)):
        scheduler.add(request(number, n_prompt))
    seen = []
    while any(r.n_drawn == 0 for r in [*scheduler.waiting, *scheduler.running]):
        plan = scheduler.schedule()
        seen += [(w.start, w.n_tokens) for w in plan.work if w.n_tokens > 1]
        carry_out(scheduler, plan)
    assert seen == [(0, 30), (0, 30), (0, 3)]


def test_the_newest_gives_way_keeps_its_tokens_and_comes_next() -> None:
    scheduler = make(n_pages=4, n_parallel=2)
    old, new, third = request(1, 4, 12), request(2, 4, 12), request(3, 1, 2)
    scheduler.add(old)
    scheduler.add(new)
    scheduler.add(third)
    finished: list[int] = []
    while scheduler.running or scheduler.waiting:
        before = list(new.ids)
        finished += [r.id for r in carry_out(scheduler, scheduler.schedule())]
        assert new.ids[: len(before)] == before
        if new.state == "waiting" and new.n_preempted:
            assert scheduler.waiting.peek() is new
    assert old.n_preempted == 0 and new.n_preempted > 0
    assert finished == [1, 2, 3]
    assert new.ids == [*range(2000, 2016)]


def test_a_request_that_resumes_finds_its_own_pages() -> None:
    """What preemption gave back is still in the prefix cache as far as no one needed the room."""
    scheduler = make(n_pages=6, n_parallel=2, step_tokens=16)
    first, second = request(1, 8, 10), request(2, 8, 8)
    scheduler.add(first)
    scheduler.add(second)
    while second.n_preempted == 0:
        carry_out(scheduler, scheduler.schedule())
    while scheduler.running or scheduler.waiting:
        carry_out(scheduler, scheduler.schedule())
    assert scheduler.n_reused > 0 and second.n_drawn == 8


def test_the_first_in_line_is_never_overtaken() -> None:
    scheduler = make(n_pages=8, n_parallel=4, step_tokens=32)
    scheduler.add(request(1, 16, 8))
    carry_out(scheduler, scheduler.schedule())
    large = request(2, 20, 4, client="large")
    scheduler.add(large)
    for number in range(3, 9):
        scheduler.add(request(number, 1, 2, client=str(number)))
    order = []
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        order += [w.request.id for w in plan.work if w.start == 0]
        carry_out(scheduler, plan)
    assert order[0] == 2


def test_drafts_take_only_what_is_left() -> None:
    scheduler = make(n_pages=3, n_parallel=2, step_tokens=8)
    first, second = request(1, 4, 3), request(2, 1, 6)
    scheduler.add(first)
    scheduler.add(second)
    carry_out(scheduler, scheduler.schedule())  # draws one token each
    first.drafts, second.drafts = [7] * 9, [8] * 9
    plan = scheduler.schedule()
    assert [(w.request.id, w.n_drafts, w.n_logits) for w in plan.work] == [(1, 1, 2), (2, 2, 3)]
    # The first may draw two more, so one guess; the second has two places left in its page.
    scheduler.advance(plan.work[0], [70, 71])
    scheduler.advance(plan.work[1], [8, 8, 80])
    scheduler.check_integrity()
    assert first.n_cached == 6 and second.n_cached == 4 and second.ids[1:] == [2001 - 1 + 1, 8, 8, 80]


def test_a_request_that_fits_nowhere_is_told_so() -> None:
    scheduler = make(n_pages=2)
    scheduler.add(request(1, 9))
    plan = scheduler.schedule()
    assert [r.id for r in plan.failed] == [1] and not plan.work
    scheduler.finish(plan.failed[0])
    scheduler.check_integrity()
    with pytest.raises(ValueError, match=r"step_tokens \(2\)"):
        make(step_tokens=2)


@pytest.mark.parametrize("whole", [False, True])
def test_random_traffic(whole: bool) -> None:
    """Many clients, few pages, cancelled at any point: every request gets all its tokens, in order, or its end."""
    rng = random.Random(5)
    scheduler = make(n_pages=12, n_parallel=5, step_tokens=10, whole=whole)
    all_requests: list[Request] = []
    served: Counter[str] = Counter()
    cancelled: set[int] = set()
    for _ in range(1500):
        if rng.random() < 0.25 and len(scheduler.waiting) < 10:
            prompt = rng.choice([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4], [9]]) + [rng.randrange(3)] * rng.randrange(
                8
            )
            new = Request(len(all_requests), prompt, len(prompt), rng.randrange(1, 24), client=rng.choice("abc"))
            all_requests.append(new)
            scheduler.add(new)
        if rng.random() < 0.03 and (running := [*scheduler.running, *scheduler.waiting]):
            victim = rng.choice(running)
            scheduler.finish(victim)
            cancelled.add(victim.id)
        for r in scheduler.running:
            if r.n_pending == 1 and rng.random() < 0.5:
                r.drafts = [r.ids[-1] + 1] * rng.randrange(5)
        plan = scheduler.schedule()
        assert not plan.failed
        for work in plan.work:
            r = work.request
            drawn = [r.ids[-1] + 1] * rng.randrange(1, work.n_drafts + 2) if work.n_logits else []
            scheduler.advance(work, drawn)
            assert r.n_left >= 0
            if r.n_left == 0:
                scheduler.finish(r)
                served[r.client] += 1
        scheduler.check_integrity()
    while scheduler.running or scheduler.waiting:
        for r in carry_out(scheduler, scheduler.schedule()):
            served[r.client] += 1
    assert scheduler.n_preemptions > 10 and (scheduler.n_reused > 0) != whole
    assert all(r.state == "finished" and (r.n_left == 0 or r.id in cancelled) for r in all_requests)
    assert min(served.values()) > 0.5 * max(served.values())
    assert scheduler.blocks.n_free == 12
