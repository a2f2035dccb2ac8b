"""Conversion between checkpoint formats."""

from __future__ import annotations

from openglm.convert.convert import FORMATS, Converted, convert

__all__ = ["FORMATS", "Converted", "convert"]
