"""Initialisation of a fresh model: the usual normal scheme, or DeepNorm's for models that use its residual."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from openglm.config import GLMConfig
from openglm.model.transformer import Transformer

__all__ = ["Scheme", "init_tensor", "init_weights"]

Scheme = Literal["standard", "deepnorm"]


@torch.no_grad()
def init_weights(model: Transformer, seed: int = 0, scheme: Scheme = "standard", std: float = 0.02) -> Transformer:
    """Fill every parameter in place, a pure function of seed and shapes; returns the model.

    standard: N(0, std), the two projections into the residual stream N(0, std / sqrt(2 * n_layers)) (GPT-2, GLM).
    deepnorm: Xavier normal; value, attention-output and both MLP matrices with gain (2 * n_layers) ** -0.5, as
    GLM-130B (paper, section 2.1). Biases are zero, norm scales one.
    """
    generator = torch.Generator(device=model.embed.weight.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        init_tensor(name, parameter, model.config, generator, scheme, std)
    return model


def init_tensor(
    name: str, tensor: Tensor, config: GLMConfig, generator: torch.Generator, scheme: Scheme = "standard",
    std: float = 0.02,
) -> None:  # fmt: skip
    """Fill the tensor of that name (ours) in place, as `init_weights` says."""
    deep_gain = (2 * config.n_layers) ** -0.5
    if tensor.ndim == 1:
        tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    elif name in ("embed.weight", "head.weight"):
        tensor.normal_(0.0, std, generator=generator)
    elif scheme == "standard":
        into_stream = name.endswith(("attn.out.weight", "mlp.down.weight"))
        tensor.normal_(0.0, std * (deep_gain if into_stream else 1.0), generator=generator)
    elif name.endswith("qkv.weight"):
        n_qk = (config.n_heads + config.n_kv_heads) * config.head_dim
        nn.init.xavier_normal_(tensor[:n_qk], 1.0, generator)
        nn.init.xavier_normal_(tensor[n_qk:], deep_gain, generator)
    else:
        nn.init.xavier_normal_(tensor, deep_gain, generator)
