"""The engine: token ids in, token ids out. `Engine` runs one model, `fill_blanks` and `score` build on it."""

from __future__ import annotations

from openglm.engine.beam import Beam, BeamSearch
from openglm.engine.engine import Engine
from openglm.engine.fill import FilledBlank, fill_blanks
from openglm.engine.options import EngineOptions
from openglm.engine.request import NO_TOKEN, Completion, FinishReason, Step
from openglm.engine.runner import Chunk, ModelRunner, TorchRunner
from openglm.engine.score import Score, score, sliding_windows
from openglm.engine.speculate import DraftProposer, NgramProposer
from openglm.engine.stream import TokenStream

__all__ = [
    "NO_TOKEN", "Beam", "BeamSearch", "Chunk", "Completion", "DraftProposer", "Engine", "EngineOptions", "FilledBlank",
    "FinishReason", "ModelRunner", "NgramProposer", "Score", "Step", "TokenStream", "TorchRunner", "fill_blanks",
    "score", "sliding_windows",
]  # fmt: skip
