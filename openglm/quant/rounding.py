"""Rounding without data: the scale and minimum of each group, from its range or by the least squared error.

    python -m pytest -q tests/test_quant.py

"mse" tries ranges a little narrower and wider than the values' own, refits scale and minimum to the integers of each
by least squares (closed form), goes on from the best by rounding and refitting in turn, and keeps what plain rounding
gives where that is better: a group that was on such a grid before comes back exactly. What is known of the inputs can
weigh the columns' errors.
Groups lie side by side, (columns of a group, groups), so that every step runs over long rows of memory.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from openglm.ops.quant import QuantTensor, pack_int4
from openglm.quant.spec import QuantSpec

__all__ = ["fit", "integers", "quantise"]

BLOCK_ELEMENTS = 1 << 18  # weights at a time for each core: three such blocks in float32 stay in its share of cache
STEPS = (13.0, 14.0, 15.0, 15.5, 16.0, 16.5, 17.0, 18.0)  # steps in the range of the values; 15 is the whole range
SHIFTS = (0.0, 0.5, 1.0)  # whether what exceeds the 15 steps is cut below, on both sides or above
SHRINK = (0.8, 0.84, 0.88, 0.92, 0.96, 1.0, 1.04, 1.08)  # of the largest magnitude, symmetric
REFITS = 3
NOT_FINITE = "a weight is not finite, or beyond float16's range: it cannot be quantised"
TINY = torch.finfo(torch.float16).tiny


def quantise(weight: Tensor, spec: QuantSpec) -> QuantTensor:
    """Round (rows, columns) to the form of `spec`, a block of rows at a time; scales and minimums are float16.

    "absmax", symmetric: scale = max |w| / (2^(bits-1) - 1), as GLM-130B (paper, section 2.4); else scale = (max - min)
    / 15. Other methods: "mse". Half goes to even. Raises ValueError for a weight that is not finite.
    """
    rows, columns = weight.shape
    step = max(1, BLOCK_ELEMENTS // columns)
    parts = weight.split(step)
    if len(parts) == 1:
        found = [_block(weight, spec)]
    else:
        n_threads = torch.get_num_threads()
        try:
            workers = min(n_threads, os.cpu_count() or 1)
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                found = list(pool.map(lambda part: _block(part, spec), parts))
        finally:
            torch.set_num_threads(n_threads)
    scales = [s for f in found for s in (f.scale, f.minimum) if s is not None]
    if not all(bool(s.isfinite().all()) for s in scales):
        raise ValueError(NOT_FINITE)
    return QuantTensor.cat(found)


@torch.no_grad()
def _block(weight: Tensor, spec: QuantSpec) -> QuantTensor:
    rows, columns = weight.shape
    groups = weight.float().view(-1, spec.group or columns).t().contiguous()
    scale, minimum = fit(groups, spec)
    half = weight.dtype == torch.float16 and spec.group is None and not spec.searched
    q = integers(groups, scale, minimum, spec, half).t().reshape(rows, columns)
    scale = scale.view(rows, -1)
    if spec.bits == 8:
        return QuantTensor(q.to(torch.int8), scale)
    return QuantTensor(pack_int4(q), scale, None if minimum is None else minimum.view(rows, -1))


def fit(groups: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(scale, minimum or None), float16 (n,), of float32 groups (columns of a group, n).

    importance: like groups, positive: what a weight's squared error counts in the search.
    """
    scale, minimum = _range(groups, spec)
    if not spec.searched:
        return scale, minimum
    error = _squared_error(groups, scale, minimum, spec, importance)
    best, low = _search_symmetric(groups, spec, importance), None
    if minimum is not None:
        best, low = _search(groups, importance)
    better = _squared_error(groups, best, low, spec, importance) < error
    scale = torch.where(better, best, scale)
    return scale, None if minimum is None or low is None else torch.where(better, low, minimum)


def integers(
    groups: Tensor, scale: Tensor, minimum: Tensor | None, spec: QuantSpec, half: bool = False
) -> Tensor:
    """The nearest integers as they are stored, in float32: 0 to 15, or -128 to 127 for INT8.

    half: divide in half precision, as GLM-130B's tool does: one weight in fifty differs by one.
    """
    step = scale.float()
    step = torch.where(step.abs() < TINY, TINY, step)
    if minimum is not None:
        return ((groups - minimum.float()) / step).round_().clamp_(0, 15)
    q = groups / step
    q = (q.half().float() if half else q).round_()
    return q.clamp_(-128, 127) if spec.bits == 8 else q.clamp_(-8, 7).add_(8)


