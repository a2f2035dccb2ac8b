"""AWQ: columns that see large inputs are scaled up before rounding, and their inputs down, at no cost at run time.

    python -m pytest -q tests/test_quant_calibrated.py

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023. The factor on the
inputs goes into what makes them: the norm before qkv and up, the value rows of qkv before out, the up half of a gated
MLP before down. Where it cannot (a norm whose output is also the residual, a plain GELU) the matrix is only rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.quant.rounding import quantise
from openglm.quant.spec import QuantSpec

__all__ = ["Inputs", "fold", "scale_block", "sites"]

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # powers of the mean input tried, besides 0: no scaling
SEARCH_ROWS = 1024  # of a matrix, evenly chosen, that the search looks at
State = dict[str, Tensor]  # a block's tensors by their names below layers.N


@dataclass(frozen=True)
class Inputs:
    """What a matrix saw. mean: (columns,) of |x|. sample: (n, columns) of the inputs themselves."""

    mean: Tensor
    sample: Tensor


def sites(config: GLMConfig) -> dict[str, Callable[[State, Tensor], None]]:
    """Matrices that can be scaled, in order, and what divides their inputs by a factor (columns,)."""
    found: dict[str, Callable[[State, Tensor], None]] = {}
    if config.residual == "stream":
        found["attn.qkv.weight"] = lambda state, s: _divide_norm(state, "norm1", s)
        found["mlp.up.weight"] = lambda state, s: _divide_norm(state, "norm2", s)
    n_values = config.n_kv_heads * config.head_dim
    found["attn.out.weight"] = lambda state, s: _divide_rows(state, "attn.qkv", n_values, _by_value(s, config))
    if config.mlp != "gelu":
        found["mlp.down.weight"] = lambda state, s: _divide_rows(state, "mlp.up", config.ffn_dim, s)
    return found


def fold(state: State, config: GLMConfig, name: str, factor: Tensor) -> None:
    """Scale the columns of a matrix by `factor` and its inputs by the inverse: the block computes the same as before.

    Raises KeyError for a matrix that cannot be scaled. factor: (columns,), equal for all heads that share a value.
    """
    sites(config)[name](state, factor)
    state[name] = state[name] * factor


def scale_block(state: State, config: GLMConfig, inputs: Mapping[str, Inputs], spec: QuantSpec) -> dict[str, float]:
    """Scale every matrix of a block that gains by it, in place. Returns the power of the mean input chosen for each."""
    chosen = {}
    for name in sites(config):
        seen = inputs[name]
        mean = _shared(seen.mean, config) if name == "attn.out.weight" else seen.mean
        alpha, factor = _search(state[name], mean, seen.sample, spec)
        chosen[name] = alpha
        if alpha:
            fold(state, config, name, _storable(state, name, factor, config))
    return chosen


def _search(weight: Tensor, mean: Tensor, sample: Tensor, spec: QuantSpec) -> tuple[float, Tensor]:
    """The power with the least error of the output."""
    rows = weight[:: max(1, -(-weight.shape[0] // SEARCH_ROWS))]
    ones = torch.ones_like(mean)
    best = (_loss(rows, ones, sample, spec), 0.0, ones)
    for alpha in ALPHAS:
        factor = mean.clamp(min=1e-4 * float(mean.mean()) + 1e-12) ** alpha
        factor = factor / (factor.max() * factor.min()).sqrt()
        loss = _loss(rows, factor, sample, spec)
        if loss < best[0]:
            best = (loss, alpha, factor)
    return best[1], best[2]


def _loss(weight: Tensor, factor: Tensor, sample: Tensor, spec: QuantSpec) -> float:
    error = quantise(weight * factor, spec).dequantise().div_(factor).sub_(weight)
    return float((sample @ error.t()).square_().mean())


# -------------------------------------------------------------------- where factors go


def _divide_norm(state: State, norm: str, factor: Tensor) -> None:
    for leaf in ("weight", "bias"):
        if f"{norm}.{leaf}" in state:
            state[f"{norm}.{leaf}"] = state[f"{norm}.{leaf}"] / factor


def _divide_rows(state: State, linear: str, n: int, factor: Tensor) -> None:
    """The last n rows of a matrix, and of its bias."""
    for leaf in ("weight", "bias"):
        if (tensor := state.get(f"{linear}.{leaf}")) is not None:
            tail = tensor[-n:] / (factor[:, None] if leaf == "weight" else factor)
            state[f"{linear}.{leaf}"] = torch.cat([tensor[:-n], tail])


def _shared(mean: Tensor, config: GLMConfig) -> Tensor:
    """Mean input of out, the same for all heads that share a value head."""
    heads = mean.view(config.n_kv_heads, -1, config.head_dim)
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def _by_value(factor: Tensor, config: GLMConfig) -> Tensor:
    """(H * head_dim,) equal within groups -> (G * head_dim,)."""
    return factor.view(config.n_kv_heads, -1, config.head_dim)[:, 0].reshape(-1)


def _storable(state: State, name: str, factor: Tensor, config: GLMConfig) -> Tensor:
    """For a norm: the nearest factor whose quotient float16 and bfloat16 hold exactly; 1 where the norm is 0."""
    norm = {"attn.qkv.weight": "norm1", "mlp.up.weight": "norm2"}.get(name)
    if norm is None:
        return factor
    weight = state[f"{norm}.weight"]
    quotient = (weight / factor).bfloat16().float()
    return torch.where(quotient == 0, torch.ones_like(factor), weight / quotient)
