"""openglm.model.paged and TorchRunner: ragged passes over scattered pages against whole passes without a cache."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openglm.config import GLMConfig, RopeConfig
from openglm.engine.runner import Chunk, TorchRunner
from openglm.model.batch import ForwardBatch, PromptLayout, prompt_layout
from openglm.model.init import init_weights
from openglm.model.paged import PagedPool, lazy_zeros
from openglm.model.transformer import Transformer
from openglm.ops.kv import spread

SPECIALS = {"[MASK]": 40, "[gMASK]": 41, "<sop>": 43}
SHAPE: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "head_dim": 8, "ffn_dim": 48, "max_seq_len": 64,
                         "vocab_size": 48}  # fmt: skip
CONFIGS = {
    "causal": GLMConfig(**SHAPE, n_kv_heads=2, rope=RopeConfig(fraction=0.5)),
    "two-axes": GLMConfig(**SHAPE, n_kv_heads=2, rope=RopeConfig(axes=2), mask="prefix", tie_embeddings=True),
    "learned": GLMConfig(**SHAPE, n_kv_heads=4, norm="layer", mlp="gelu", linear_bias=True, positions="learned",
                         mask="prefix", tie_embeddings=True),
}  # fmt: skip


def model(kind: str, n_prefix: int = 0) -> Transformer:
    made = init_weights(Transformer(CONFIGS[kind]), seed=1, std=0.3).requires_grad_(False)
    if n_prefix:
        c, generator = made.config, torch.Generator().manual_seed(4)
        made.kv_prefix = torch.randn(2, c.n_layers, c.n_kv_heads, n_prefix, c.head_dim, generator=generator)
    return made


def whole(made: Transformer, ids: list[int], layout: PromptLayout) -> Tensor:
    context = layout.context(len(ids))[None]
    batch = ForwardBatch(torch.tensor([ids]), layout.positions(0, len(ids))[:, None], context=context)
    return made.logits(made(batch))[0]


def ragged(runner: TorchRunner, seed: int, n_first: int = 1) -> list[tuple[list[int], PromptLayout, Tensor]]:
    """Seven sequences, each run from pages in random order, cut at random places, several in a pass.

    Returns ids, layout, and the logits of all tokens, for each. n_first: least tokens of a sequence's first chunk.
    """
    rng = random.Random(seed)
    spare = list(range(runner.n_pages))
    rng.shuffle(spare)
    sequences = []
    for number in range(7):
        ids = [rng.randrange(40) for _ in range(rng.randrange(2, 40))]
        ids.insert(len(ids) // 2, 43)
        pages = [spare.pop() for _ in range(-(-len(ids) // runner.page_size))]
        if number == 0:
            pages.sort()
        sequences.append((ids, prompt_layout(ids, runner.config, SPECIALS), pages))
    done = [0] * 7
    rows: list[list[Tensor]] = [[] for _ in range(7)]
    while any(n < len(s[0]) for n, s in zip(done, sequences, strict=True)):
        chosen = [i for i in range(7) if done[i] < len(sequences[i][0]) and rng.random() < 0.7]
        chunks = []
        for i in chosen:
            ids, layout, pages = sequences[i]
            start = done[i]
            n = rng.choice([1, 1, 1, rng.randrange(1, 9)]) if start else max(layout.n_context, n_first)
            n = min(n, len(ids) - start)
            positions = layout.positions(start, start + n)
            context = layout.n_context if start == 0 else 0
            chunks.append(Chunk(ids[start : start + n], start, positions, pages, context, n))
        if chunks:
            logits = runner.run(chunks).split([c.n_logits for c in chunks])
            for i, chunk, part in zip(chosen, chunks, logits, strict=True):
                done[i] += len(chunk.ids)
                rows[i].append(part)
    return [(ids, layout, torch.cat(r)) for (ids, layout, _), r in zip(sequences, rows, strict=True)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("n_prefix", [0, 3])
def test_ragged_passes_equal_whole_ones(kind: str, n_prefix: int) -> None:
    made = model(kind, n_prefix)
    for seed in range(3):
        for ids, layout, logits in ragged(TorchRunner(made, 60, page_size=4), seed):
            torch.testing.assert_close(logits, whole(made, ids, layout), rtol=0, atol=3e-5)


@pytest.mark.parametrize("kv_dtype,atol", [("bfloat16", 0.25), ("float16", 0.03), ("int8", 0.35)])
def test_a_rounded_pool_is_close(kv_dtype: str, atol: float) -> None:
    made = model("causal")
    runner = TorchRunner(made, 60, 4, kv_dtype)
    worst = max(
        float((logits - whole(made, ids, layout)).abs().max()) for ids, layout, logits in ragged(runner, seed=1)
    )
    assert 1e-5 < worst < atol


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_it_makes_no_difference_how_a_prompt_is_cut(kv_dtype: str) -> None:
    """Also where the pool rounds: a token reads its own keys from the pool like all others do."""
    made = model("causal")
    results = []
    for cuts in ([0, 30], [0, 7, 8, 22, 30]):
        runner = TorchRunner(made, 8, 4, kv_dtype)
        ids = [(7 * i) % 40 for i in range(30)]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            chunk = Chunk(ids[start:stop], start, torch.arange(start, stop)[None], list(range(8)))
            logits = runner.run([chunk])
        results.append(logits)
    torch.testing.assert_close(*results, rtol=0, atol=1e-2 if kv_dtype == "int8" else 2e-3)


def test_int8_keeps_each_head_within_a_step() -> None:
    config = CONFIGS["causal"]
    centres = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1))
    pool = PagedPool(config, 4, 4, torch.int8, centres=centres)
    k, v = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [50.0]])
    v[2] = 0.0
    slots = pool.slots([2, 0], 1, 6)
    pool.write(1, slots, k, v)
    read_k, read_v = pool.read(1, slots, torch.float32)
    spread_step = spread(k - centres[1]).abs().amax(-1, keepdim=True) / 127
    assert bool(((k - read_k).norm(dim=-1, keepdim=True) <= 1.13 * 8**0.5 * spread_step).all())
    assert bool(((v - read_v).abs() <= 1.13 * v.abs().amax(-1, keepdim=True) / 127).all())
    assert 2 * pool.n_bytes == PagedPool(config, 4, 4, torch.float16).n_bytes
    assert pool.n_bytes == 4 * 4 * PagedPool.bytes_per_token(config, torch.int8)


def test_what_another_left_in_a_page_is_never_read() -> None:
    """A page comes with the NaN of its last holder; shorter sequences of a batch are padded, but not with that."""
    made = model("causal")
    runner = TorchRunner(made, 12, 4)
    runner.pool._data.fill_(float("nan"))
    ids = [3, 9, 27]
    pages = [[0, 1], [2, 3], [4, 5], [7, 6]]
    chunks = [Chunk(ids + [5] * i, 0, torch.arange(3 + i)[None], p) for i, p in enumerate(pages)]
    runner.run(chunks)
    decode = [Chunk([7], 3 + i, torch.tensor([[3 + i]]), p) for i, p in enumerate(pages)]
    logits = runner.run(decode)
    for i, row in enumerate(logits):
        expected = whole(made, [*ids, *[5] * i, 7], prompt_layout(ids, made.config, {}))[-1]
        torch.testing.assert_close(row, expected, rtol=0, atol=3e-5)


def test_an_unknown_kv_dtype_is_one_line() -> None:
    with pytest.raises(ValueError, match="unknown kv_dtype 'int4': give one of float32"):
        TorchRunner(model("causal"), 4, 4, "int4")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_pool_takes_memory_as_it_is_written_to() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    for dtype in (torch.bfloat16, torch.int8):
        zeros = lazy_zeros((1 << 28,), dtype)
        assert zeros.dtype == dtype and zeros[::1 << 22].eq(0).all()
        assert resident() - before < zeros.nbytes // 4
