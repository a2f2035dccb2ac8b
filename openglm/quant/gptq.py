"""GPTQ: round a matrix column by column, each column's error made up for by the columns that are still to come.

    python -m pytest -q tests/test_gptq.py

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022: with
H = X^T X of the layer's inputs, the update that keeps the output is read off the Cholesky factor of H's inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openglm.ops.quant import QuantTensor, pack_int4
from openglm.quant.rounding import NOT_FINITE, fit, integers
from openglm.quant.spec import QuantSpec

__all__ = ["gptq"]

BLOCK = 128  # columns updated at once behind the ones being rounded
LEAST = 1e-4  # importance of a column that sees next to nothing
DAMPING = 0.01  # of H's mean diagonal, added to it


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    act_order: bool = True,
    n_inputs: int | None = None,
    refit: bool = True,
) -> QuantTensor:
    """Round (rows, columns) to the form of `spec`, least error of weight @ X^T.

    hessian: (columns, columns) float32, the sum of x^T x over inputs x. n_inputs: how many; with few of them, what
    columns seem to have in common is chance in part, and counts for less (see `shrinkage`). act_order: columns with
    the largest inputs first, on grids that are fitted to the weights beforehand; else from left to right, each group's
    grid fitted when its turn comes. A search for a grid weighs the columns by the inputs they see. Columns that see
    none are rounded to nearest. refit: grids move afterwards to where they serve the integers best. Raises ValueError
    for what is not finite.
    """
    rows, columns = weight.shape
    group = spec.group or columns
    w = weight.float().t().contiguous()  # (columns, rows): one column lies together
    seen = hessian.diagonal()
    if not bool(seen.isfinite().all()):
        raise ValueError("its inputs are not finite: --method mse rounds without running the model")
    order = seen.argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    factor = _factor(hessian.float(), order, shrinkage(columns, n_inputs))
    importance = _importance(seen).view(-1, group, 1)
    grouped = w.view(-1, group, rows).transpose(0, 1)
    scale, minimum = fit(grouped.reshape(group, -1), spec, importance.transpose(0, 1).expand_as(grouped).flatten(1))
    if not all(bool(s.isfinite().all()) for s in (scale, minimum) if s is not None):
        raise ValueError(NOT_FINITE)
    scale, minimum = scale.view(-1, rows), None if minimum is None else minimum.view(-1, rows)
    original, w, q = w, w[order], torch.empty_like(w)
    for first in range(0, columns, BLOCK):
        stop = min(first + BLOCK, columns)
        block, errors = w[first:stop], torch.empty(stop - first, rows)
        for i in range(stop - first):
            j = int(order[first + i])
            g = j // group
            if not act_order and j % group == 0:  # the group's columns as they are by now
                now = torch.cat([block[i:], w[stop : first + i + group]])[:group]
                if stop < first + i + group:  # what lies behind this block waits for the block's errors
                    now[stop - first - i :] -= factor[first : first + i, stop : first + i + group].t() @ errors[:i]
                scale[g], found = fit(now, spec, importance[g].expand_as(now))
                if minimum is not None and found is not None:
                    minimum[g] = found
            low = None if minimum is None else minimum[g]
            q[j] = integers(block[i : i + 1], scale[g], low, spec)[0]
            error = block[i] - _values(q[j], scale[g], low, spec)
            if seen[j] == 0:
                q[j] = integers(original[j : j + 1], scale[g], low, spec)[0]
                error.zero_()
            errors[i] = error / factor[first + i, first + i]
            block[i + 1 :].addr_(factor[first + i, first + i + 1 : stop], errors[i], alpha=-1)
        w[stop:].addmm_(factor[first:stop, stop:].t(), errors, alpha=-1)
    if refit:
        _refit(original, q, scale, minimum, hessian, shrinkage(columns, n_inputs), spec)
    q, scale = q.t().contiguous(), scale.t().contiguous()
    if spec.bits == 8:
        return QuantTensor(q.to(torch.int8), scale)
    return QuantTensor(pack_int4(q), scale, None if minimum is None else minimum.t().contiguous())


def _refit(
    w: Tensor, q: Tensor, scale: Tensor, minimum: Tensor | None, hessian: Tensor, shrinkage: float, spec: QuantSpec
) -> None:
    """Change scale and minimum, in place, to the least error of the outputs that these integers can have.

    w, q: (columns, rows). scale, minimum: (groups, rows) float16. Group after group, all others as they are by then: in
    each row one linear equation, or two with a minimum.
    """
    group = spec.group or len(w)
    parts = [slice(first, first + group) for first in range(0, len(w), group)]
    steps = q if spec.bits == 8 or minimum is not None else q - 8
    low = [None] * len(parts) if minimum is None else minimum
    error = w - torch.cat([_values(q[part], scale[g], low[g], spec) for g, part in enumerate(parts)])
    own = shrinkage * hessian.diagonal() + DAMPING * hessian.diagonal().mean()  # beside what H is taken for
    for g, part in enumerate(parts):
        n, h = steps[part], hessian[part, part] * (1.0 - shrinkage)
        h.diagonal().add_(own[part])
        pull = (1.0 - shrinkage) * (hessian[part] @ error) + own[part, None] * error[part]
        weighed = h @ n
        squares, along = (n * weighed).sum(0), (n * pull).sum(0)
        if minimum is None:
            step = along / squares.clamp(min=1e-30)
        else:
            mixed, ones, level = weighed.sum(0), h.sum(), pull.sum(0)
            room = squares * ones - mixed * mixed
            sound = room > 1e-6 * squares * ones  # else the integers are all the same: one unknown too many
            step = torch.where(sound, (ones * along - mixed * level) / room, 0.0)
            rise = torch.where(sound, (squares * level - mixed * along) / room, 0.0)
            error[part] -= _moved(minimum[g], rise)
        error[part] -= n * _moved(scale[g], step)


def _moved(values: Tensor, by: Tensor) -> Tensor:
    """Change float16 values in place; returns by how much they did."""
    before = values.float()
    values.copy_(before + by)
    return values.float() - before


def _values(q: Tensor, scale: Tensor, minimum: Tensor | None, spec: QuantSpec) -> Tensor:
    """What stored integers stand for."""
    if minimum is not None:
        return torch.addcmul(minimum.float(), q, scale.float())
    return (q if spec.bits == 8 else q - 8) * scale.float()


def _importance(seen: Tensor) -> Tensor:
    """(columns,) mean square of each column's inputs in units of the mean of all, but no less than LEAST."""
    mean = seen.mean()
    return (seen / mean).clamp(min=LEAST) if mean > 0 else torch.ones_like(seen)


