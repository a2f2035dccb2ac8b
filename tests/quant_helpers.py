"""Inputs, tiny models and their output error, for tests of calibrated quantisation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.loading import Reference, open_reference
from openglm.model.batch import ForwardBatch
from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
from openglm.model.init import init_weights
from openglm.model.load import build_transformer
from openglm.model.transformer import Transformer
from openglm.tokenizer import Tokenizer

GQA = GLMConfig(vocab_size=640, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64, max_seq_len=128)
LAYER_NORM = replace(GQA, norm="layer", mlp="geglu", linear_bias=True)
NORMED = replace(LAYER_NORM, residual="normed", residual_alpha=2.0, n_kv_heads=4, mlp="gelu", mask="prefix")
TEXT = "The quick brown fox jumps over the lazy dog. 北京是中华人民共和国的首都。 In 1998 there were 42 people. " * 60


def inputs(n: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated, some columns much larger."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, columns, generator=g) @ torch.randn(columns, columns, generator=g) / columns**0.5
    return mixed * torch.logspace(-1, 0.7, columns)[torch.randperm(columns, generator=g)]


def checkpoint(folder: Path, config: GLMConfig, tokenizer: Tokenizer, shared: float = 0.0) -> Reference:
    """Random weights whose channels differ in size, as trained ones do. shared: what all embeddings have in common."""
    model = init_weights(Transformer(config), seed=3, std=0.2)
    with torch.no_grad():
        model.embed.weight += shared * torch.linspace(-1, 1, config.dim)
        for block in model.layers:
            for norm in (block.norm1, block.norm2):
                norm.weight.copy_(torch.logspace(-1.5, 0.5, config.dim))
    meta = CheckpointMeta(special_ids=tokenizer.special_ids, tokenizer=tokenizer.kind)
    save_checkpoint(folder, model, config, meta, tokenizer.files)
    return open_reference(folder)


def output_error(source: Reference, converted: Path, ids: Tensor) -> float:
    """Of the hidden states, relative."""
    positions = torch.arange(ids.shape[1]).expand(1, *ids.shape)
    a, b = (
        build_transformer(r.opened, dtype=torch.float32)(ForwardBatch(ids, positions))
        for r in (source, open_reference(converted))
    )
    return float((a - b).norm() / a.norm())
