"""Attention over queries, keys and values; which token sees which. Knows tensors, no config.

`attention` is the fast path (PyTorch's fused kernels), `attention_reference` the plain formula with one signature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention", "attention_reference", "visible"]

UNFUSED_MAX_TOKENS = 1024  # rows up to this long train faster on a CPU with the scores in memory


def visible(
    n_query: int,
    offset: int,
    segments: Tensor | None,
    context: Tensor | None,
    device: torch.device | str | None = None,
) -> Tensor | None:
    """Which key each query may look at, or None where plain causal (or everything, for one query) says it all.

    n_query: T, tokens of this pass; offset: tokens already cached, seen by every query.
    segments: (B, T) or None; a token sees its own segment only. context: (B, T) bool or None; visible to all.
    Returns (B or 1, 1, T, offset + T) bool, True = visible. A token always sees itself, so no row is empty.
    """
    if segments is None and context is None and (offset == 0 or n_query == 1):
        return None
    if segments is not None:
        device = segments.device
    elif context is not None:
        device = context.device
    causal = torch.ones(n_query, n_query, dtype=torch.bool, device=device).tril()
    mask = causal[None]
    if context is not None:
        mask = mask | context[:, None, :]
    if segments is not None:
        assert offset == 0, "packed rows are not continued from a cache"
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    if offset:
        mask = F.pad(mask, (offset, 0), value=True)
    return mask[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped keys and values.

    q: (B, H, T, D); k, v: (B, G, S, D) with G dividing H. mask: from `visible`, bool or additive in q's dtype;
    None is causal when T == S and unmasked when T == 1. Returns (B, H, T, D) in q's dtype; softmax in float32.
    """
    groups = q.shape[1] // k.shape[1]
    causal = mask is None and q.shape[2] > 1
    if q.device.type == "cpu" and q.requires_grad and q.dtype == torch.bfloat16 and q.shape[2] <= UNFUSED_MAX_TOKENS:
        return _unfused(q, k, v, mask)
    if groups > 1 and q.device.type == "cpu":
        # The CPU kernel takes no grouped keys and would fall back to the unfused formula.
        k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
        groups = 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)


def _unfused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Two batched products around a softmax; on CPUs with bf16 matrix units twice as fast to train as the fused one.

    Query heads of one group are stacked along the token axis, so keys and values are never repeated.
    """
    n_rows, n_heads, n_query, head_dim = q.shape
    n_groups, n_keys = k.shape[1], k.shape[2]
    stacked = (q * head_dim**-0.5).reshape(n_rows, n_groups, -1, head_dim)
    scores = (stacked @ k.transpose(-1, -2)).view(n_rows, n_heads, n_query, n_keys)
    if mask is None:
        hidden = torch.ones(n_query, n_keys, dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill_(hidden, float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, float("-inf"))
    else:
        scores = scores.add_(mask)
    weights = scores.softmax(-1).view(n_rows, n_groups, -1, n_keys)  # accumulates in float32 inside
    return (weights @ v).view(n_rows, n_heads, n_query, head_dim)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formula itself, same signature as `attention`; for tests and for devices without a fused kernel."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q.float() @ k.float().transpose(-1, -2)) / q.shape[-1] ** 0.5
    if mask is None:
        if q.shape[2] > 1:
            hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
