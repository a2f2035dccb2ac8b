"""What the first block's attention sees is known without text: the rows of the embedding table, normalised.

    python -m pytest -q tests/test_quant.py

Its value rows are the most sensitive of a model: each token's error there goes into every block above. These inputs
share a strong mean, so that errors that are small weight by weight add up; GPTQ with their second moment prevents it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openglm.model.opened import OpenedModel
from openglm.model.transformer import make_norm
from openglm.ops.quant import floats

__all__ = ["FIRST_QKV", "second_moment"]

FIRST_QKV = "layers.0.attn.qkv.weight"
MAX_ROWS = 32768  # of the table, evenly spread
BLOCK_ROWS = 4096


@torch.inference_mode()
def second_moment(opened: OpenedModel) -> Tensor | None:
    """(dim, dim) float32: the sum of x^T x over inputs x of the first block's qkv, every token counted once.

    None where positions are learned: they are added to the embedding.
    """
    if opened.config.positions == "learned":
        return None
    table, norm = opened.get("embed.weight"), make_norm(opened.config)
    norm.load_state_dict({leaf: floats(opened.get(f"layers.0.norm1.{leaf}")).float() for leaf in norm.state_dict()})
    rows = torch.arange(0, table.shape[0], -(-table.shape[0] // MAX_ROWS))
    total = torch.zeros(opened.config.dim, opened.config.dim)
    for some in rows.split(BLOCK_ROWS):
        part = table[some] if isinstance(table, Tensor) else table.take_rows(some).dequantise()
        x = norm(part.float())
        total.addmm_(x.t(), x)
    return total
