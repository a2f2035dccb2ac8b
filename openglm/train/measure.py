"""How fast training is on this machine: steps of the real Trainer, timed, with nothing written to disk.

python -m openglm bench train glm-nano row_len=256
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openglm.data.example import Rows, causal_example, collate
from openglm.model.checkpoint import CheckpointMeta
from openglm.model.cost import n_parameters
from openglm.train.config import TrainConfig, model_config
from openglm.train.memory import keep_freed_memory
from openglm.train.objectives import OBJECTIVES
from openglm.train.progress import matmul_peak
from openglm.train.run import build, check_plan, device_of, initial_model, with_precision
from openglm.train.state import CheckpointStore
from openglm.train.trainer import Trainer

__all__ = ["RandomRows", "build_random", "build_run", "measure_training"]

WARM_UP_STEPS = 2


class RandomRows:
    """A RowStream of random tokens, each row full: no data and no tokenizer."""

    def __init__(self, vocab_size: int, row_len: int, seed: int = 0) -> None:
        self.vocab_size, self.row_len, self.seed, self.n_drawn = vocab_size, row_len, seed, 0

    def next_rows(self, batch_size: int) -> Rows:
        rng = np.random.default_rng((self.seed, self.n_drawn))
        self.n_drawn += 1
        rows = rng.integers(self.vocab_size, size=(batch_size, self.row_len + 1), dtype=np.int64)
        return collate([[causal_example(row)] for row in rows], self.row_len, pad_id=0)

    def state_dict(self) -> dict[str, Any]:
        return {"n_drawn": self.n_drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.n_drawn = int(state["n_drawn"])


def build_run(config: TrainConfig) -> Trainer:
    """The trainer of a run, with its data, that evaluates, samples and saves nothing on the way."""
    return build(dataclasses.replace(config, eval_every=0, sample_every=0, checkpoint_every=0))


def build_random(config: TrainConfig) -> Trainer:
    """A trainer of the config's shape on random tokens. Raises ValueError where memory or context do not hold it."""
    config = dataclasses.replace(with_precision(config), eval_every=0, sample_every=0, checkpoint_every=0)
    assert config.model is not None
    shape = model_config(config.model)
    if config.row_len > shape.max_seq_len:
        raise ValueError(f"row_len ({config.row_len}) is over the model's max_seq_len ({shape.max_seq_len})")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    keep_freed_memory()
    objective = OBJECTIVES[config.objective].build_objective(chunk=config.loss_chunk or None)
    stream = RandomRows(shape.vocab_size, config.row_len, config.seed)
    device = device_of(config)
    check_plan(config, shape, objective, stream, device)
    model = initial_model(config, shape, device)
    store = CheckpointStore(Path(config.run_dir), shape, CheckpointMeta(), {}, config.keep_checkpoints)
    return Trainer(config, model, objective, stream, None, store, {})


def measure_training(trainer: Trainer, steps: int, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Figures of `steps` steps after a warm-up, medians over the steps. tick: called after each step, warm-up too.

    tokens_per_s; step_s; flop_s: operations of the model (forward and backward, nothing recomputed) per second;
    matmul_flop_s: of a large matrix product in the same precision; mfu: their ratio; loss: of the last step; skipped:
    steps whose update was not applied; steps, batch_tokens, parameters, precision, threads, device.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    config, device = trainer.config, trainer.device
    peak = matmul_peak(device.type, config.precision, torch.get_num_threads())
    seconds, flops, tokens, skipped = [], [], [], 0
    for number in range(-WARM_UP_STEPS, steps):
        start = time.perf_counter()
        result = trainer.train_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 0:
            seconds.append(time.perf_counter() - start)
            flops.append(trainer.flops(result) / seconds[-1])
            tokens.append(result.tokens)
            skipped += result.skipped is not None
        tick()
    assert trainer.last is not None
    flop_s = statistics.median(flops)
    return {
        "tokens_per_s": statistics.median(n / s for n, s in zip(tokens, seconds, strict=True)),
        "step_s": statistics.median(seconds), "flop_s": flop_s, "matmul_flop_s": peak, "mfu": flop_s / peak,
        "loss": trainer.last.loss, "skipped": skipped, "steps": steps, "batch_tokens": max(tokens),
        "parameters": n_parameters(trainer.model.config), "precision": config.precision,
        "threads": torch.get_num_threads(), "device": str(device),
    }  # fmt: skip
