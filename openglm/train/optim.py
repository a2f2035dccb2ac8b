"""AdamW and Muon behind one object: step, clip, and a state that is a flat dict of named tensors.

Parameters are the fp32 master copy; bf16 and fp16 exist only inside autocast. Muon (Jordan et al. 2024) replaces the
momentum of a matrix by its nearest semi-orthogonal one; its update is scaled to AdamW's usual size as in Moonlight
(Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so that both share learning rate and decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openglm.config import GLMConfig
from openglm.train.config import OptimizerConfig

__all__ = ["Muon", "Optimizer", "matrix_blocks", "newton_schulz"]

# Quintic that drives singular values into about [0.7, 1.2] in five steps; steep at zero rather than exact at one.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5


def newton_schulz(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(n, rows, cols) -> the same shape in `dtype`: U V^T of each matrix's SVD, singular values within 0.7..1.2."""
    a, b, c = NS_COEFFICIENTS
    x = matrices.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (matrices.norm(dim=(-2, -1), keepdim=True).to(dtype) + 1e-7)
    for _ in range(NS_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def matrix_blocks(name: str, rows: int, config: GLMConfig) -> tuple[int, ...]:
    """Row counts of the matrices that are fused in a weight: [Q | K | V] and [gate | up]; else the one."""
    if name.endswith("attn.qkv.weight"):
        return (
            config.n_heads * config.head_dim,
            config.n_kv_heads * config.head_dim,
            config.n_kv_heads * config.head_dim,
        )
    if name.endswith("mlp.up.weight") and config.mlp != "gelu":
        return (rows // 2, rows // 2)
    return (rows,)


class Muon:
    """Momentum orthogonalised by Newton-Schulz for 2-D weights; equal shapes go through one batched product.

        m = momentum * m + g;  u = g + momentum * m (Nesterov)
        w = w * (1 - lr * weight_decay) - lr * 0.2 * sqrt(max(rows, cols)) * orthogonal(u)

    Fused weights are orthogonalised matrix by matrix (`blocks`: row counts by name).
    """

    MOMENTUM = 0.95
    RMS = 0.2  # root mean square of an AdamW update, which the orthogonal one is scaled to

    def __init__(self, params: Mapping[str, nn.Parameter], blocks: Mapping[str, tuple[int, ...]], decay: float) -> None:
        self.params, self.weight_decay = dict(params), decay
        self.momentum = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self._groups: dict[tuple[int, int], list[tuple[str, slice]]] = {}
        for name, p in self.params.items():
            start = 0
            for rows in blocks.get(name, (p.shape[0],)):
                self._groups.setdefault((rows, p.shape[1]), []).append((name, slice(start, start + rows)))
                start += rows
            assert start == p.shape[0], f"blocks of {name} do not add up"

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients; parameters without one are left alone."""
        nesterov: dict[str, Tensor] = {}
        for name, p in self.params.items():
            if p.grad is not None:
                m = self.momentum[name].mul_(self.MOMENTUM).add_(p.grad)
                # bf16 is what Newton-Schulz computes in; the sum itself is rounded once.
                nesterov[name] = torch.add(p.grad, m, alpha=self.MOMENTUM).to(torch.bfloat16)
        for (rows, cols), members in self._groups.items():
            live = [(name, part) for name, part in members if name in nesterov]
            scale = self.RMS * math.sqrt(max(rows, cols))
            limit = max(1, GROUP_ELEMENTS // (rows * cols))
            for start in range(0, len(live), limit):
                some = live[start : start + limit]
                updates = newton_schulz(torch.stack([nesterov[name][part] for name, part in some]))
                for (name, part), update in zip(some, updates, strict=True):
                    self.params[name][part].mul_(1 - lr * self.weight_decay).add_(update.float(), alpha=-lr * scale)


GROUP_ELEMENTS = 1 << 22  # elements in one batched product: keeps Muon's scratch memory small beside the model


class Optimizer:
    """AdamW, or Muon for the blocks' matrices with AdamW for embeddings, head, biases and norms.

    Decay is decoupled and off for 1-D tensors. A tied head is one parameter. State names: "step.NAME",
    "exp_avg.NAME" and "exp_avg_sq.NAME", or "momentum.NAME"; and "updates", the number of applied steps.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, model_config: GLMConfig) -> None:
        self.config = config
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = {
            name: p
            for name, p in self.params.items()
            if config.name == "muon" and p.ndim == 2 and name not in ("embed.weight", "head.weight")
        }
        blocks = {name: matrix_blocks(name, p.shape[0], model_config) for name, p in matrices.items()}
        self.muon = Muon(matrices, blocks, config.weight_decay)
        self._adam_params = {name: p for name, p in self.params.items() if name not in matrices}
        decayed = [p for p in self._adam_params.values() if p.ndim >= 2]
        plain = [p for p in self._adam_params.values() if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        kind = next(iter(self.params.values())).device.type
        self.adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps,
            fused=kind in ("cpu", "cuda"),
        )  # fmt: skip
        for p in self._adam_params.values():  # made now, so that the state is whole from the first checkpoint on
            self.adam.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device if p.is_cuda else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.updates = 0

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients, a scalar tensor."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    @torch.no_grad()
    def scale_grads(self, factor: float | Tensor) -> None:
        """Multiply all gradients in place (clipping and un-scaling)."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        torch._foreach_mul_(grads, factor)

    def step(self, lr_factor: float) -> None:
        """One update with the peak rates times `lr_factor`."""
        for group in self.adam.param_groups:
            group["lr"] = self.config.lr * lr_factor
        self.adam.step()
        if self.muon.params:
            self.muon.step((self.config.muon_lr or self.config.lr) * lr_factor)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """References to the live state tensors (copy before the next step)."""
        state: dict[str, Tensor] = {"updates": torch.tensor(self.updates)}
        state |= {f"momentum.{name}": m for name, m in self.muon.momentum.items()}
        for name, p in self._adam_params.items():
            state |= {f"{key}.{name}": value for key, value in self.adam.state[p].items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state in. Raises ValueError when it belongs to other parameters or another optimizer."""
        live = self.state_dict()
        for key in (*live, *state):
            if key not in state or key not in live:
                raise ValueError(
                    f"the checkpoint's optimizer and this run's differ ({key}): keep optimizer.name, or --resume never"
                )
            if live[key].shape != state[key].shape:
                raise ValueError(
                    f"optimizer state {key} has shape {tuple(state[key].shape)}, this model needs "
                    f"{tuple(live[key].shape)}: use another run_dir, or --resume never"
                )
        for key, tensor in live.items():
            tensor.copy_(state[key])
        self.updates = int(state["updates"])


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes held by tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
