"""AdamW and Muon against plain float64 implementations."""

from __future__ import annotations

import math

import pytest
import torch

from openglm.train.optim import matrix_blocks, newton_schulz
from tests.train_helpers import SHAPE, tiny_config, tiny_trainer


def test_newton_schulz_gives_nearly_orthogonal_matrices_of_the_same_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16), (1, 32, 32)):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, _, vt = torch.linalg.svd(g, full_matrices=False)
        ours = newton_schulz(g, torch.float64)
        assert torch.linalg.svdvals(ours).sub(1.0).abs().max() < 0.4
        # U V^T and ours share their singular vectors: U^T ours V is diagonal.
        core = u.mT @ ours @ vt.mT
        assert (core - torch.diag_embed(torch.diagonal(core, dim1=-2, dim2=-1))).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_equal_a_plain_float64_implementation(name: str) -> None:
    lr, decay, steps = 2e-3, 0.1, 4
    config = tiny_config(optimizer={"name": name, "lr": lr, "weight_decay": decay, "grad_clip": 0.0})
    optimizer = tiny_trainer(config).optimizer
    generator = torch.Generator().manual_seed(1)
    plain = {n: p.detach().double().clone() for n, p in optimizer.params.items()}
    first = {n: torch.zeros_like(p) for n, p in plain.items()}
    second = {n: torch.zeros_like(p) for n, p in plain.items()}
    for t in range(1, steps + 1):
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in plain.items()}
        for n, p in optimizer.params.items():
            p.grad = grads[n].clone()
        optimizer.step(0.5)
        for n, q in plain.items():
            g, rate = grads[n].double(), 0.5 * lr
            if name == "muon" and q.ndim == 2 and n != "embed.weight":
                first[n] = 0.95 * first[n] + g
                q.mul_(1 - rate * decay)
                start = 0
                for rows in matrix_blocks(n, q.shape[0], SHAPE):
                    update = newton_schulz((g + 0.95 * first[n])[None, start : start + rows], torch.float64)[0]
                    q[start : start + rows] -= rate * 0.2 * math.sqrt(max(rows, q.shape[1])) * update
                    start += rows
                continue
            if q.ndim >= 2:
                q.mul_(1 - rate * decay)
            first[n] = 0.9 * first[n] + 0.1 * g
            second[n] = 0.95 * second[n] + 0.05 * g * g
            q -= rate * (first[n] / (1 - 0.9**t)) / ((second[n] / (1 - 0.95**t)).sqrt() + 1e-8)
    tolerance = 2e-4 if name == "muon" else 2e-6  # Newton-Schulz runs in bf16
    for n, p in optimizer.params.items():
        torch.testing.assert_close(p.detach().double(), plain[n], rtol=0, atol=tolerance, msg=n)


def test_a_state_of_another_optimizer_is_refused() -> None:
    adam = tiny_trainer(tiny_config(optimizer={"name": "adamw", "lr": 1e-3})).optimizer
    muon = tiny_trainer(tiny_config(optimizer={"name": "muon", "lr": 1e-3})).optimizer
    with pytest.raises(ValueError, match="keep optimizer.name"):
        muon.load_state_dict(adam.state_dict())
