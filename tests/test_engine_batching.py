"""Engine with many requests: company, prefix cache, preemption and guesses change no result; faults stay alone."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from openglm.config import GLMConfig, RopeConfig
from openglm.engine import (
    NO_TOKEN,
    Chunk,
    Completion,
    DraftProposer,
    Engine,
    EngineOptions,
    NgramProposer,
    TorchRunner,
    fill_blanks,
)
from openglm.engine.speculate import Proposer
from openglm.engine.stream import collected
from openglm.model.init import init_weights
from openglm.model.transformer import Transformer
from openglm.types import Grammar, SamplingParams

SPECIALS = {"[MASK]": 40, "[gMASK]": 41, "<sop>": 43}
SHAPE: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48,
                         "max_seq_len": 96, "vocab_size": 48}  # fmt: skip
CONFIGS = {
    "causal": GLMConfig(**SHAPE, rope=RopeConfig(fraction=0.5)),
    "prefix": GLMConfig(**SHAPE, rope=RopeConfig(axes=2), mask="prefix", tie_embeddings=True),
}
N_NEW = 16
GREEDY = SamplingParams(max_new_tokens=N_NEW, temperature=0.0)
SEEDED = SamplingParams(max_new_tokens=N_NEW, temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=7)
N_IDS = 47  # the last row of the embedding belongs to no token: nothing draws it
BAD_ID = 47


def model(kind: str = "causal", seed: int = 1) -> Transformer:
    return init_weights(Transformer(CONFIGS[kind]), seed=seed, std=0.3).requires_grad_(False)


def engine(kind: str = "causal", proposer: Proposer | None = None, **options: Any) -> Engine:
    sizes = EngineOptions(**{"page_size": 4, "n_parallel": 16, **options})
    return Engine(model(kind), SPECIALS, N_IDS, sizes, proposer=proposer, grammar_state=lambda _: Alternate())


def prompts(kind: str = "causal", n: int = 16) -> list[list[int]]:
    """Different lengths; many begin alike."""
    rng = random.Random(3)
    beginning = [rng.randrange(39) for _ in range(18)]
    made = [beginning[: rng.randrange(19)] + [rng.randrange(39) for _ in range(rng.randrange(1, 22))] for _ in range(n)]
    return [[*ids[:5], 40, *ids[5:], 43] for ids in made] if kind == "prefix" else made


class Alternate:
    """A grammar: odd and even ids in turn, nine of them."""

    def __init__(self) -> None:
        self.n, self.done, self.may_end = 0, False, False

    def accepts(self, token_id: int) -> bool:
        return token_id % 2 == self.n % 2

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        return np.arange(N_IDS) % 2 == self.n % 2

    def accept(self, token_id: int) -> None:
        assert self.accepts(token_id)
        self.n += 1
        self.done = self.may_end = self.n == 9


def params_of(number: int) -> SamplingParams:
    """Greedy, drawn and constrained ones side by side, with every kind of state that a sampler has."""
    if number % 4 in (0, 1):
        return GREEDY if number % 4 else dataclasses.replace(SEEDED, seed=number)
    if number % 4 == 2:
        return dataclasses.replace(
            SEEDED, seed=number, repetition_penalty=1.0, frequency_penalty=0.7, presence_penalty=0.2,
            logit_bias={7: 2.0, 3: float("-inf")}, top_logprobs=3, stop_ids=(7,), min_new_tokens=5,
        )  # fmt: skip
    return dataclasses.replace(GREEDY, temperature=0.6 * (number % 8 == 3), seed=1, grammar=Grammar("regex", "x"))


def alone(kind: str) -> list[Completion]:
    """Each request with an engine of its own and nothing shared."""
    return [engine(kind, prefix_cache=False).generate(p, params_of(i)) for i, p in enumerate(prompts(kind))]


def together(made: Engine, kind: str) -> list[Completion]:
    streams = [made.stream(p, params_of(i), client=str(i % 3)) for i, p in enumerate(prompts(kind))]
    done = [collected(stream) for stream in streams]
    made.check_integrity()
    assert not made.has_work
    return done


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Completion]]:
    return {kind: alone(kind) for kind in CONFIGS}


def assert_same(got: Sequence[Completion], wanted: Sequence[Completion]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        for top, wanted_top in zip(one.top_logprobs, other.top_logprobs, strict=True):
            assert [i for i, _ in top] == [i for i, _ in wanted_top]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_cache": False},
        {"n_parallel": 3},
        {"step_tokens": 16},
        {"pool_tokens": 100},
        {"pool_tokens": 100, "prefix_cache": False, "step_tokens": 20, "n_parallel": 8},
        {"page_size": 1},
        {"page_size": 16},
    ],
    ids=str,
)
def test_company_changes_nothing(kind: str, options: dict[str, Any], expected: dict[str, list[Completion]]) -> None:
    made = engine(kind, **options)
    assert_same(together(made, kind), expected[kind])
    first = made.describe()
    assert_same(together(made, kind), expected[kind])  # again, over what the first round left
    shown = made.describe()
    assert (shown["n_preemptions"] > 0) == ("pool_tokens" in options)
    assert (shown["n_reused"] > first["n_reused"]) == (kind == "causal" and options.get("prefix_cache", True))
    assert shown["n_pages_free"] == shown["n_pages"] and shown["n_drawn"] == 2 * sum(
        len(c.token_ids) for c in expected[kind]
    )


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("proposer", ["ngram", "draft", "itself"])
@pytest.mark.parametrize("options", [{}, {"pool_tokens": 100, "n_parallel": 5, "step_tokens": 20}], ids=str)
def test_guesses_change_nothing(
    kind: str, proposer: str, options: dict[str, Any], expected: dict[str, list[Completion]]
) -> None:
    small = model(kind, seed=1 if proposer == "itself" else 2)
    made_of = (
        NgramProposer(5, (2, 1))
        if proposer == "ngram"
        else DraftProposer(TorchRunner(small, 60 if options else 400, 4), 3)
    )
    made = engine(kind, made_of, **options)
    assert_same(together(made, kind), expected[kind])
    shown = made.describe()
    assert shown["n_drafted"] > 100 and shown["n_accepted"] > 0
    if proposer == "itself" and not options:  # greedy ones are all guessed right
        assert shown["n_accepted"] > 0.2 * shown["n_drafted"]
    made.step()
    if isinstance(made_of, DraftProposer):
        made_of.propose([], made._positions_of)
        made_of.blocks.check_integrity([])


def test_guesses_save_passes() -> None:
    """A model that guesses for itself is right whenever there is one way to go: four tokens a pass."""
    plain, made = engine(), engine(proposer=DraftProposer(TorchRunner(model(), 60, 4), 3))
    for one in (plain, made):
        one.generate([3, 4, 5], GREEDY)
    assert plain.describe()["n_passes"] == N_NEW and made.describe()["n_passes"] == 5
    with pytest.raises(ValueError, match="to guess"):
        NgramProposer(0)


def test_stops_count_within_guesses() -> None:
    free = engine().generate([3, 4, 5], GREEDY).token_ids
    for at in range(1, 9):
        params = dataclasses.replace(GREEDY, stop_ids=(free[at],))
        made = engine(proposer=DraftProposer(TorchRunner(model(), 60, 4), 3))
        got = made.generate([3, 4, 5], params)
        assert got.token_ids == free[: free.index(free[at]) + 1] and got.finish_reason == "stop"


# -------------------------------------------------------------------- streams, cancelling


def test_streams_open_at_once_in_one_thread(expected: dict[str, list[Completion]]) -> None:
    made = engine()
    streams = [made.stream(p, params_of(i)) for i, p in enumerate(prompts())]
    got: list[list[int]] = [[] for _ in streams]
    rng = random.Random(0)
    wanted = [c.token_ids for c in expected["causal"]]
    while [tuple(ids) for ids in got] != wanted:
        i = rng.randrange(16)
        assert len(got[i]) <= len(wanted[i])
        got[i] += [step.token_id for step in [next(streams[i], None)] if step is not None]
    assert made.describe()["n_passes"] < 100  # not one request after the other


def test_threads_share_an_engine(expected: dict[str, list[Completion]]) -> None:
    made = engine(pool_tokens=200)
    got: list[Completion | None] = [None] * 16

    def work(first: int) -> None:
        for i in range(first, 16, 4):
            got[i] = made.generate(prompts()[i], params_of(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [c.token_ids for c in got if c is not None] == [c.token_ids for c in expected["causal"]]
    made.check_integrity()


@pytest.mark.parametrize("kind", CONFIGS)
def test_cancelled_at_any_moment(kind: str, expected: dict[str, list[Completion]]) -> None:
    """Waiting, in the middle of a prompt, while written, preempted, ended: pages return, the others' ids stay."""
    for seed in range(4):
        rng = random.Random(seed)
        made = engine(kind, NgramProposer(3, (1,)) if seed % 2 else None, pool_tokens=120, step_tokens=24)
        ids = [made.add_request(p, params_of(i)) for i, p in enumerate(prompts(kind))]
        drawn: dict[int, list[int]] = {i: [] for i in ids}
        gone: set[int] = set()
        while made.has_work:
            for step in made.step():
                if step.finish_reason == "cancelled":
                    assert step.request_id in gone and step.token_id == NO_TOKEN
                else:
                    drawn[step.request_id].append(step.token_id)
            if len(gone) < 8 and rng.random() < 0.4:
                victim = rng.choice(ids)
                if made.cancel(victim):
                    gone.add(victim)
                assert not made.cancel(victim)
            made.check_integrity()
        assert len(gone) > 4 and made.describe()["n_pages_free"] == made.describe()["n_pages"]
        for number, i in enumerate(ids):
            wanted = list(expected[kind][number].token_ids)
            assert drawn[i] == (wanted[: len(drawn[i])] if i in gone else wanted)


