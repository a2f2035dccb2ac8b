"""Rotary position embedding in one layout: dimension i turns with dimension i + r/2 of the r rotated ones.

Checkpoints that pair neighbours (ChatGLM2 and later) or rotate two halves separately (ChatGLM-6B) have the rows of
their query and key projections permuted when they are loaded, which leaves every score as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rope", "inverse_frequencies", "rope_angles"]


def inverse_frequencies(rotary_dim: int, theta: float, axes: int = 1, half_precision: bool = False) -> Tensor:
    """(rotary_dim / 2 / axes,) float32 rotations per token of each pair; the same for every axis.

    half_precision rounds them to float16, as the GLM-130B and ChatGLM-6B checkpoints store them.
    """
    n = rotary_dim // axes
    freq = 1.0 / theta ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
    return freq.half().float() if half_precision else freq


def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, 1, r/2) float32, from positions (axes, B, T); axes lie one after another."""
    angles = positions[..., None].float() * inv_freq  # (axes, B, T, r/2/axes)
    angles = torch.cat(tuple(angles), dim=-1)[:, :, None]
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
