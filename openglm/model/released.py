"""What a released folder is: its family and GLMConfig, read from config.json or model_args.json and tensor shapes.

    python -m openglm inspect /path/to/chatglm3-6b

Fields and tensor names decide, never the names of folders. Where a release leaves a fact to its code (ChatGLM-6B's
alpha, how rope_ratio stretches a context), the fact is stated here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openglm.config import GLMConfig, RopeConfig

__all__ = ["KNOWN", "ignorable", "is_tied_head", "is_vision", "read_json", "released_config", "sat_config"]

KNOWN = (
    "ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2, GLM-4-9B, GLM-4V-9B (text) and CodeGeeX4 as released "
    "(model_type chatglm), Hugging Face glm, glm4, llama, qwen2, GLM-130B and GLM-10B (mp_rank_*_model_states.pt), "
    "GGUF files, and our own"
)
Shape = Callable[[str], tuple[int, ...]]
_FLAGS = (
    "add_bias_linear", "add_qkv_bias", "apply_residual_connection_post_layernorm", "mlp_bias",
    "multi_query_attention", "rmsnorm", "tie_word_embeddings", "use_sliding_window",
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object; fetch it again")
    return value


def released_config(c: Mapping[str, Any], folder: Path, names: frozenset[str], shape: Shape) -> tuple[str, GLMConfig]:
    """(key of `weights.FAMILIES`, config) from a config.json and the checkpoint's tensors.

    Raises ValueError for an unknown architecture (listing the known ones) and for what no decoder here computes.
    """
    kind = c.get("model_type")
    c = {**_HF_DEFAULTS.get(str(kind), {}), **c}
    c = {name: value for name, value in c.items() if value is not None or name == "sliding_window"}
    shape = _checked(shape, folder)
    try:
        for name in (name for name in _FLAGS if not isinstance(c.get(name, False), bool)):
            raise ValueError(f"{name} must be true or false, not {c[name]!r}")
        if kind == "chatglm" and "transformer.word_embeddings.weight" in names:
            return "chatglm-6b", _chatglm_6b(c, shape)
        if kind == "chatglm":
            return "chatglm2", _chatglm2(c, folder, names, shape)
        if kind == "glm" and "transformer.position_embeddings.weight" in names:
            return "glm-10b", _glm_2021(c, names, shape)
        if kind in ("glm", "glm4"):
            return f"hf-{kind}", _hf_glm(c, kind, names)
        if kind in ("llama", "qwen2"):
            return "hf-llama", _hf_llama(c, kind, names)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} lacks {error.args[0]!r}: fetch it again") from None
    except ValueError as error:  # with the file's whole name, which what found the mistake does not know
        text = str(error).removeprefix("config.json: ")
        raise ValueError(text if text.startswith(str(folder)) else f"{folder / 'config.json'}: {text}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} has a field of a wrong type ({error}): fetch it again") from None
    raise ValueError(f"{folder / 'config.json'} has the unknown model_type {kind!r}; known: {KNOWN}")


def _checked(shape: Shape, folder: Path) -> Shape:
    def checked(name: str) -> tuple[int, ...]:
        try:
            return shape(name)
        except KeyError:
            raise ValueError(f"{folder} lacks the tensor {name}: fetch it again") from None

    return checked


def _chatglm_6b(c: Mapping[str, Any], shape: Shape) -> GLMConfig:
    n_layers, heads, dim = c["num_layers"], c["num_attention_heads"], c["hidden_size"]
    rows = shape("transformer.word_embeddings.weight")[0]
    if not c.get("position_encoding_2d", True):
        raise ValueError("config.json: position_encoding_2d false was never released and is not supported")
    return GLMConfig(
        vocab_size=rows, dim=dim, n_layers=n_layers, n_heads=heads, n_kv_heads=heads, head_dim=dim // heads,
        ffn_dim=c.get("inner_hidden_size") or shape("transformer.layers.0.mlp.dense_h_to_4h.bias")[0],
        max_seq_len=c.get("max_sequence_length", 2048), norm="layer", norm_eps=c.get("layernorm_epsilon", 1e-5),
        residual="normed",
        # The released code builds its blocks with the default depth of 28, whatever num_layers says.
        residual_alpha=(2 * 28) ** 0.5, mlp="gelu", linear_bias=True,
        rope=RopeConfig(axes=2, freq_dtype="float16"), mask="prefix",
        # The first release knows its ids by heart; its configs name none of a mask.
        sop_position="index" if rows >= 150000 and "gmask_token_id" not in c else "mask", tie_embeddings=True,
    )  # fmt: skip


def _chatglm2(c: Mapping[str, Any], folder: Path, names: frozenset[str], shape: Shape) -> GLMConfig:
    for field, only in (("post_layer_norm", True), ("original_rope", True), ("interleaved_qkv", False),
                        ("rotary_percent", 0.5)):  # fmt: skip
        if c.get(field, only) != only:
            raise ValueError(f"config.json: {field} {c[field]} was never released and is not supported")
    n_layers, heads, dim = c["num_layers"], c["num_attention_heads"], c["hidden_size"]
    ratio, scale = float(c.get("rope_ratio", 1.0)), 1.0
    if not 0 < ratio < math.inf:
        raise ValueError(f"rope_ratio must be a positive number, not {c['rope_ratio']!r}")
    if ratio != 1.0 and _divides_positions(c, folder):
        ratio, scale = 1.0, ratio
    linear_bias = bool(c.get("add_bias_linear", False))
    bias = "transformer.encoder.layers.0.self_attention.query_key_value.bias"
    return GLMConfig(
        vocab_size=c.get("padded_vocab_size") or shape("transformer.embedding.word_embeddings.weight")[0],
        dim=dim, n_layers=n_layers, n_heads=heads,
        n_kv_heads=c.get("multi_query_group_num", 1) if c.get("multi_query_attention", False) else heads,
        head_dim=c.get("kv_channels") or dim // heads,
        ffn_dim=c.get("ffn_hidden_size") or shape("transformer.encoder.layers.0.mlp.dense_h_to_4h.weight")[0] // 2,
        max_seq_len=c.get("seq_length", 2048), norm="rms" if c.get("rmsnorm", True) else "layer",
        norm_eps=c.get("layernorm_epsilon", 1e-5),
        residual="normed" if c.get("apply_residual_connection_post_layernorm", False) else "stream",
        qkv_bias=linear_bias or c.get("add_qkv_bias", bias in names),
        linear_bias=linear_bias, rope=RopeConfig(theta=10000.0 * ratio, fraction=0.5, position_scale=scale),
        # The released code never ties them; a file without the second matrix was saved by one that does.
        tie_embeddings=bool(c.get("tie_word_embeddings")) and "transformer.output_layer.weight" not in names,
    )  # fmt: skip


def _glm_2021(c: Mapping[str, Any], names: frozenset[str], shape: Shape) -> GLMConfig:
    """The original GLM as a Hugging Face folder; its model_type is that of GLM-4, its tensors are the shards'."""
    for field, only in (("block_position_encoding", True), ("relative_encoding", False), ("spell_length", None)):
        if c.get(field, only) != only:
            raise ValueError(f"config.json: {field} {c[field]} of the original GLM is not supported")
    sizes = {"max_position_embeddings": c["max_sequence_length"]} if "max_sequence_length" in c else {}
    known = {key: c[key] for key in ("num_attention_heads", "layernorm_epsilon") if key in c}
    return sat_config(known | sizes, names, shape)[1]