def test_a_dropped_or_closed_stream_gives_its_pages_back() -> None:
    made = engine()
    closed, dropped, left = (made.stream(p, GREEDY) for p in prompts()[:3])
    for stream in (closed, dropped, left):
        next(stream)
    closed.close()
    assert list(closed) == [] and len(made.scheduler.running) == 2
    del dropped, stream
    gc.collect()
    next(left)
    assert len(made.scheduler.running) == 1
    made.cancel(left.request_id)
    assert list(left) == []
    assert not made.has_work and made.describe()["n_pages_free"] == made.describe()["n_pages"]


# -------------------------------------------------------------------- faults


def test_a_prompt_over_the_pool_or_the_context_says_the_numbers() -> None:
    made = engine(pool_tokens=40)
    with pytest.raises(ValueError, match="41 tokens but the pool holds 40"):
        made.add_request([3] * 41, GREEDY)
    with pytest.raises(ValueError, match="96 tokens but the context holds 96"):
        engine().add_request([3] * 96, GREEDY)
    assert not made.has_work
    # A prompt that fits gets as long an answer as the pool holds; the last token needs no place.
    assert len(made.generate([3] * 30, GREEDY).token_ids) == 11
    assert len(made.generate([3] * 40, GREEDY).token_ids) == 1


@pytest.mark.parametrize("options", [{}, {"prefix_cache": False}], ids=str)
def test_nan_logits_end_one_request(options: dict[str, Any], expected: dict[str, list[Completion]]) -> None:
    made = engine(**options)
    made.model.embed.weight[BAD_ID] = float("nan")
    all_prompts = prompts()
    bad = made.stream([*all_prompts[0], BAD_ID, 5, 6], GREEDY)
    got = together(made, "causal")
    assert [c.token_ids for c in got] == [c.token_ids for c in expected["causal"]]
    with pytest.raises(FloatingPointError, match="no numbers"):
        next(bad)
    # Its pages are used again, and nothing of it is in the prefix cache.
    assert_same(together(made, "causal"), expected["causal"])
    failed = made.add_request([BAD_ID], GREEDY)
    (step,) = made.step()
    assert (step.request_id, step.token_id, step.finish_reason) == (failed, NO_TOKEN, "error")
    assert isinstance(step.error, FloatingPointError) and not made.has_work


