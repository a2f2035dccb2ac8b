"""Learning rate and batch size as functions of the step: warm-up, cosine decay, batch-size warm-up. Pure Python."""

from __future__ import annotations

import math

from openglm.train.config import TrainConfig

__all__ = ["batch_rows", "lr_factor"]


def lr_factor(step: int, config: TrainConfig) -> float:
    """Factor on the peak learning rate at `step` (0-based).

    Linear from 1/warmup to 1 during warm-up, then half a cosine down to `min_lr_ratio` at the last step.
    """
    schedule, steps = config.schedule, config.steps
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = round(schedule.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def batch_rows(step: int, config: TrainConfig) -> int:
    """Rows of the batch at `step`: grows linearly, rounded down to whole micro-batches (at least one)."""
    warmup = config.batch_warmup
    if warmup is None or step >= warmup.steps:
        return config.batch_rows
    rows = warmup.start_rows + (config.batch_rows - warmup.start_rows) * step / warmup.steps
    micro = config.micro_batch_rows
    return max(micro, int(rows) // micro * micro)