def _range(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    if spec.symmetric:
        return (groups.abs().amax(0) / (127 if spec.bits == 8 else 7)).half(), None
    minimum = groups.amin(0).half()
    return ((groups.amax(0) - minimum.float()) / 15).half(), minimum


def _squared_error(
    groups: Tensor, scale: Tensor, minimum: Tensor | None, spec: QuantSpec, importance: Tensor | None
) -> Tensor:
    """(n,) of the stored form."""
    q = integers(groups, scale, minimum, spec)
    if minimum is not None:
        q.mul_(scale.float()).add_(minimum.float())
    else:
        q.sub_(0 if spec.bits == 8 else 8).mul_(scale.float())
    q.sub_(groups).square_()
    return (q if importance is None else q.mul_(importance)).sum(0)


class _Best:
    """Of several fits y = a q + b to the same values, the one that explains most of each group; buffers for them."""

    def __init__(self, values: Tensor, offset: bool, importance: Tensor | None) -> None:
        self.values, self.offset = values, offset
        self.q, self.product = torch.empty_like(values), torch.empty_like(values)
        columns, n = values.shape
        self.gain, self.a, self.b = torch.full((n,), -1.0), torch.ones(n), torch.zeros(n)
        self.importance, self.weighted = None, self.q
        self.mean = values.mean(0)
        if importance is not None:  # its mean is one, so that every sum below has the size it has without
            self.importance, self.weighted = importance / importance.mean(0), torch.empty_like(values)
            self.mean = torch.mul(values, self.importance, out=self.product).sum(0) / columns

    def offer(self) -> None:
        """Take the integers in `q`, refit by least squares, keep where better. `q` is overwritten."""
        n = self.values.shape[0]
        if self.importance is not None:
            torch.mul(self.q, self.importance, out=self.weighted)
        sum_qy = torch.mul(self.weighted, self.values, out=self.product).sum(0)
        sum_q = self.weighted.sum(0) if self.offset else None
        spread = self.weighted.mul_(self.q).sum(0)
        if sum_q is not None:
            sum_qy -= sum_q * self.mean
            spread -= sum_q.square() / n
        a = sum_qy / spread.clamp(min=1e-6)
        gain = a * sum_qy
        better = gain > self.gain
        self.gain = torch.where(better, gain, self.gain)
        self.a = torch.where(better, a, self.a)
        if sum_q is not None:
            self.b = torch.where(better, self.mean - a * sum_q / n, self.b)


def _search(groups: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and minimum, in units of the group's range while searching."""
    low = groups.amin(0)
    span = (groups.amax(0) - low).clamp_(min=1e-20)
    best = _Best((groups - low).div_(span), True, importance)
    for steps in STEPS:
        for shift in SHIFTS if steps != 15 else SHIFTS[:1]:
            torch.mul(best.values, steps, out=best.q).sub_(shift * (steps - 15)).round_().clamp_(0, 15)
            best.offer()
    for _ in range(REFITS):
        step = torch.where(best.a.abs() < 1e-6, 1e-6, best.a)
        torch.sub(best.values, best.b, out=best.q).div_(step).round_().clamp_(0, 15)
        best.offer()
    return (best.a * span).half(), (best.b * span + low).half()


def _search_symmetric(groups: Tensor, spec: QuantSpec, importance: Tensor | None) -> Tensor:
    """Scale, which may be negative: INT4 reaches one step further on one side."""
    top = 127 if spec.bits == 8 else 7
    low, high = groups.amin(0), groups.amax(0)
    largest = torch.where(-low > high, low, high)
    largest = torch.where(largest == 0, 1e-20, largest)
    best = _Best(groups / largest, False, importance)
    for share in SHRINK:
        for side in (-(top + 1), top) if spec.bits == 4 else (top,):
            torch.mul(best.values, side / share, out=best.q).round_().clamp_(-top - 1, top)
            best.offer()
    for _ in range(REFITS):
        step = torch.where(best.a.abs() < 1e-6, 1e-6, best.a)
        torch.div(best.values, step, out=best.q).round_().clamp_(-top - 1, top)
        best.offer()
    return (best.a * largest).half()