def _divides_positions(c: Mapping[str, Any], folder: Path) -> bool:
    """Whether rope_ratio divides positions (ChatGLM2-6B-32K) or multiplies the base (ChatGLM3 and later).

    The config's fields are the same, so the model code beside it is read (as text) where it is there: only the later
    code computes with the base. Else the version of transformers that wrote the config tells the two releases apart.
    """
    code = folder / "modeling_chatglm.py"
    if code.is_file():
        text = code.read_text(encoding="utf-8", errors="replace").replace(" ", "")
        return "base*self.rope_ratio" not in text and "base*rope_ratio" not in text
    version = str(c.get("transformers_version", "")).split(".")
    return version[:1] == ["4"] and len(version) > 1 and version[1].isdigit() and int(version[1]) < 30


def _scaling(c: Mapping[str, Any]) -> dict[str, Any]:
    return dict(c.get("rope_scaling") or c.get("rope_parameters") or {})


def _rope(c: Mapping[str, Any], fraction: float) -> RopeConfig:
    """Rotary fields of a Hugging Face config: rope_theta and rope_scaling, or rope_parameters (transformers 5)."""
    scaling = _scaling(c)
    if layered := sorted(name for name, value in scaling.items() if isinstance(value, dict)):
        raise ValueError(f"config.json: rotary fields of their own for {layered[0]} are not supported")
    theta = next(float(v) for v in (scaling.get("rope_theta"), c.get("rope_theta"), 10000.0) if v is not None)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta, fraction=fraction)
    if kind == "linear":
        return RopeConfig(theta=theta, fraction=fraction, position_scale=float(scaling["factor"]))
    if kind == "yarn":
        original = c.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        context = int(original or c["max_position_embeddings"])
        known = {"rope_type", "type", "factor", "original_max_position_embeddings", "rope_theta",
                 "partial_rotary_factor"}  # fmt: skip
        usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # what is computed, spelled out
        if extra := sorted(n for n, v in scaling.items() if n not in known and v is not None and v != usual.get(n)):
            raise ValueError(f"config.json: YaRN with {extra[0]} is not supported: only factor and original context")
        factor = float(scaling.get("factor") or c["max_position_embeddings"] / context)
        return RopeConfig(theta=theta, fraction=fraction, yarn_factor=factor, yarn_context=context)
    if kind == "llama3":
        low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
        if (low, high) != (1.0, 4.0):
            raise ValueError(f"config.json: llama3 scaling with factors {low:g}, {high:g} is not supported: only 1, 4")
        context = int(scaling["original_max_position_embeddings"])
        return RopeConfig(
            theta=theta, fraction=fraction, llama3_factor=float(scaling["factor"]), llama3_context=context
        )
    raise ValueError(
        f"config.json: rope_scaling of type {kind!r} is not supported; known: default, linear, llama3, yarn"
    )


