"""What goes beside exported weights: config.json and generation_config.json of Hugging Face's glm, glm4, llama, qwen2.

    python -m openglm convert MODEL OUT --format hf
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openglm.config import GLMConfig
from openglm.model.checkpoint import CheckpointMeta

__all__ = ["generation_config", "hf_architecture", "hf_config", "our_fields"]

CLASSES = {"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
OUR_KEY = "openglm"  # of config.json: the fields of our meta that Hugging Face has no place for
OUR_FIELDS = ("chat_format", "description", "prompt_prefix")
FAMILY_OF = {"glm": "hf-glm", "glm4": "hf-glm4", "llama": "hf-llama", "qwen2": "hf-llama"}


def hf_architecture(config: GLMConfig, family: str = "", qwen_text: bool = True) -> tuple[str, str]:
    """(model_type, key of `weights.FAMILIES`) that computes this config; family: of the checkpoint it comes from.

    qwen_text: whether text is cut as Qwen2 does it, which transformers takes for granted of qwen2 whatever
    tokenizer.json says; glm computes the same and believes the file.
    Raises ValueError for a model that Hugging Face has no architecture for.
    """
    c = config
    plain = c.norm == "rms" and c.residual == "stream" and c.mlp == "swiglu" and not c.linear_bias
    if not plain or c.mask != "causal" or c.positions != "rope" or c.rope.axes != 1:
        what = "prefix-bidirectional mask" if c.mask == "prefix" else "block"
        raise ValueError(f"Hugging Face has no architecture with this model's {what}: use --format openglm")
    if c.rope.freq_dtype != "float32":
        raise ValueError("Hugging Face has no architecture with rotary frequencies in half precision: use openglm")
    if c.sandwich:
        kind = "glm4"
    elif c.rope.fraction < 1.0 or family == "hf-glm" or (c.qkv_bias and not qwen_text):
        kind = "glm"
    else:
        kind = "qwen2" if c.qkv_bias else "llama"
    return kind, FAMILY_OF[kind]


def hf_config(config: GLMConfig, meta: CheckpointMeta, kind: str, dtype: str) -> dict[str, Any]:
    """config.json of model_type `kind`; dtype: of the stored weights, such as bfloat16."""
    c, rope = config, config.rope
    value: dict[str, Any] = {
        "architectures": [CLASSES[kind]], "model_type": kind, "vocab_size": c.vocab_size, "hidden_size": c.dim,
        "intermediate_size": c.ffn_dim, "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim, "hidden_act": "silu",
        "max_position_embeddings": c.max_seq_len, "rms_norm_eps": c.norm_eps, "rope_theta": rope.theta,
        "tie_word_embeddings": c.tie_embeddings, "torch_dtype": dtype, "use_cache": True, "bos_token_id": None,
        "attention_dropout": 0.0,
    }  # fmt: skip
    if kind != "qwen2":  # which has biases without saying so
        value["attention_bias"] = c.qkv_bias
    if kind in ("glm", "glm4"):
        value["partial_rotary_factor"] = rope.fraction
    if rope.yarn_factor > 1.0:
        value["rope_scaling"] = {
            "rope_type": "yarn", "factor": rope.yarn_factor, "original_max_position_embeddings": rope.yarn_context,
        }  # fmt: skip
    elif rope.llama3_factor > 1.0:
        value["rope_scaling"] = {
            "rope_type": "llama3", "factor": rope.llama3_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": rope.llama3_context,
        }  # fmt: skip
    elif rope.position_scale > 1.0:
        value["rope_scaling"] = {"rope_type": "linear", "factor": rope.position_scale}
    value["eos_token_id"] = list(meta.stop_ids) or None
    value["pad_token_id"] = _pad(meta)
    value[OUR_KEY] = {name: found for name in OUR_FIELDS if (found := getattr(meta, name)) not in (None, {})}
    return value


def our_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of CheckpointMeta that `hf_config` has put into a config.json."""
    found = config.get(OUR_KEY)
    kept = {n: found[n] for n in OUR_FIELDS if n in found} if isinstance(found, dict) else {}
    return {n: tuple(value) if isinstance(value, list) else value for n, value in kept.items()}


def _pad(meta: CheckpointMeta) -> int | None:
    return next((meta.special_ids[n] for n in ("<pad>", "<|endoftext|>") if n in meta.special_ids), None)


def generation_config(meta: CheckpointMeta) -> dict[str, Any]:
    """generation_config.json: stop ids and sampling defaults."""
    value: dict[str, Any] = {"eos_token_id": list(meta.stop_ids) or None, "pad_token_id": _pad(meta)}
    sampling = dict(meta.generation)
    if sampling.get("temperature", 1.0) == 0.0:
        kept = {k: v for k, v in sampling.items() if k not in ("temperature", "top_k", "top_p", "min_p")}
        return value | kept | {"do_sample": False}
    draws = sampling.keys() & {"temperature", "top_k", "top_p", "min_p"}
    return value | sampling | ({"do_sample": True} if draws else {})
