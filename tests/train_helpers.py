"""A tiny run without text: synthetic rows, a plain objective and a Trainer on them, for the tests of train/."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from openglm.config import GLMConfig
from openglm.data.example import KINDS, Rows
from openglm.model.checkpoint import CheckpointMeta
from openglm.model.init import init_weights
from openglm.model.transformer import Transformer
from openglm.ops.loss import linear_cross_entropy
from openglm.train.config import TrainConfig, load_config
from openglm.train.objectives import ObjectiveLoss, TensorRows
from openglm.train.state import CheckpointStore
from openglm.train.trainer import Sampler, Trainer

SHAPE = GLMConfig(
    vocab_size=61, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48, max_seq_len=64,
    tie_embeddings=True,
)  # fmt: skip


class CountingStream:
    """Rows of a repeated pattern, a pure function of (seed, cursor); in every third, half the targets weigh 2."""

    def __init__(self, seed: int = 0, row_len: int = 24) -> None:
        self.seed, self.row_len, self.cursor = seed, row_len, 0

    def next_rows(self, batch_size: int) -> Rows:
        ids = np.empty((batch_size, self.row_len + 1), np.int64)
        weights = np.ones((batch_size, self.row_len), np.float32)
        for b in range(batch_size):
            rng = np.random.Generator(np.random.Philox(key=[self.seed, self.cursor]))
            start, stride = rng.integers(1, 50), rng.integers(1, 4)
            ids[b] = (start + stride * np.arange(self.row_len + 1)) % 61
            if self.cursor % 3 == 0:
                weights[b, : self.row_len // 2] = 2.0
            self.cursor += 1
        shape = (batch_size, self.row_len)
        positions = np.broadcast_to(np.arange(self.row_len, dtype=np.int64), (2, *shape)).copy()
        kinds = np.full(shape, KINDS.index("lm"), np.int8)
        segments, context = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        return Rows(ids[:, :-1].copy(), ids[:, 1:].copy(), positions, segments, context, kinds, weights)

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cursor = int(state["cursor"])


class PlainObjective:
    """Cross-entropy of the targets, one kind."""

    def loss(self, model: nn.Module, rows: TensorRows) -> ObjectiveLoss:
        hidden = model(rows.forward_batch(model.config)).flatten(0, 1)[rows.index]  # type: ignore[arg-type]
        weight = model.head_weight()
        total, losses = linear_cross_entropy(hidden, weight, rows.targets, rows.weights)
        metrics: dict[str, Any] = {"loss_sum/lm": losses.sum(), "count/lm": float(len(losses))}
        return ObjectiveLoss(total, rows.weights.sum(), metrics)


def tiny_config(run_dir: str | Path = "unused", **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "objective": "lm", "model": SHAPE.to_dict(), "run_dir": str(run_dir), "steps": 12, "row_len": 24,
        "micro_batch_rows": 4, "batch_rows": 8, "precision": "fp32", "threads": 1, "log_every": 100,
        "optimizer": {"lr": 3e-3}, "device": "cpu",
    } | changes  # fmt: skip
    return load_config(values)


def tiny_trainer(config: TrainConfig | None = None, sampler: Sampler | None = None, seed: int = 0) -> Trainer:
    """Trainer over CountingStream; its checkpoints go to config.run_dir."""
    config = config or tiny_config(tempfile.mkdtemp())
    model = init_weights(Transformer(SHAPE), seed, config.init)
    store = CheckpointStore(Path(config.run_dir) / "checkpoints", SHAPE, CheckpointMeta(), {}, config.keep_checkpoints)
    eval_stream = CountingStream(99) if config.eval_every else None
    return Trainer(
        config, model, PlainObjective(), CountingStream(), eval_stream, store, {"model": SHAPE.to_dict()}, sampler
    )
