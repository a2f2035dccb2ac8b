"""The objectives by the name that a run config gives in `objective:`."""

from __future__ import annotations

from openglm.config import nearest
from openglm.train.objectives import infill, lm, sft
from openglm.train.objectives.base import ObjectiveEntry
from openglm.train.objectives.tokens import TokenLoss

__all__ = ["OBJECTIVES", "get_objective"]

OBJECTIVES: dict[str, ObjectiveEntry] = {
    "infill": ObjectiveEntry(infill.InfillData, infill.build_stream, TokenLoss),
    "lm": ObjectiveEntry(lm.LMData, lm.build_stream, TokenLoss),
    "sft": ObjectiveEntry(sft.SFTData, sft.build_stream, TokenLoss),
}


def get_objective(name: str) -> ObjectiveEntry:
    """Entry of that name; ValueError lists the known ones."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}{nearest(name, list(OBJECTIVES))}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
