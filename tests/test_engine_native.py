"""Engine on the native library: bit for bit what a request gets alone, whatever runs beside it; faults stay alone.

python -m pytest -q tests/test_engine_native.py
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
from typing import Any

import pytest
import torch

import openglm
from openglm.engine import Chunk, Completion, Engine, EngineOptions, NgramProposer
from openglm.engine.native_runner import NativeRunner
from openglm.engine.stream import collected
from openglm.model.transformer import Transformer
from openglm.ops import native
from openglm.types import SamplingParams

needs_library = pytest.mark.skipif(not native.available(), reason="the native library was not built: no C++ compiler")

TINY = ("random:glm-edge-1.5b?n_layers=2&dim=64&ffn_dim=128&n_heads=6&n_kv_heads=2&head_dim=32&vocab_size=320"
        "&max_seq_len=256")  # fmt: skip
N_NEW = 40


def model(quantize: str) -> Transformer:
    return openglm.load(TINY + quantize, device="cpu").engine.model


def prompts() -> list[list[int]]:
    """17 of different lengths, up to several pages; many begin alike."""
    rng = random.Random(3)
    beginning = [rng.randrange(320) for _ in range(60)]
    return [
        beginning[: rng.randrange(61)] + [rng.randrange(320) for _ in range(rng.randrange(1, 40))] for _ in range(17)
    ]


def params(number: int) -> SamplingParams:
    if number % 2:
        return SamplingParams(max_new_tokens=N_NEW, temperature=0.9, top_p=0.9, seed=number, top_logprobs=2)
    return SamplingParams(max_new_tokens=N_NEW, temperature=0.0)


@pytest.fixture(scope="module", params=["&quantize=int4", "&quantize=int8", ""], ids=["int4", "int8", "plain"])
def weights(request: pytest.FixtureRequest) -> Transformer:
    return model(request.param)


@needs_library
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_company_changes_not_a_bit(weights: Transformer, kv_dtype: str | None) -> None:
    def engine(guesses: bool = False, **options: Any) -> Engine:
        sizes = EngineOptions(kv_dtype=kv_dtype, **options)
        made = Engine(weights, {}, options=sizes, proposer=NgramProposer(4, (2, 1)) if guesses else None)
        assert isinstance(made.runner, NativeRunner)
        return made

    alone: list[Completion] = []
    for number, ids in enumerate(prompts()):
        alone.append(engine(prefix_cache=False, n_parallel=1).generate(ids, params(number)))
    preempted = 0
    settings: tuple[dict[str, Any], ...] = (
        {"n_parallel": 17}, {"n_parallel": 17, "prefix_cache": False}, {"step_tokens": 40}, {"pool_tokens": 320},
        {"pool_tokens": 256, "prefix_cache": False}, {"guesses": True}, {"guesses": True, "pool_tokens": 320},
    )  # fmt: skip
    for options in settings:
        made = engine(**{"n_parallel": 16, **options})
        for _ in range(2):  # again, over what the first round left in the prefix cache
            got = [collected(s) for s in [made.stream(ids, params(i)) for i, ids in enumerate(prompts())]]
            assert got == alone  # ids, log-probabilities, the likeliest ones
        shown = made.describe()
        preempted += shown["n_preemptions"]
        assert (shown["n_drafted"] > 0) == ("guesses" in options)
        assert shown["n_pages_free"] == shown["n_pages"]
        made.check_integrity()
    assert preempted > 0


@needs_library
def test_nan_ends_one_request_and_leaves_nothing_behind() -> None:
    weights = model("&tie_embeddings=false")
    weights.embed.weight[7] = float("nan")
    made, greedy = Engine(weights, {}), SamplingParams(max_new_tokens=N_NEW, temperature=0.0, logit_bias={7: -math.inf})
    ids = [[i for i in prompt if i != 7] for prompt in prompts()[:4]]
    wanted = [made.generate(prompt, greedy) for prompt in ids]
    streams = [made.stream(prompt, greedy) for prompt in (*ids, [*ids[0], 7, 5])]
    assert [collected(stream) for stream in streams[:4]] == wanted
    with pytest.raises(FloatingPointError, match="no numbers"):
        next(streams[4])
    assert [made.generate(prompt, greedy) for prompt in ids] == wanted
    made.check_integrity()


def test_a_pool_over_the_memory_says_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"pool of 10+ tokens needs [\d.]+ GiB but [\d.]+ are free: lower pool_tokens"):
        Engine(model(""), {}, options=EngineOptions(pool_tokens=10**13))


def test_a_pool_that_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses when the pool is first needed: requests end with a line that says what to do, later ones too.

    Once there is memory the engine goes on."""

    def refuse(*arguments: Any) -> torch.Tensor:
        raise MemoryError("Unable to allocate")

    with monkeypatch.context() as patch:
        patch.setattr("openglm.engine.native_runner.lazy_zeros", refuse)
        patch.setattr("openglm.model.paged.lazy_zeros", refuse)
        made = Engine(model(""), {}, options=EngineOptions(pool_tokens=512))
        for stream in [made.stream([1, 2, 3], params(0)), made.stream([4], params(0))]:
            with pytest.raises(MemoryError, match="no memory for a pool of 512 tokens: lower pool_tokens"):
                list(stream)
        assert not made.has_work
        made.check_integrity()
    assert len(made.generate([1, 2, 3], params(0)).token_ids) == N_NEW


