"""What a config costs: parameters, floating-point operations, bytes. Pure arithmetic, no torch.

    python -c "from openglm.model.cost import n_parameters; from openglm.presets import preset; \
               print(n_parameters(preset('chatglm-6b')))"
"""

from __future__ import annotations

from openglm.config import GLMConfig

__all__ = ["flops_per_token", "kv_bytes_per_token", "n_parameters", "parameters_by_part"]


def parameters_by_part(config: GLMConfig) -> dict[str, int]:
    """Parameter counts by part: embedding, attention, mlp, norm, head (0 when tied); they add up to the model."""
    c, bias = config, config.linear_bias
    attention_dim = c.n_heads * c.head_dim
    qkv = c.qkv_dim * (c.dim + c.qkv_bias)
    out = c.dim * (attention_dim + bias)
    n_up = 1 if c.mlp == "gelu" else 2
    mlp = n_up * c.ffn_dim * (c.dim + bias) + c.dim * (c.ffn_dim + bias)
    norm = c.dim * (2 if c.norm == "layer" else 1)
    return {
        "embedding": (c.vocab_size + (2 * (c.max_seq_len + 1) if c.positions == "learned" else 0)) * c.dim,
        "attention": c.n_layers * (qkv + out),
        "mlp": c.n_layers * mlp,
        "norm": norm * (c.n_layers * (4 if c.sandwich else 2) + 1),
        "head": 0 if c.tie_embeddings else c.vocab_size * c.dim,
    }


def n_parameters(config: GLMConfig) -> int:
    """All parameters, a tied head counted once."""
    return sum(parameters_by_part(config).values())


def flops_per_token(config: GLMConfig, seq_len: int, head_share: float = 1.0) -> float:
    """Floating-point operations of one token's forward pass (2 per multiply-add); training takes three times as many.

    Attention counts every key of a `seq_len` context (a causal kernel may do half). head_share: share of tokens that
    go through the output matrix.
    """
    parts = parameters_by_part(config)
    matrices = parts["attention"] + parts["mlp"] + head_share * config.vocab_size * config.dim
    return 2.0 * matrices + 4.0 * config.n_layers * config.n_heads * config.head_dim * seq_len


def kv_bytes_per_token(config: GLMConfig, bytes_per_value: float = 2.0) -> int:
    """Bytes of keys and values that one token leaves in the cache, over all layers."""
    return int(2 * config.n_layers * config.n_kv_heads * config.head_dim * bytes_per_value)