def shrinkage(columns: int, n_inputs: int | None) -> float:
    """By how much what lies beside H's diagonal is taken smaller: tokens of one text are alike, and two count as one.

    Of 0.2, 0.5 and 0.8 the one nearest to this gave the least error on other text, or next to it, in the matrices of
    two blocks of a Qwen2.5 of 1.5B parameters, at 8,192 and 16,384 tokens. Without it, a matrix of 8,960 columns was
    worse there than rounded to nearest.
    """
    return 0.0 if n_inputs is None else columns / (columns + n_inputs / 2)


def _factor(hessian: Tensor, order: Tensor, shrinkage: float) -> Tensor:
    """Upper Cholesky factor of the inverse of H, its rows and columns in `order`; damped until there is one.

    Holds two matrices of H's size beside it, as H is the largest of a wide layer's conversion.
    """
    mean = float(hessian.diagonal().mean()) or 1.0
    damping = DAMPING * mean
    while True:
        h = hessian[order][:, order].mul_(1.0 - shrinkage)
        h.diagonal().copy_(hessian.diagonal()[order])
        h.diagonal()[h.diagonal() == 0] = mean
        h.diagonal().add_(damping)
        h, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            h = torch.cholesky_inverse(h)
            h, failed = torch.linalg.cholesky_ex(h, upper=True)
            if not failed:
                return h
        damping *= 10