# What an absent field means, as the configs of transformers define it; they may leave such fields out of the file.
_GLM_DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128,
}  # fmt: skip
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "glm": _GLM_DEFAULTS, "glm4": _GLM_DEFAULTS, "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "num_key_value_heads": 32},
}  # fmt: skip


def _hf_shape(c: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    if c.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {c['hidden_act']!r} is not supported: only silu")
    heads = c["num_attention_heads"]
    return {
        "vocab_size": c["vocab_size"], "dim": c["hidden_size"], "n_layers": c["num_hidden_layers"], "n_heads": heads,
        "n_kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": c.get("head_dim") or c["hidden_size"] // heads, "ffn_dim": c["intermediate_size"],
        "max_seq_len": c["max_position_embeddings"], "norm_eps": c["rms_norm_eps"],
        "qkv_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "tie_embeddings": bool(c.get("tie_word_embeddings", False)),
    }  # fmt: skip


def _hf_glm(c: Mapping[str, Any], kind: str, names: frozenset[str]) -> GLMConfig:
    return GLMConfig(**_hf_shape(c, names), sandwich=kind == "glm4", rope=_rope(c, _fraction(c, 0.5)))


def _fraction(c: Mapping[str, Any], default: float) -> float:
    """partial_rotary_factor: in the rotary fields, else beside them."""
    scaling = _scaling(c)
    return float(scaling.get("partial_rotary_factor") or c.get("partial_rotary_factor") or default)


def _hf_llama(c: Mapping[str, Any], kind: str, names: frozenset[str]) -> GLMConfig:
    if c.get("mlp_bias") or "model.layers.0.self_attn.o_proj.bias" in names:
        raise ValueError("config.json: a Llama with biases outside of QKV is not supported")
    layers = c.get("layer_types") or [c.get("max_window_layers", 28) < c["num_hidden_layers"] and "sliding_attention"]
    windows = kind == "qwen2" and c.get("use_sliding_window") and c.get("sliding_window", 4096) is not None
    if windows and "sliding_attention" in layers:
        raise ValueError("config.json: use_sliding_window is not supported: set it to false to see all tokens")
    fraction = _fraction(c, 1.0)
    if fraction != 1.0:  # versions of transformers differ in whether they obey it
        raise ValueError(f"config.json: partial_rotary_factor {fraction} of a {kind} model is not supported: only 1.0")
    return GLMConfig(**_hf_shape(c, names), rope=_rope(c, 1.0))


def sat_config(args: Mapping[str, Any], names: frozenset[str], shape: Shape) -> tuple[str, GLMConfig]:
    """(family, config) of model-parallel shards: GLM-130B, or the original GLM with its two tables of positions.

    The shards hold no config: shapes tell it. args: model_args.json where it is there, to be held against the shapes.
    """
    if "transformer.block_position_embeddings.weight" in names:
        family, embed = "glm-10b", "word_embeddings.weight"
    elif "transformer.word_embeddings.weight" in names:
        family, embed = "glm-130b", "transformer.word_embeddings.weight"
    else:
        raise ValueError(f"the shards hold neither GLM-130B nor the original GLM; known: {KNOWN}")
    vocab, dim = shape(embed)
    for field, only in (("layernorm_order", "post"), ("relative_encoding", False)):
        if args.get(field, only) != only:
            raise ValueError(f"model_args.json: {field} {args[field]} was never released and is not supported")
    qkv_rows = shape("transformer.layers.0.attention.query_key_value.weight")[0]
    if qkv_rows != 3 * dim:
        raise ValueError(f"the shards hold {qkv_rows} of {3 * dim} rows of QKV: files of some ranks are missing")
    n_layers = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("transformer.layers."))
    up = shape("transformer.layers.0.mlp.dense_h_to_4h.bias")[0]
    found: dict[str, Any] = {"vocab_size": vocab, "hidden_size": dim, "num_layers": n_layers}
    if family == "glm-10b":
        head_dim = dim // args["num_attention_heads"] if "num_attention_heads" in args else 64  # of every released size
        context = shape("transformer.position_embeddings.weight")[0] - 1
        found["max_position_embeddings"] = context
        config = GLMConfig(
            vocab_size=vocab, dim=dim, n_layers=n_layers, n_heads=dim // head_dim, n_kv_heads=dim // head_dim,
            head_dim=head_dim, ffn_dim=up, max_seq_len=context, norm="layer",
            norm_eps=args.get("layernorm_epsilon", 1e-5), mlp="gelu", linear_bias=True, positions="learned",
            mask="prefix", tie_embeddings=True,
        )  # fmt: skip
    else:
        inv_freq = "transformer.layers.0.attention.rotary_emb.inv_freq"
        head_dim = 2 * shape(inv_freq)[0] if inv_freq in names else 128
        if "num_attention_heads" in args:
            head_dim = dim // args["num_attention_heads"]
        found["inner_hidden_size"] = up // 2
        config = GLMConfig(
            vocab_size=vocab, dim=dim, n_layers=n_layers, n_heads=dim // head_dim, n_kv_heads=dim // head_dim,
            head_dim=head_dim, ffn_dim=up // 2, max_seq_len=args.get("max_sequence_length", 2048), norm="layer",
            norm_eps=args.get("layernorm_epsilon", 1e-5), residual="normed", residual_alpha=math.sqrt(2 * n_layers),
            mlp="geglu", linear_bias=True, rope=RopeConfig(freq_dtype="float16"), mask="prefix", tie_embeddings=True,
        )  # fmt: skip
    for key, value in found.items():
        if key in args and args[key] != value:
            raise ValueError(f"model_args.json says {key} {args[key]}, the shards hold {value}: they belong apart")
    return family, config


def ignorable(name: str, config: GLMConfig) -> bool:
    """Tensors of released files that the language model needs not: tables recomputed, copies of a tied head (checked by
    `opened`), other parts.
    """
    return (
        name.endswith("rotary_emb.inv_freq")
        or name == "transformer.rotary_pos_emb.inv_freq"
        or name.endswith(".attention.masked_bias")
        or name.startswith("transformer.prefix_encoder.")
        or is_vision(name)
        or is_tied_head(name, config)
    )


def is_vision(name: str) -> bool:
    """Whether a tensor is of GLM-4V's vision tower."""
    return name.startswith("transformer.vision.")


def is_tied_head(name: str, config: GLMConfig) -> bool:
    """Whether a tensor stands where the output matrix would be, of a model that has none but its embedding."""
    return config.tie_embeddings and name in ("lm_head.weight", "transformer.output_layer.weight")