class Faulty(TorchRunner):
    """Fails whenever a pass holds a certain token, and every fifth time on a pass of many requests."""

    fatal_id, n_large = -1, 0

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        self.n_large += len(chunks) > 8
        if len(chunks) > 8 and self.n_large % 5 == 0 or any(self.fatal_id in c.ids for c in chunks):
            raise MemoryError("no memory for this pass")
        return super().run(chunks)


def test_a_pass_that_fails_ends_only_the_request_at_fault(expected: dict[str, list[Completion]]) -> None:
    runner = Faulty(model(), 400, 4)
    made = Engine(runner.model, SPECIALS, N_IDS, runner=runner, grammar_state=lambda _: Alternate())
    runner.fatal_id = BAD_ID
    bad = made.stream([4, BAD_ID], GREEDY)
    got = together(made, "causal")
    assert [c.token_ids for c in got] == [c.token_ids for c in expected["causal"]]
    with pytest.raises(MemoryError, match="no memory"):
        list(bad)
    assert runner.n_large >= 10
    made.check_integrity()


def test_pages_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, expected: dict[str, list[Completion]]) -> None:
    """The block manager refuses at random: requests give way and come again; alone and refused, one ends."""
    made = engine()
    rng, allocate = random.Random(1), made.scheduler.blocks.allocate
    monkeypatch.setattr(made.scheduler.blocks, "allocate", lambda n: allocate(n) if rng.random() < 0.8 else None)
    streams = [made.stream(p, params_of(i)) for i, p in enumerate(prompts())]
    n_failed = 0
    for stream, wanted in zip(streams, expected["causal"], strict=True):
        got: list[int] = []
        try:
            for step in stream:
                got.append(step.token_id)
                made.check_integrity()
        except MemoryError:
            n_failed += 1
        assert tuple(got) == wanted.token_ids[: len(got)]
    assert made.describe()["n_preemptions"] > 5 and n_failed < 16
    monkeypatch.setattr(made.scheduler.blocks, "allocate", lambda n: None)
    with pytest.raises(MemoryError, match="no page"):
        made.generate([3, 4], GREEDY)
    assert made.describe()["n_pages_free"] == made.describe()["n_pages"]


