"""Objectives: what is minimised, and where its rows come from. The Trainer knows nothing else about a stage.

    from openglm.train.objectives import OBJECTIVES
    entry = OBJECTIVES["infill"]
    data = entry.parse_data(run["data"])                      # frozen dataclass; unknown keys are errors
    stream = entry.build_stream(data, model.config, tokenizer, row_len=512, seed=0, split="train")
    objective = entry.build_objective()
    rows = stream.next_rows(batch_size=4)                     # numpy Rows
    result = objective.loss(model, TensorRows.from_rows(rows, device))
    (result.loss / normaliser_over_all_micro_batches).backward()

`loss` is a SUM of weighted token losses and `normaliser` the sum of the weights, so that the gradient of several
micro-batches divided by their common normaliser equals the gradient of the one big batch.
"""

from __future__ import annotations

from openglm.train.objectives.base import (
    Objective,
    ObjectiveEntry,
    ObjectiveLoss,
    TensorRows,
    normaliser,
    parse_data,
)
from openglm.train.objectives.registry import OBJECTIVES, get_objective

__all__ = [
    "OBJECTIVES",
    "Objective",
    "ObjectiveEntry",
    "ObjectiveLoss",
    "TensorRows",
    "get_objective",
    "normaliser",
    "parse_data",
]
