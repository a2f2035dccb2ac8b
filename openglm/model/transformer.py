"""Transformer: one decoder for every generation of the family, told apart by the fields of GLMConfig alone.

    python -c "import torch; from openglm.model.transformer import Transformer; from openglm.presets import preset; \
               print(Transformer(preset('glm-4-9b'), device='meta'))"

Fused projections hold rows in one order, whatever a checkpoint's: qkv is [Q | K | V], a gated MLP's up is
[gate | up]. Shapes: B rows, T tokens, D dim, H heads, G key-value heads.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openglm.config import GLMConfig
from openglm.model.batch import ForwardBatch
from openglm.model.cache import Cache, KVCache
from openglm.ops.attention import attention, visible
from openglm.ops.rope import apply_rope, inverse_frequencies, llama3_divisors, rope_angles, yarn

__all__ = ["MLP", "Attention", "Block", "Transformer"]


def make_norm(config: GLMConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.dim, eps=config.norm_eps)


def _table(n_rows: int, dim: int) -> nn.Embedding:
    """An embedding left as it is allocated: nn.Embedding's own normal_() takes two seconds of imports on "meta"."""
    return nn.Embedding.from_pretrained(torch.empty(n_rows, dim), freeze=False)


class Attention(nn.Module):
    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.dim, config.qkv_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=config.linear_bias)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        c = self.config
        heads = self.qkv(x).unflatten(-1, (c.n_heads + 2 * c.n_kv_heads, c.head_dim))  # (B, T, H + 2G, head_dim)
        qk, v = heads.split((c.n_heads + c.n_kv_heads, c.n_kv_heads), dim=2)
        q, k = (qk if rope is None else apply_rope(qk, *rope)).split((c.n_heads, c.n_kv_heads), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        attend = attention if cache is None else partial(cache.attend, layer)
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        n_up = 1 if config.mlp == "gelu" else 2
        self.up = nn.Linear(config.dim, n_up * config.ffn_dim, bias=config.linear_bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "gelu":  # the original GLM and ChatGLM-6B approximate by tanh, GLM-130B's gate does not
            return self.down(F.gelu(x, approximate="tanh"))
        gate, up = x.chunk(2, dim=-1)
        return self.down((F.silu(gate) if self.kind == "swiglu" else F.gelu(gate)) * up)


class Block(nn.Module):
    """x = norm(h); h = alpha * (x or h) + post_norm(f(x)), for attention and then the MLP."""

    def __init__(self, config: GLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.normed_residual, self.alpha = config.residual == "normed", config.residual_alpha
        self.norm1, self.attn = make_norm(config), Attention(config)
        self.norm2, self.mlp = make_norm(config), MLP(config)
        self.post_norm1 = make_norm(config) if config.sandwich else nn.Identity()
        self.post_norm2 = make_norm(config) if config.sandwich else nn.Identity()

    def forward(
        self, h: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        x = self.norm1(h)
        h = self._residual(h, x) + self.post_norm1(self.attn(x, rope, mask, cache, self.layer))
        x = self.norm2(h)
        return self._residual(h, x) + self.post_norm2(self.mlp(x))

    def _residual(self, h: Tensor, x: Tensor) -> Tensor:
        return self.alpha * x if self.normed_residual else h


class Transformer(nn.Module):
    """Token ids to hidden states; `logits` turns hidden states into scores over the vocabulary.

    A new one holds no meaningful weights: load them, or call `init_weights`.

    kv_prefix: None, or keys and values that every token sees in front of its own, (2, n_layers, n_kv_heads, P,
    head_dim): a P-Tuning v2 prefix, set from outside. It takes no positions.
    """

    kv_prefix: Tensor | None

    def __init__(
        self, config: GLMConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device(device or "cpu"):
            self.embed = _table(config.vocab_size, config.dim)
            if config.positions == "learned":
                self.embed_position = _table(config.max_seq_len + 1, config.dim)
                self.embed_block = _table(config.max_seq_len + 1, config.dim)
            self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
            self.norm = make_norm(config)
            self.head: nn.Module | None = None
            if not config.tie_embeddings:
                self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("kv_prefix", None)
        if dtype is not None:
            self.to(dtype)
        # Not a buffer: .to(bfloat16) must not round it.
        self._inv_freq, self._rope_scale = _frequencies(config)

    def forward(self, batch: ForwardBatch, cache: Cache | None = None) -> Tensor:
        """Hidden states (B, T, D) after the final norm. With a cache, ids are the tokens behind the cached ones."""
        n_query = batch.ids.shape[1]
        h = self._embedded(batch)
        if cache is None and self.kv_prefix is not None:
            cache = KVCache(self.config, len(h), n_query, h.device, h.dtype, self.kv_prefix)
        offset = cache.offset if cache is not None else 0
        mask = visible(n_query, offset, batch.segments, batch.context, h.device)
        if mask is not None:
            # Once for all layers: the fused kernels want an additive mask in the dtype they compute in.
            kind = h.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=h.device).masked_fill_(~mask, float("-inf"))
        rope = self._angles(batch.positions)
        for block in self.layers:
            h = block(h, rope, mask, cache)
        if cache is not None:
            cache.advance(n_query)
        return self.norm(h)

    def _embedded(self, batch: ForwardBatch) -> Tensor:
        h = self.embed(batch.ids)
        if self.config.positions == "learned":
            h = h + self.embed_position(batch.positions[0]) + self.embed_block(batch.positions[1])
        return h

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.positions == "learned":
            return None
        if self._inv_freq.device != positions.device:
            self._inv_freq = self._inv_freq.to(positions.device)
        return rope_angles(positions, self._inv_freq, self._rope_scale)

    @property
    def device(self) -> torch.device:
        return self._norm_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; matrices may be quantised."""
        return self._norm_weight().dtype

    def _norm_weight(self) -> Tensor:
        assert isinstance(self.norm.weight, Tensor)
        return self.norm.weight

    def head_weight(self) -> Tensor:
        """(vocab_size, dim) output matrix: the head's own, or the embedding's when tied."""
        if self.head is None:
            return self.embed.weight
        assert isinstance(self.head.weight, Tensor), "a quantised head has no weight to train"
        return self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., vocab_size) float32."""
        if self.head is not None:
            return self.head(hidden).float()
        return F.linear(hidden, self.embed.weight).float()


def _frequencies(config: GLMConfig) -> tuple[Tensor, float]:
    """Inverse frequencies, and the factor on cos and sin."""
    rope, scale = config.rope, 1.0
    inv_freq = inverse_frequencies(config.rotary_dim, rope.theta, rope.axes, rope.freq_dtype == "float16")
    if rope.yarn_factor > 1.0:
        inv_freq, scale = yarn(inv_freq, rope.theta, rope.yarn_factor, rope.yarn_context)
    if rope.llama3_factor > 1.0:
        inv_freq = inv_freq / llama3_divisors(inv_freq, rope.llama3_factor, rope.llama3_context)
    return inv_freq / rope.position_scale, scale
