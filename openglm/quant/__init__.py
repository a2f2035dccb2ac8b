"""Quantisation: what a matrix is stored as, and how it gets there."""

from __future__ import annotations

from openglm.quant.rounding import quantise
from openglm.quant.spec import QuantSpec

__all__ = ["QuantSpec", "quantise"]