LITTLE_MEMORY = f"""
import resource, openglm
from openglm.engine import Engine, EngineOptions
from openglm.types import SamplingParams
reference = {TINY.replace("=256", "=8192").replace("ffn_dim=128", "ffn_dim=4096")!r}
model = openglm.load(reference, device="cpu").engine.model
made = Engine(model, {{}}, options=EngineOptions(step_tokens=4096, pool_tokens=8192))
short, long = [[5] * n for n in (3, 4000)]
wanted = made.generate(short, SamplingParams(max_new_tokens=4, temperature=0.0))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 24), resource.RLIM_INFINITY))
try:
    made.generate(long, SamplingParams(max_new_tokens=4))
except MemoryError as error:
    print(error)
assert made.generate(short, SamplingParams(max_new_tokens=4, temperature=0.0)) == wanted
made.check_integrity()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert len(made.generate(long, SamplingParams(max_new_tokens=4)).token_ids) == 4
"""


@needs_library
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process as Linux does")
def test_a_pass_without_memory_ends_its_request() -> None:
    """The native library's own buffers cannot be had: the request ends with a line, the engine goes on."""
    done = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no memory for a pass of 4000 tokens: lower step_tokens"


@needs_library
@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
def test_a_context_in_pieces_equals_the_whole(weights: Transformer, kv_dtype: str) -> None:
    """Prefill in pieces keeps activations small; what it computes is the same, however it is cut."""
    ids = [(7 * i) % 320 for i in range(230)]

    def run(pieces: list[int]) -> torch.Tensor:
        runner, start, logits = NativeRunner(weights, 16, 16, kv_dtype), 0, torch.empty(0)
        for n in pieces:
            chunk = Chunk(ids[start : start + n], start, torch.arange(start, start + n)[None], list(range(16)))
            logits, start = runner.run([chunk]), start + n
        assert start == len(ids)
        return logits

    whole = run([230])
    assert torch.equal(run([100, 100, 30]), whole) and torch.equal(run([1] * 230), whole)


@needs_library
@pytest.mark.parametrize("preset", ["glm-edge-1.5b", "glm-4-9b-0414", "glm-130b"])
def test_few_wanted_logits_are_those_among_all(preset: str) -> None:
    """Where few logits are wanted the last layer leaves out most tokens, but not their keys and values."""
    made = openglm.load(TINY.replace("glm-edge-1.5b", preset) + "&quantize=int4", device="cpu").engine.model
    lengths = (21, 50, 3)
    ids = [torch.randint(320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]

    def run(runner: NativeRunner, wanted: tuple[int, ...]) -> torch.Tensor:
        positions = [torch.arange(n)[None] for n in lengths]
        pages = [range(0, 2), range(2, 7), range(7, 9)]
        given = zip(ids, positions, pages, wanted, strict=True)
        return runner.run([Chunk(i, 0, where, page, n_logits=n) for i, where, page, n in given])

    def next_logits(runner: NativeRunner) -> torch.Tensor:
        return runner.run([Chunk([5], 50, torch.tensor([[50]]), range(2, 7), n_logits=1)])

    whole = NativeRunner(made, n_pages=9)
    everything = run(whole, lengths).split(lengths)
    for wanted in ((0, 0, 0), (0, 1, 0), (1, 1, 1), (2, 9, 3), (0, 30, 0)):
        few = NativeRunner(made, n_pages=9)
        got = run(few, wanted).split(wanted)
        for part, all_of_it, n in zip(got, everything, wanted, strict=True):
            assert torch.equal(part, all_of_it[len(all_of_it) - n :])
        assert torch.equal(next_logits(few), next_logits(whole))
