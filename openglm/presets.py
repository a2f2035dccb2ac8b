"""Every released size, one call each; numbers from the checkpoints' own configs.

    python -m openglm inspect random:glm-4-9b

`preset("glm-4-9b")` returns the config; `preset("glm-4-9b", n_layers=4)` overrides fields.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from openglm.config import GLMConfig, RopeConfig, nearest

__all__ = ["PRESETS", "preset", "parse_preset"]

_HALF = RopeConfig(fraction=0.5)

# GLM-130B: DeepNorm with alpha = sqrt(2 * 70); GeGLU; 1-D rotary over the whole head (GLM-130B paper, table 11).
_glm_130b = GLMConfig(
    vocab_size=150528, dim=12288, n_layers=70, n_heads=96, n_kv_heads=96, head_dim=128, ffn_dim=32768,
    max_seq_len=2048, norm="layer", residual="normed", residual_alpha=(2 * 70) ** 0.5, mlp="geglu",
    linear_bias=True, rope=RopeConfig(freq_dtype="float16"), mask="prefix", tie_embeddings=True,
)  # fmt: skip
# ChatGLM-6B: alpha = sqrt(56) is a constructor default of the released code, whatever the depth.
_chatglm_6b = GLMConfig(
    vocab_size=130528, dim=4096, n_layers=28, n_heads=32, n_kv_heads=32, head_dim=128, ffn_dim=16384,
    max_seq_len=2048, norm="layer", residual="normed", residual_alpha=(2 * 28) ** 0.5, mlp="gelu",
    linear_bias=True, rope=RopeConfig(axes=2, freq_dtype="float16"), mask="prefix", tie_embeddings=True,
)  # fmt: skip
_chatglm2 = partial(
    GLMConfig, vocab_size=65024, dim=4096, n_layers=28, n_heads=32, n_kv_heads=2, head_dim=128, ffn_dim=13696,
    rope=_HALF,
)  # fmt: skip
_glm_4_9b = partial(
    GLMConfig, vocab_size=151552, dim=4096, n_layers=40, n_heads=32, n_kv_heads=2, head_dim=128, ffn_dim=13696,
    norm_eps=1.5625e-07, rope=_HALF, max_seq_len=8192,
)  # fmt: skip
_glm_4_32b = GLMConfig(
    vocab_size=151552, dim=6144, n_layers=61, n_heads=48, n_kv_heads=2, head_dim=128, ffn_dim=23040,
    max_seq_len=32768, sandwich=True, qkv_bias=False, rope=_HALF,
)  # fmt: skip
_llama = partial(GLMConfig, qkv_bias=False)


def _ratio(rope_ratio: float) -> RopeConfig:
    """GLM-4 lengthens the context by multiplying the rotary base."""
    return RopeConfig(theta=10000.0 * rope_ratio, fraction=0.5)


_128k: dict[str, Any] = {"max_seq_len": 131072, "rope": _ratio(500)}

PRESETS: dict[str, GLMConfig] = {
    "glm-10b": GLMConfig(
        vocab_size=50304, dim=4096, n_layers=48, n_heads=64, n_kv_heads=64, head_dim=64, ffn_dim=16384,
        max_seq_len=1024, norm="layer", mlp="gelu", linear_bias=True, positions="learned", mask="prefix",
        tie_embeddings=True,
    ),
    "glm-130b": _glm_130b,
    "chatglm-6b": _chatglm_6b,
    "chatglm-6b-v0": dataclasses.replace(_chatglm_6b, vocab_size=150528, sop_position="index"),
    "chatglm2-6b": _chatglm2(max_seq_len=32768),
    "chatglm2-6b-32k": _chatglm2(max_seq_len=32768, rope=RopeConfig(fraction=0.5, position_scale=50)),
    "chatglm3-6b": _chatglm2(max_seq_len=8192),
    "codegeex2-6b": _chatglm2(max_seq_len=8192),
    "glm-4-9b": _glm_4_9b(),
    "glm-4-9b-chat": _glm_4_9b(**_128k),
    "glm-4-9b-chat-1m": _glm_4_9b(n_kv_heads=4, max_seq_len=1048576, rope=_ratio(10000)),
    "codegeex4-9b": _glm_4_9b(**_128k),
    "glm-4-9b-0414": _glm_4_9b(sandwich=True, norm_eps=1e-5, max_seq_len=32768),
    "glm-4-32b-0414": _glm_4_32b,
    "glm-4-32b-0414-yarn": dataclasses.replace(
        _glm_4_32b, max_seq_len=131072, rope=RopeConfig(fraction=0.5, yarn_factor=4.0, yarn_context=32768)
    ),
    "glm-edge-1.5b": GLMConfig(
        vocab_size=59264, dim=2048, n_layers=28, n_heads=16, n_kv_heads=4, head_dim=128, ffn_dim=6144,
        max_seq_len=8192, qkv_bias=False, tie_embeddings=True,
    ),
    "llama-2-7b": _llama(
        vocab_size=32000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, ffn_dim=11008,
        max_seq_len=4096,
    ),
    "smollm2-135m": _llama(
        vocab_size=49152, dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536,
        max_seq_len=8192, rope=RopeConfig(theta=100000.0), tie_embeddings=True,
    ),
    "qwen2.5-0.5b": GLMConfig(
        vocab_size=151936, dim=896, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64, ffn_dim=4864,
        max_seq_len=32768, norm_eps=1e-6, rope=RopeConfig(theta=1000000.0), tie_embeddings=True,
    ),
    "qwen2.5-1.5b": GLMConfig(
        vocab_size=151936, dim=1536, n_layers=28, n_heads=12, n_kv_heads=2, head_dim=128, ffn_dim=8960,
        max_seq_len=32768, norm_eps=1e-6, rope=RopeConfig(theta=1000000.0), tie_embeddings=True,
    ),
    # The bundled model: GLM-4's block with a prefix mask and two position axes, so that one model fills blanks
    # (as ChatGLM-6B does) and, with [gMASK] <sop> in front, is an ordinary causal chat model (as GLM-4 is).
    "glm-nano": GLMConfig(
        vocab_size=16384, dim=320, n_layers=8, n_heads=5, n_kv_heads=1, head_dim=64, ffn_dim=1024,
        max_seq_len=1024, rope=RopeConfig(axes=2), mask="prefix", tie_embeddings=True,
    ),
}  # fmt: skip


def preset(name: str, **overrides: Any) -> GLMConfig:
    """Config of a released size; raises ValueError naming the nearest preset or field."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{nearest(name, list(PRESETS))}; known: {', '.join(PRESETS)}")
    known = [f.name for f in dataclasses.fields(GLMConfig)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"unknown GLMConfig field {key!r}{nearest(key, known)}")
    return dataclasses.replace(PRESETS[name], **overrides)


def parse_preset(reference: str) -> GLMConfig:
    """Config from "glm-4-9b?n_layers=4&dim=512" (the part after "random:"); numbers, true and false only."""
    name, _, query = reference.partition("?")
    overrides: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, separator, value = part.partition("=")
        if not separator:
            raise ValueError(f"{part!r} in {reference!r} is not key=value")
        if value in ("true", "false"):
            overrides[key] = value == "true"
            continue
        try:
            overrides[key] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise ValueError(f"{key}={value} in {reference!r}: the value must be a number, true or false") from None
    return preset(name, **overrides)
