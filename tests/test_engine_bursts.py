"""Bursts: several steps of decoding in one native call give what step by step gives, whatever happens meanwhile.

python -m pytest -q tests/test_engine_bursts.py
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from openglm.config import GLMConfig, RopeConfig
from openglm.engine import NO_TOKEN, Chunk, Completion, Engine, EngineOptions, Step, engine
from openglm.engine.native_runner import NativeRunner
from openglm.engine.runner import Burst, Decoding
from openglm.model.init import init_weights
from openglm.model.transformer import Transformer
from openglm.ops import native
from openglm.types import SamplingParams

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built: no C++ compiler")

N_IDS = 90  # of 96 rows
SHAPE: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48,
                         "max_seq_len": 4096, "vocab_size": 96}  # fmt: skip
CONFIGS = {
    "causal": GLMConfig(**SHAPE, rope=RopeConfig(fraction=0.5)),
    "prefix": GLMConfig(**SHAPE, rope=RopeConfig(axes=2), mask="prefix"),
}
SPECIALS = {"[MASK]": 60, "[gMASK]": 61, "<sop>": 63}
GREEDY = SamplingParams(max_new_tokens=70, temperature=0.0)


def model(kind: str = "causal") -> Transformer:
    return init_weights(Transformer(CONFIGS[kind]), seed=1, std=0.3).requires_grad_(False)


class StepByStep:
    """The same runner, but for bursts."""

    def __init__(self, runner: NativeRunner) -> None:
        self.runner, self.config, self.page_size = runner, runner.config, runner.page_size
        self.n_pages, self.kv_bytes = runner.n_pages, runner.kv_bytes

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        return self.runner.run(chunks)


class Bursts(NativeRunner):
    """Keeps how many steps each call was asked for, and how many it did."""

    def decode(self, sequences: Sequence[Decoding], n_ids: int, n_steps: int, seconds: float) -> Burst:
        burst = super().decode(sequences, n_ids, n_steps, seconds)
        self.__dict__.setdefault("done", []).append((n_steps, len(burst.at)))
        return burst


def made(kind: str = "causal", bursts: bool = True, weights: Transformer | None = None, **options: Any) -> Engine:
    weights = weights or model(kind)
    sizes = EngineOptions(**{"n_parallel": 8, "pool_tokens": 2048, **options})
    assert sizes.pool_tokens is not None
    runner = Bursts(weights, sizes.pool_tokens // 16, 16)
    return Engine(weights, SPECIALS, N_IDS, sizes, runner if bursts else StepByStep(runner))


def prompts(kind: str = "causal") -> list[list[int]]:
    rng = random.Random(3)
    beginning = [rng.randrange(59) for _ in range(40)]
    ids = [beginning[: rng.randrange(41)] + [rng.randrange(59) for _ in range(rng.randrange(1, 30))] for _ in range(12)]
    return [[*p[:5], 60, *p[5:], 63] for p in ids] if kind == "prefix" else ids


def params(number: int) -> SamplingParams:
    """Answers end at different places, by their length, a stop id, or one that counts only after some tokens."""
    p = replace(GREEDY, max_new_tokens=20 + 7 * number, stop_ids=(number, 50 + number))
    if number % 3 == 1:
        return replace(p, temperature=0.9, top_p=0.9, seed=number)
    if number % 3 == 2:
        return replace(p, temperature=1.2, top_k=20, min_p=0.02, seed=-number, min_new_tokens=12)
    return p


def everything(one: Engine, kind: str = "causal") -> dict[int, list[Step]]:
    ids = [one.add_request(p, params(i), client=str(i % 3)) for i, p in enumerate(prompts(kind))]
    steps: dict[int, list[Step]] = {i: [] for i in ids}
    while one.has_work:
        for step in one.step():
            steps[step.request_id].append(replace(step, at=0.0))
        one.check_integrity()
    return steps


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"n_parallel": 1}, {"n_parallel": 12, "step_tokens": 40}, {"prefix_cache": False}, {"pool_tokens": 192},
     {"pool_tokens": 192, "prefix_cache": False}],
    ids=str,
)  # fmt: skip
def test_bursts_change_nothing(kind: str, options: dict[str, Any]) -> None:
    """Every step of every request is the same, with its log-probability and its end."""
    one, other = made(kind, **options), made(kind, bursts=False, **options)
    for _ in range(2):  # again, over what the first round left in the prefix cache
        got, wanted = everything(one, kind), everything(other, kind)
        pieces = [[replace(s, n_reused=0) for s in steps] for steps in (*got.values(), *wanted.values())]
        assert pieces[: len(got)] == pieces[len(got) :]
    assert {s.finish_reason for steps in got.values() for s in steps} == {None, "stop", "length"}
    shown, plain = one.describe(), other.describe()
    assert shown["n_drawn"] == plain["n_drawn"] and (shown["n_preemptions"] > 0) == (plain["n_preemptions"] > 0)
    assert (plain["n_preemptions"] > 0) == (options.get("pool_tokens") == 192)
    assert shown["n_pages_free"] == shown["n_pages"]
    calls: list[tuple[int, int]] = one.runner.done  # type: ignore[attr-defined]
    assert max(done for _, done in calls) > 16 and any(done < asked for asked, done in calls)


def test_threads_that_share_a_row_of_logits_change_nothing() -> None:
    """A vocabulary of several parts; NaN in the last one of them."""
    config = replace(CONFIGS["causal"], vocab_size=20_000, tie_embeddings=False)
    weights = init_weights(Transformer(config), seed=1, std=0.3).requires_grad_(False)
    before, results = native.describe()["threads"], []
    for n_threads, bursts, n_ids in ((1, False, 19_999), (1, True, 19_999), (3, True, 19_999), (3, True, 20_000)):
        native.set_threads(n_threads)
        runner = NativeRunner(weights, 64, 16)
        one = Engine(weights, SPECIALS, n_ids, EngineOptions(), runner if bursts else StepByStep(runner))
        streams = [one.stream(p, replace(params(i), stop_ids=())) for i, p in enumerate(prompts()[:3])]
        for stream in streams:
            next(stream)
        if n_ids == 20_000:
            assert weights.head is not None and isinstance(weights.head.weight, Tensor)
            weights.head.weight[19_999] = float("nan")
            for stream in streams:
                with pytest.raises(FloatingPointError, match="no numbers"):
                    next(stream)
        results.append([[(step.token_id, step.logprob) for step in stream] for stream in streams])
    native.set_threads(before)
    assert results[0] == results[1] == results[2] and len(results[0][2]) > 20


def test_passes_and_calls() -> None:
    """All but the first token of an answer come in bursts, each step of which counts as a pass."""
    one = made()
    assert len(one.generate([3, 4, 5], replace(GREEDY, max_new_tokens=34)).token_ids) == 34
    assert one.runner.done == [(32, 1), (32, 32)]  # type: ignore[attr-defined]  # the request itself cut the first one
    assert one.describe()["n_passes"] == 34


def test_the_times_of_tokens_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list(made().stream([3, 4, 5], GREEDY))
    times = [s.at for s in steps]
    assert len(times) == 70 and times == sorted(set(times))
    monkeypatch.setattr(engine, "BURST_S", 0.0)  # slow models run step by step
    one = made()
    one.generate([3, 4, 5], GREEDY)
    assert {done for _, done in one.runner.done} == {1}  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", [{"top_logprobs": 2}, {"logit_bias": {3: 1.0}}, {"presence_penalty": 1.0}], ids=str)
def test_what_python_has_to_do_goes_step_by_step(change: dict[str, Any]) -> None:
    one, other = made(), made(bursts=False)
    for each in (one, other):
        each.add_request([1, 2, 3], GREEDY)
    wanted = [e.generate([3, 4, 5], replace(GREEDY, max_new_tokens=9, **change)) for e in (one, other)]
    assert wanted[0] == wanted[1] and not hasattr(one.runner, "done")
    while one.has_work:
        one.step()
    assert one.runner.done[-1][1] > 1  # type: ignore[attr-defined]


def bad_at(n: int) -> tuple[Transformer, list[int], Completion]:
    """A model in which the n-th token of an answer to that prompt has an embedding of NaN; and the answer."""
    weights = model()
    for first in range(59):
        answer = made(weights=weights).generate([first, 2], GREEDY)
        token = answer.token_ids[n - 1]
        others = [made(weights=weights).generate(p, GREEDY).token_ids for p in prompts()[:4]]
        if token not in (*answer.token_ids[: n - 1], first, 2, *sum([*others, *map(tuple, prompts()[:4])], ())):
            weights.embed.weight[token] = float("nan")
            return weights, [first, 2], answer
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("n", [4, 20])
def test_nan_amid_a_burst_ends_one_request(n: int) -> None:
    weights, bad, answer = bad_at(n)
    results: list[list[list[Step]]] = []
    for bursts in (True, False):
        one = made(weights=weights, bursts=bursts)
        ids = [one.add_request(p, GREEDY) for p in (bad, *prompts()[:4])]
        steps: dict[int, list[Step]] = {i: [] for i in ids}
        while one.has_work:
            for step in one.step():
                steps[step.request_id].append(replace(step, at=0.0, error=None))
                assert (step.error is None) == (step.token_id != NO_TOKEN)
            one.check_integrity()
        results.append(list(steps.values()))
        failed = results[-1][0]
        assert tuple(s.token_id for s in failed) == (*answer.token_ids[:n], NO_TOKEN)
        assert failed[-1].finish_reason == "error" and all(len(other) == 70 for other in results[-1][1:])
        if bursts:
            with pytest.raises(FloatingPointError, match="no numbers"):
                one.generate(bad, GREEDY)
            assert any(1 < done < asked for asked, done in one.runner.done)  # type: ignore[attr-defined]
    assert results[0] == results[1]


@pytest.mark.parametrize("what", ["cancel", "arrival", "interrupt"])
def test_another_thread_ends_a_burst(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that would last to the end of the answer."""
    monkeypatch.setattr(engine, "BURST_S", 600.0)
    monkeypatch.setattr(engine, "BURST_STEPS", 4096)
    one = made(pool_tokens=4096)
    begun, long = threading.Event(), replace(GREEDY, max_new_tokens=4000)
    native_decode = one.runner.decode  # type: ignore[attr-defined]

    def decode(*arguments: Any) -> Burst:
        begun.set()
        return native_decode(*arguments)

    monkeypatch.setattr(one.runner, "decode", decode)
    request = one.add_request([3, 4, 5], long)
    one.step(), one.step()  # the second one is cut short by the request itself
    begun.clear()
    steps: list[Step] = []
    thread = threading.Thread(target=lambda: steps.extend(one.step()))
    thread.start()
    begun.wait()
    if what == "cancel":
        assert one.cancel(request)
    elif what == "arrival":
        assert len(one.generate([7, 8], replace(GREEDY, max_new_tokens=1)).token_ids) == 1
    else:
        one.interrupt()
    thread.join()
    assert 0 < len(steps) < 3998
    assert one.has_work == (what != "cancel")
    one.check_integrity()
    one.cancel(request)
    assert not one.has_work and one.describe()["n_pages_free"] == one.describe()["n_pages"]


def test_a_burst_that_fails_is_run_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    one = made()
    wanted = one.generate([3, 4, 5], GREEDY)

    def refuse(*arguments: Any) -> Burst:
        raise MemoryError("no memory for a pass")

    monkeypatch.setattr(one.runner, "decode", refuse)
    assert one.generate([3, 4, 5], GREEDY) == wanted
