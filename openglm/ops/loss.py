"""Cross-entropy straight from hidden states: the logits of a large vocabulary never exist whole.

Gradients are computed in the forward pass, a chunk of tokens at a time, so memory is one chunk of logits instead of
all of them several times over, and the head's matrix products are done once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MB in float32, which stays in the last-level cache of a CPU

# Token counts are rounded up to this, so that a CPU meets a few shapes of matrix product and not a new one every
# step: oneDNN compiles and keeps a kernel for each (about 4 MB), which looks like a leak of gigabytes.
ROUND_TOKENS = 64


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token losses, and each token's own loss.

    hidden: (N, D); weight: (V, D); targets: (N,) int64, none of them IGNORE; weights: (N,) float32, default 1.
    chunk: tokens at a time; default keeps about 4M logits. Matrix products run in the autocast dtype, softmax in
    float32. Returns (scalar float32, differentiable; (N,) float32 in nats, detached and unweighted).
    """
    if weights is None:
        weights = hidden.new_ones(hidden.shape[0], dtype=torch.float32)
    if chunk is None:
        chunk = max(64, CHUNK_ELEMENTS // weight.shape[0])
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    total, losses = _LinearCrossEntropy.apply(hidden, weight, targets, weights, chunk, dtype)
    return total, losses


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same by the plain formula, with all logits at once."""
    losses = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    return (losses if weights is None else losses * weights).sum(), losses.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, chunk: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            need_hidden, need_weight = ctx.needs_input_grad[:2]
            n_tokens = hidden.shape[0]
            if extra := -n_tokens % ROUND_TOKENS:  # tokens of weight 0
                hidden, targets = F.pad(hidden, (0, 0, 0, extra)), F.pad(targets, (0, extra))
                weights = F.pad(weights, (0, extra))
            w = weight.to(dtype)
            losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
            # Buffers live across chunks: fresh large allocations cost more in page faults than the arithmetic.
            low = torch.empty(min(chunk, hidden.shape[0]), weight.shape[0], dtype=dtype, device=hidden.device)
            high = torch.empty_like(low, dtype=torch.float32)
            for start in range(0, hidden.shape[0], chunk):
                part = slice(start, start + chunk)
                h = hidden[part].to(dtype)
                low, high = low[: h.shape[0]], high[: h.shape[0]]
                logits = high.copy_(torch.mm(h, w.T, out=low))
                logits -= logits.amax(dim=-1, keepdim=True)
                target = targets[part, None]
                chosen = logits.gather(1, target)
                exp = logits.exp_()
                total = exp.sum(dim=-1, keepdim=True)
                losses[part] = (total.log() - chosen)[:, 0]
                if not (need_hidden or need_weight):
                    continue
                w_part = weights[part, None]
                grad = low.copy_(exp.mul_(w_part / total).scatter_add_(1, target, -w_part))  # w * (softmax - one-hot)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad @ w).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += grad.T @ h
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype, ctx.n_tokens = weight.dtype, n_tokens
            total_loss, losses = (losses * weights).sum(), losses[:n_tokens]
            ctx.mark_non_differentiable(losses)
            return total_loss, losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden[: ctx.n_tokens] * grads[0]
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None
