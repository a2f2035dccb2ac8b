"""What keeps a run from exploding: embedding-gradient shrink, dynamic loss scale, and refusal of bad steps.

GLM-130B's lessons (paper, section 3.3): spikes of the gradient norm lead a loss explosion by a few steps, they come
from the embedding, and shrinking its gradient by alpha tames them. A step that is not finite or far off the running
median is skipped and logged; the data cursor moves on, so the batch that caused it is not met again.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openglm.train.config import SpikeConfig

__all__ = ["LossScaler", "SpikeGuard", "shrink_embedding_gradient", "shrink_gradient"]


def shrink_gradient(x: Tensor, alpha: float) -> Tensor:
    """x, with its gradient times alpha: alpha * x + (1 - alpha) * stop_gradient(x).

    Written so that the value is x bit for bit, which the paper's form misses by a rounding.
    """
    fixed = x.detach()
    return fixed + alpha * (x - fixed)


def shrink_embedding_gradient(embedding: nn.Module, alpha: float) -> RemovableHandle:
    """Hook `shrink_gradient` onto the output of an embedding; a tied head's gradient stays whole, as in GLM-130B."""
    return embedding.register_forward_hook(lambda _module, _inputs, output: shrink_gradient(output, alpha))


@dataclass
class LossScaler:
    """Dynamic loss scale of fp16, with the constants of GLM-130B's run.

    Doubles after `window` good steps; halves once `hysteresis` overflows came without a whole window between them.
    """

    scale: float = 65536.0
    window: int = 2000
    hysteresis: int = 2
    min_scale: float = 1.0
    good_steps: int = 0
    credit: int = 2

    def update(self, overflow: bool) -> None:
        """Adjust after a step; `overflow`: its unscaled gradients were not finite."""
        if overflow:
            self.good_steps = 0
            self.credit = max(0, self.credit - 1)
            if self.credit == 0:
                self.scale = max(self.min_scale, self.scale / 2)
            return
        self.good_steps += 1
        if self.good_steps % self.window == 0:
            self.scale *= 2
            self.credit = self.hysteresis

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps, "credit": self.credit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.good_steps, self.credit = float(state["scale"]), int(state["good_steps"]), int(state["credit"])


class SpikeGuard:
    """Judges each step by its loss and gradient norm against the running medians.

    Medians run over all finite values, skipped ones included: one outlier moves a median by nothing, and when the
    level truly changes, the guard accepts it after half a window instead of skipping for ever.
    """

    MIN_HISTORY = 16  # steps before spikes are judged: the first ones fall steeply
    MAX_NOT_FINITE = 50  # consecutive steps after which the run is over

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.not_finite = 0

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Reason to skip the step, or None. Raises ValueError when nothing has been finite for 50 steps in a row."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.not_finite += 1
            if self.not_finite >= self.MAX_NOT_FINITE:
                raise ValueError(
                    f"loss or gradient was not finite for {self.not_finite} steps in a row: lower optimizer.lr, "
                    "shrink embedding_grad_shrink, or use precision bf16 or fp32, and resume from an earlier checkpoint"
                )
            return "loss is not finite" if not math.isfinite(loss) else "gradient is not finite"
        self.not_finite = 0
        reason = self._spike("gradient norm", grad_norm, self.norms, self.config.grad_factor)
        reason = reason or self._spike("loss", loss, self.losses, self.config.loss_factor)
        self.losses.append(loss)
        self.norms.append(grad_norm)
        return reason

    def _spike(self, name: str, value: float, history: deque[float], factor: float) -> str | None:
        if factor <= 0 or len(history) < self.MIN_HISTORY:
            return None
        median = statistics.median(history)
        return (
            f"{name} {value:.4g} is over {factor:g} times its median {median:.4g}" if value > factor * median else None
        )

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "norms": list(self.norms), "not_finite": self.not_finite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=self.config.window)
        self.norms = deque(state["norms"], maxlen=self.config.window)
        self.not_finite = int(state["not_finite"])
