"""Quality: what a conversion costs, measured on text."""

from __future__ import annotations

from openglm.quality.measure import Quality, TextQuality, compare_models, divergence
from openglm.quality.page import write_report

__all__ = ["Quality", "TextQuality", "compare_models", "divergence", "write_report"]
