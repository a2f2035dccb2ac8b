"""Rotary position embedding in one layout: dimension i turns with dimension i + r/2 of the r rotated ones.

Checkpoints that pair neighbours (ChatGLM2 and later) or rotate two halves separately (ChatGLM-6B) have the rows of
their query and key projections permuted when they are loaded, which leaves every score as it was.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["apply_rope", "inverse_frequencies", "llama3_divisors", "rope_angles", "yarn"]


def inverse_frequencies(rotary_dim: int, theta: float, axes: int = 1, half_precision: bool = False) -> Tensor:
    """(rotary_dim / 2 / axes,) float32 rotations per token of each pair; the same for every axis.

    half_precision rounds them to float16, as the GLM-130B and ChatGLM-6B checkpoints store them.
    """
    n = rotary_dim // axes
    freq = 1.0 / theta ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
    return freq.half().float() if half_precision else freq


def yarn(inv_freq: Tensor, theta: float, factor: float, context: int) -> tuple[Tensor, float]:
    """Frequencies for a context `factor` times the `context` trained on, and the factor on cos and sin.

    YaRN (Peng et al. 2023, section 3.2) with its constants: pairs that turn more than 32 times in the context trained
    on keep their frequency, those that turn less than once are slowed by `factor`, a ramp lies between.
    """
    n = 2 * len(inv_freq)

    def pair_that_turns(times: float) -> float:
        return n * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_that_turns(32)), 0), min(math.ceil(pair_that_turns(1)), n - 1)
    ramp = ((torch.arange(n // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), 0.1 * math.log(factor) + 1.0


def llama3_divisors(inv_freq: Tensor, factor: float, context: int) -> Tensor:
    """What each frequency is divided by for a context `factor` times the `context` trained on, as in Llama 3.1.

    Its constants: pairs that turn more than 4 times in the context trained on keep their frequency, those that turn
    less than once are slowed by `factor`, and what is kept rises linearly with the turns between.
    """
    turns = context * inv_freq / (2 * math.pi)
    kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
    return 1 / (kept + (1 - kept) / factor)


def rope_angles(positions: Tensor, inv_freq: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin times `scale`, each (B, T, 1, r/2) float32, from positions (axes, B, T); axes one after another."""
    angles = positions[..., None].float() * inv_freq  # (axes, B, T, r/2/axes)
    angles = torch.cat(tuple(angles), dim=-1)[:, :, None]
    if scale != 1.0:
        return angles.cos() * scale, angles.sin() * scale
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] dimensions of x (B, T, H, D); the others pass. Keeps x's dtype."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    parts = [a * cos - b * sin, b * cos + a * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)
