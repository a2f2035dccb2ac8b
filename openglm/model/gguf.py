"""GGUF models in: the config from the metadata, one name table an architecture, weights one tensor at a time.

    python -c "from openglm.model.gguf import open_gguf; print(open_gguf('model.gguf').config)"

Architectures chatglm (ChatGLM2/3, GLM-4, GLM-Edge, CodeGeeX), glm4 (0414, Z1), llama and qwen2. llama.cpp turns
neighbouring rows of the query and key heads in all of them but qwen2, which has half-split heads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openglm.config import GLMConfig, RopeConfig
from openglm.model.checkpoint import CheckpointMeta
from openglm.model.gguf_file import GgufFile
from openglm.model.gguf_types import as_matrix, decode
from openglm.model.weights import Family, Rotary, names_of
from openglm.ops.native import GgufMatrix
from openglm.ops.quant import Weight
from openglm.ops.rope import inverse_frequencies, llama3_divisors

__all__ = ["ARCHITECTURES", "VECTOR_TYPES", "GgufModel", "GgufSource", "family_of", "open_gguf"]

ARCHITECTURES: dict[str, Rotary] = {"chatglm": "adjacent", "glm4": "adjacent", "llama": "adjacent", "qwen2": "half"}
TOP = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
META_KEY = "openglm.meta"
VECTORS_KEY = "openglm.vector_type"  # of norms and biases before they became F32, which llama.cpp wants them in
ROPE_FREQS = "rope_freqs.weight"  # what each rotary frequency is divided by
VECTOR_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Names under which released vocabularies hold tokens that end an answer, besides the ids in the metadata.
STOP_TOKENS = {
    "chatglm": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "glm4": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "llama": ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>"),
    "qwen2": ("<|im_end|>", "<|endoftext|>"),
}
CONTROL = 3  # token type of specials
# What would change a model's numbers and none of these has: key -> what it is, and the values that mean: not there.
TRAITS: dict[str, tuple[Any, ...]] = {
    "expert_count": ("a mixture of experts is", 0),
    "attention.sliding_window": ("a sliding attention window is", 0),
    "attention.scale": ("another scale of attention scores is", 0.0),
    "attention.causal": ("attention in both directions is", True),
    "attention.clamp_kqv": ("clamping of keys and values is", 0.0),
    "attention.max_alibi_bias": ("a bias by distance is", 0.0),
    "attn_logit_softcapping": ("a cap on attention scores is", 0.0),
    "final_logit_softcapping": ("a cap on logits is", 0.0),
    "logit_scale": ("a scale of logits is", 0.0, 1.0),
    "residual_scale": ("a scale of the residual stream is", 0.0, 1.0),
    "embedding_scale": ("a scale of embeddings is", 0.0, 1.0),
    "use_parallel_residual": ("attention beside the MLP is", False),
    "nextn_predict_layers": ("layers for tokens further on are", 0),
    "rope.scaling.alpha": ("rotary scaling by alpha is", 0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": ("another attention factor of YaRN is", 0.0),
    "rope.scaling.yarn_beta_fast": ("YaRN with another ramp is", 32.0),
    "rope.scaling.yarn_beta_slow": ("YaRN with another ramp is", 1.0),
}
# Sampling defaults that the format has fields for.
SAMPLING = {
    "temperature": "general.sampling.temp", "top_k": "general.sampling.top_k", "top_p": "general.sampling.top_p",
}  # fmt: skip


def family_of(architecture: str, fused_qkv: bool = False, fused_up: bool = False) -> Family:
    """The name table of an architecture. fused_qkv, fused_up: q, k and v, or gate and up, are one tensor each."""
    names = {
        "norm1": ("attn_norm",),
        "attn.qkv": ("attn_qkv",) if fused_qkv else ("attn_q", "attn_k", "attn_v"),
        "attn.out": ("attn_output",),
        "norm2": ("ffn_norm",),
        "mlp.up": ("ffn_up",) if fused_up else ("ffn_gate", "ffn_up"),
        "mlp.down": ("ffn_down",),
    }
    if architecture == "glm4":
        names |= {"post_norm1": ("post_attention_norm",), "post_norm2": ("post_ffw_norm",)}
    return Family("blk", TOP, names, rotary=ARCHITECTURES[architecture])


class GgufSource:
    """The weights of a GGUF file under their names there (a Source)."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.vector_type: str | None = file.fields.get(VECTORS_KEY)
        if self.vector_type not in (None, *VECTOR_TYPES):
            raise ValueError(f"{file.path} has damaged metadata ({VECTORS_KEY}): fetch it again")

    def names(self) -> Iterable[str]:
        return self.file.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[name].shape

    def stored(self, name: str) -> list[tuple[str, int]]:
        return [(self.file.tensors[name].type, self.file.tensors[name].n_bytes)]

    def get(self, name: str) -> Weight:
        """A tensor in memory of its own, quantised where our form holds its type. KeyError for an unknown name."""
        entry = self.file.tensors[name]
        weight = decode(entry.type, self.file.bytes_of(name), entry.shape)
        self.file.release(name)
        if isinstance(weight, Tensor) and len(entry.shape) == 1 and self.vector_type is not None:
            return weight.to(VECTOR_TYPES[self.vector_type])
        return weight

    def matrix(self, name: str, order: Tensor | None = None) -> GgufMatrix | None:
        """A quantised matrix as it lies in the file, to be packed; None for a tensor of another kind."""
        entry = self.file.tensors[name]
        return as_matrix(entry.type, self.file.bytes_of(name), entry.shape, order)


