"""How fast an engine is on this machine: prefill, decoding, time to the first token, share of the read bandwidth.

    python -m openglm bench generate random:glm-edge-1.5b?quantize=int4

Requests go through the engine as anyone's do: queued, scheduled pass by pass, drawn greedily. Decoding one stream on a
CPU reads every weight once for each token, so the limit is the read bandwidth, which `read_bandwidth` measures.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from openglm.engine.engine import Engine
from openglm.model.linear import PackedEmbedding
from openglm.model.load import weight_bytes
from openglm.types import SamplingParams

__all__ = ["Run", "Speed", "bytes_per_pass", "measure_speed", "read_bandwidth"]

WARM_UP_TOKENS = 32
BANDWIDTH_BYTES = 1 << 30  # far beyond any cache
COLUMNS = 4096


@dataclass(frozen=True)
class Run:
    """One run. prefill_tok_s: prompt tokens of all requests over the time until each had its first token.

    decode_tok_s: tokens over the time from there until the first request was complete: all ran in every pass.
    ttft_s: median over the requests of the time from the queue to the first token.
    """

    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float


@dataclass(frozen=True)
class Speed:
    """Medians over `runs`, each figure by itself."""

    runs: tuple[Run, ...]

    def median(self, name: str) -> float:
        return statistics.median(getattr(run, name) for run in self.runs)


def measure_speed(
    engine: Engine,
    prompt_tokens: int,
    new_tokens: int,
    batch: int = 1,
    repeats: int = 3,
    tick: Callable[[int], object] = lambda n: None,
) -> Speed:
    """Run `batch` requests side by side, `repeats` times after a short warm-up. tick: called with new tokens of a pass.

    Prompts are random and all different, so the prefix cache is no help. Raises ValueError for sizes that do not fit
    the context, or that the engine would queue, and whatever ends a request with an error.
    """
    options = {"prompt_tokens": prompt_tokens, "batch": batch, "repeats": repeats}
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2, not {new_tokens}: the first one belongs to the prefill")
    context = engine.config.max_seq_len
    if prompt_tokens + new_tokens > context:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones make {prompt_tokens + new_tokens}, but the "
            f"context holds {context}: ask for fewer"
        )
    if batch > engine.options.n_parallel:
        raise ValueError(f"batch {batch} is above the {engine.options.n_parallel} requests that this engine runs")
    blocks = engine.scheduler.blocks
    pool, needed = blocks.n_pages * blocks.page_size, batch * (prompt_tokens + new_tokens + blocks.page_size)
    if needed > pool:
        raise ValueError(f"{batch} requests need room for {needed} tokens but the pool holds {pool}: ask for fewer")
    prompts = _prompts(engine, prompt_tokens)
    _run(engine, [next(prompts)[:WARM_UP_TOKENS] for _ in range(batch)], 2, tick=lambda n: None)
    runs = [_run(engine, [next(prompts) for _ in range(batch)], new_tokens, tick) for _ in range(repeats)]
    return Speed(tuple(runs))


def _prompts(engine: Engine, n_tokens: int) -> Iterator[list[int]]:
    """Random ids, the same ones each time; none is special, so there is no blank and no start of an answer."""
    special = set(engine.special_ids.values())
    ids = [i for i in range(engine.vocab_size) if i not in special]
    rng = random.Random(0)
    while True:
        yield rng.choices(ids, k=n_tokens)


def _run(engine: Engine, prompts: list[list[int]], new_tokens: int, tick: Callable[[int], object]) -> Run:
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0)
    start = time.perf_counter()
    waiting = {engine.add_request(prompt, params) for prompt in prompts}
    firsts: dict[int, float] = {}
    n_decoded, end = 0, 0.0  # tokens of passes in which every request drew one, and when the last such pass ended
    while waiting:
        steps = engine.step()
        now = time.perf_counter()
        all_run = len(firsts) == len(prompts) == len(waiting)
        for step in steps:
            if step.error is not None:
                raise step.error
            firsts.setdefault(step.request_id, now)
            if step.finish_reason is not None:
                waiting.discard(step.request_id)
        if all_run:
            n_decoded, end = n_decoded + len(steps), now
        tick(len(steps))
    if not n_decoded:
        raise ValueError(
            f"{new_tokens} new tokens are over before the last of {len(prompts)} prompts is read: ask for more"
        )
    filled = max(firsts.values())
    delays = [first - start for first in firsts.values()]
    return Run(sum(map(len, prompts)) / (filled - start), n_decoded / (end - filled), statistics.median(delays))


# ---------------------------------------------------------------- the limit


def bytes_per_pass(engine: Engine) -> int:
    """Bytes of weights that a pass of few tokens reads: all but the embedding's table, of which it takes some rows."""
    total = weight_bytes(engine.model)
    if engine.config.tie_embeddings:
        return total
    table = engine.model.embed
    if isinstance(table, PackedEmbedding):
        parts = [table.matrix.data, table.matrix.scale, table.matrix.minimum]
    else:
        parts = [*table.parameters(), *table.buffers()]
    return total - sum(t.nbytes for t in parts if t is not None)


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second that PyTorch's threads read from memory: the better of adding up and of a product, best of 5."""
    place, n_bytes = torch.device(device), BANDWIDTH_BYTES
    data = torch.empty(n_bytes, dtype=torch.uint8, device=place)
    numbers = data.view(torch.int64).zero_()
    matrix, vector = data.view(torch.float32).view(-1, COLUMNS), torch.ones(COLUMNS, device=place)
    best = 0.0
    for read in (lambda: numbers.sum(), lambda: (matrix @ vector)[0]):
        for _ in range(6):  # the first one warms up
            start = time.perf_counter()
            read().item()  # waits for a GPU
            best = max(best, n_bytes / (time.perf_counter() - start))
    return best
