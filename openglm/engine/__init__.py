"""The engine: token ids in, token ids out. `Engine` runs one model, `fill_blanks` and `score` build on it."""

from __future__ import annotations

from openglm.engine.beam import Beam, BeamSearch
from openglm.engine.engine import Completion, Engine, FinishReason, Step
from openglm.engine.fill import FilledBlank, fill_blanks
from openglm.engine.score import Score, score, sliding_windows

__all__ = [
    "Beam", "BeamSearch", "Completion", "Engine", "FilledBlank", "FinishReason", "Score", "Step", "fill_blanks",
    "score", "sliding_windows",
]  # fmt: skip