@dataclass(frozen=True)
class GgufModel:
    """One GGUF file, opened: shape, name table, weights, and what else it says.

    fields: all metadata as plain Python values. meta: what `write_gguf` wrote along; in files of others the stop ids
    and sampling defaults that the metadata gives.
    """

    config: GLMConfig
    family: Family
    source: GgufSource
    fields: Mapping[str, Any]
    meta: CheckpointMeta

    @property
    def architecture(self) -> str:
        return self.fields["general.architecture"]

    @property
    def chat_template(self) -> str | None:
        return self.fields.get("tokenizer.chat_template")

    @property
    def tokenizer_fields(self) -> dict[str, Any]:
        """The `tokenizer.` fields, for `Tokenizer.from_gguf`."""
        return {key: value for key, value in self.fields.items() if key.startswith("tokenizer.")}

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.meta.stop_ids


def open_gguf(path: str | Path) -> GgufModel:
    """Open a GGUF file; its weights are read when they are asked for.

    Raises ValueError in one line: no GGUF, damaged, an unknown architecture, a tensor type or a trait of the model
    that is not supported, a tensor missing or left over.
    """
    file = GgufFile(path)
    fields, names = file.fields, file.tensors.keys()
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(f"{path} has architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    family = family_of(architecture, "blk.0.attn_qkv.weight" in names, "blk.0.ffn_gate.weight" not in names)
    try:
        config = _config(architecture, fields, file)
        meta = _meta(architecture, fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, KeyError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{path} has damaged metadata: fetch it again") from None
    _check(file, family, config)
    return GgufModel(config, family, GgufSource(file), fields, meta)


def _meta(architecture: str, fields: Mapping[str, Any]) -> CheckpointMeta:
    if META_KEY in fields:
        values: dict[str, Any] = json.loads(fields[META_KEY])
        tuples = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return CheckpointMeta(**values | tuples)
    generation = {ours: fields[key] for ours, key in SAMPLING.items() if key in fields}
    return CheckpointMeta(stop_ids=_stop_ids(architecture, fields), generation=generation)


def _stop_ids(architecture: str, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The metadata's, then control tokens known by name."""
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    ids = [int(fields[key]) for key in keys if key in fields]
    tokens: list[str] = fields.get("tokenizer.ggml.tokens", [])
    kinds: list[int] = fields.get("tokenizer.ggml.token_type", [])
    for name in STOP_TOKENS[architecture]:
        if name in tokens and tokens.index(name) < len(kinds) and kinds[tokens.index(name)] == CONTROL:
            ids.append(tokens.index(name))
    return tuple(dict.fromkeys(ids))


# -------------------------------------------------------------------- metadata


class _Metadata:
    """Typed look-ups below the architecture's prefix."""

    def __init__(self, architecture: str, fields: Mapping[str, Any]) -> None:
        self.architecture, self.fields = architecture, fields

    def get(self, key: str, default: Any = None) -> Any:
        """A value; the one value of a list with an entry a layer. Raises ValueError if it is needed and not there."""
        value = self.fields.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ValueError(f"the metadata lacks {self.architecture}.{key}: fetch the file again")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ValueError(f"layers differ in {self.architecture}.{key}, which is not supported")
            value = value[0]
        return value

    def refuse(self, key: str, what: str, allowed: tuple[Any, ...] = (0,)) -> None:
        value = self.fields.get(f"{self.architecture}.{key}", allowed[0])
        if value not in allowed:
            raise ValueError(f"{what} ({self.architecture}.{key} = {value}) not supported")


def _config(architecture: str, fields: Mapping[str, Any], file: GgufFile) -> GLMConfig:
    if fields.get("split.count", 1) > 1:
        raise ValueError(f"one of {fields['split.count']} parts: join them with llama-gguf-split --merge")
    meta = _Metadata(architecture, fields)
    for key, (what, *allowed) in TRAITS.items():
        meta.refuse(key, what, tuple(allowed))
    for tensor in ("token_embd.weight", "output_norm.weight"):
        if tensor not in file.tensors:
            raise ValueError(f"the tensor {tensor} is missing: fetch the file again")
    n_layers = int(meta.get("block_count"))
    if n_layers > len(file.tensors):
        raise ValueError(f"{n_layers} layers in the metadata, {len(file.tensors)} tensors in all: fetch the file again")
    dim, n_heads = int(meta.get("embedding_length")), int(meta.get("attention.head_count"))
    head_dim = int(meta.get("attention.key_length", dim // max(n_heads, 1)))
    meta.refuse("attention.value_length", "values of another length than keys are", (head_dim,))
    return GLMConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(meta.get("attention.head_count_kv", n_heads)),
        head_dim=head_dim,
        ffn_dim=int(meta.get("feed_forward_length")),
        max_seq_len=int(meta.get("context_length")),
        norm_eps=_rounded(meta.get("attention.layer_norm_rms_epsilon")),
        sandwich=architecture == "glm4",
        qkv_bias=bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & file.tensors.keys()),
        rope=_rope(meta, head_dim, file),
        tie_embeddings="output.weight" not in file.tensors,
    )


def _rope(meta: _Metadata, head_dim: int, file: GgufFile) -> RopeConfig:
    meta.refuse("rope.dimension_sections", "rotary sections of a multimodal model are", ([],))
    n_rotated = int(meta.get("rope.dimension_count", head_dim))
    rope = RopeConfig(theta=_rounded(meta.get("rope.freq_base", 10000.0)), fraction=n_rotated / head_dim)
    if ROPE_FREQS in file.tensors:
        divisors = decode(file.tensors[ROPE_FREQS].type, file.bytes_of(ROPE_FREQS), (-1,))
        assert isinstance(divisors, Tensor)
        rope = _with_divisors(rope, divisors, n_rotated)
    kind = meta.get("rope.scaling.type", "none")
    factor = _rounded(meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 1.0)))
    if kind == "yarn":
        meta.refuse("rope.scaling.attn_factor", "another attention factor of YaRN is", (1.0,))
        meta.refuse("rope.scaling.yarn_attn_factor", "another attention factor of YaRN is", (1.0,))
        meta.refuse("rope.scaling.yarn_ext_factor", "another extrapolation factor of YaRN is", (1.0, -1.0))
        return replace(rope, yarn_factor=factor, yarn_context=int(meta.get("rope.scaling.original_context_length")))
    if kind not in ("none", "linear"):
        raise ValueError(f"rotary scaling {kind!r} is not supported; none, linear and yarn are")
    return replace(rope, position_scale=factor)


def _with_divisors(rope: RopeConfig, divisors: Tensor, n_rotated: int) -> RopeConfig:
    """The rule of Llama 3.1 that gives these divisors of the frequencies; the file says no more of it."""
    if (divisors == 1).all():
        return rope
    plain, factor = inverse_frequencies(n_rotated, rope.theta), float(divisors.max())
    between = (divisors > 1.001) & (divisors < 0.999 * factor)
    if len(divisors) == len(plain) and between.any():
        kept = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        context = round(float(((1 + 3 * kept) * 2 * math.pi / plain[between]).median()))
        if torch.allclose(llama3_divisors(plain, factor, context), divisors, rtol=1e-3):
            return replace(rope, llama3_factor=factor, llama3_context=context)
    raise ValueError(f"the frequency factors of {ROPE_FREQS} do not follow the rule of Llama 3.1: not supported")


def _rounded(value: float) -> float:
    """The short decimal number that a float32 of the metadata was made from: 1e-05, not 9.999999747378752e-06."""
    return float(f"{float(value):.7g}")


def _check(file: GgufFile, family: Family, config: GLMConfig) -> None:
    """Every tensor that the config needs is there, none is left over, and their shapes fit."""
    c, table = config, names_of(family, config)
    wanted = {name for theirs in table.values() for name in theirs}
    if missing := sorted(wanted - file.tensors.keys()):
        raise ValueError(f"{file.path} lacks the tensor {missing[0]} and {len(missing) - 1} more: fetch it again")
    if extra := sorted(file.tensors.keys() - wanted - {ROPE_FREQS}):
        raise ValueError(f"{file.path} holds the tensor {extra[0]}, which this architecture has no place for")
    shapes = {
        "embed": (c.vocab_size, c.dim), "head": (c.vocab_size, c.dim), "qkv": (c.qkv_dim, c.dim),
        "out": (c.dim, c.n_heads * c.head_dim), "up": (2 * c.ffn_dim, c.dim), "down": (c.dim, c.ffn_dim),
    }  # fmt: skip
    for ours, theirs in table.items():
        *_, layer, part = ours.split(".")
        shape = shapes.get(layer, (c.dim, 0)) if part == "weight" else (shapes[layer][0], 0)
        found = [file.tensors[name].shape for name in theirs]
        if sum(s[0] for s in found) != shape[0] or any((*s[1:], 0)[0] != shape[1] for s in found):
            raise ValueError(f"{file.path}: {theirs[0]} has shape {found[0]}, which does not fit the metadata")