# -------------------------------------------------------------------- the rest


def test_int8_keys_and_values_are_close_and_small() -> None:
    plain, small = engine(pool_tokens=400), engine(pool_tokens=400, kv_dtype="int8")
    for ids in prompts()[:4]:
        one, other = plain.generate(ids, GREEDY), small.generate(ids, GREEDY)
        # Of two tokens that are all but equally likely either may be drawn; their probability is the same.
        same = 2 if one.token_ids[0] == other.token_ids[0] else 1
        assert one.logprobs[:same] == pytest.approx(other.logprobs[:same], abs=0.1)
    assert small.describe()["pool_bytes"] < 0.4 * plain.describe()["pool_bytes"]


def test_blanks_are_filled_in_company() -> None:
    made = engine("prefix", pool_tokens=100)
    text = [3, 40, 4, 5, 40, 6]
    params = SamplingParams(max_new_tokens=5, temperature=0.0)
    wanted, _ = fill_blanks(engine("prefix"), text, params)
    others = [made.stream(p, GREEDY) for p in prompts("prefix")[:5]]
    assert fill_blanks(made, text, params)[0] == wanted
    assert all(len(list(stream)) == N_NEW for stream in others)


def test_forget_after_a_change_of_weights() -> None:
    made = engine()
    ids = prompts()[0]
    before = made.generate(ids, GREEDY).token_ids
    made.model.load_state_dict(model(seed=2).state_dict())
    made.forget()
    after = made.generate(ids, GREEDY).token_ids
    fresh = Engine(model(seed=2), SPECIALS, N_IDS, options=EngineOptions(page_size=4))
    assert after == fresh.generate(ids, GREEDY).token_ids != before


def test_the_pool_is_sized_at_the_start_and_shown() -> None:
    shown = engine(pool_tokens=30).describe()
    assert (shown["pool_tokens"], shown["n_pages"], shown["page_size"]) == (32, 8, 4)
    assert shown["pool_bytes"] == 32 * 2 * 2 * 2 * 8 * 4  # tokens, keys and values, layers, groups, head, float32
    assert engine(n_parallel=3).describe()["pool_tokens"] == 3 * 96
    wrong: list[dict[str, Any]] = [{"n_parallel": 0}, {"step_tokens": 2}, {"pool_tokens": 15}]
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            EngineOptions(**options)
