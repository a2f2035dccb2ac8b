"""Plan: what each weight becomes on its way through a conversion, and the shards that it goes into.

    python -m pytest -q tests/test_convert.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from openglm.model.opened import OpenedModel
from openglm.model.writer import OutputFolder
from openglm.ops.quant import QuantTensor, Weight, floats
from openglm.quant import QuantSpec, quantise
from openglm.quant.calibrate import Calibration
from openglm.quant.embedded import FIRST_QKV, second_moment
from openglm.quant.gptq import gptq

__all__ = ["Plan", "write_shards"]

SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Plan:
    """One conversion: what each weight becomes on its way. calibration: gives the blocks' tensors, if by text."""

    opened: OpenedModel
    spec: QuantSpec | None
    dtype: torch.dtype | None
    shapes: dict[str, tuple[int, ...]]
    calibration: Calibration | None = None

    def weight(self, name: str) -> Weight:
        """The weight of our name as it is stored: quantised when asked for, floats in `dtype`."""
        if self.calibration is not None and name.startswith("layers."):
            weight = self.calibration.weight(name)
            return weight if isinstance(weight, QuantTensor) else weight.to(self.dtype or self.calibration.dtype(name))
        weight = self.opened.get(name)
        spec = None if self.spec is None else self.spec.of(name, tuple(weight.shape))
        if spec is not None:
            try:
                if name == FIRST_QKV and spec.method == "mse":
                    return _first_qkv(self.opened, floats(weight, torch.float32), spec)
                return quantise(floats(weight, torch.float32), spec)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return weight if isinstance(weight, QuantTensor) or self.dtype is None else weight.to(self.dtype)

    def n_bytes(self, name: str) -> int:
        """About what it takes, to cut shards of even size."""
        shape = self.shapes[name]
        spec = None if self.spec is None else self.spec.of(name, shape)
        return 2 * math.prod(shape) if spec is None else spec.n_bytes(shape)


def _first_qkv(opened: OpenedModel, weight: Tensor, spec: QuantSpec) -> QuantTensor:
    """By what it sees, which the embedding table tells; without that, like the other matrices."""
    plain = quantise(weight, spec)  # raises for what cannot be stored
    hessian = second_moment(opened)
    return plain if hessian is None else gptq(weight, hessian, spec)


def _shards(plan: Plan) -> list[list[str]]:
    """Our tensor names in groups of about SHARD_BYTES."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in plan.opened.names():
        n = plan.n_bytes(name)
        if groups[-1] and size + n > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += n
    return groups


def _shard_name(i: int, n: int) -> str:
    return "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"


def _index(weight_map: dict[str, str], n_bytes: int) -> bytes:
    return (json.dumps({"metadata": {"total_size": n_bytes}, "weight_map": weight_map}, indent=1) + "\n").encode()


def write_shards(out: OutputFolder, plan: Plan, tensors: Callable[[str], Iterable[tuple[str, Tensor]]]) -> int:
    """All shards and their index; `tensors` gives the named tensors of one of ours. Returns how many tensors."""
    groups = _shards(plan)
    weight_map: dict[str, str] = {}
    with tqdm(total=len(plan.shapes), desc="convert", unit="tensor", delay=2, leave=False) as bar:
        for i, group in enumerate(groups):
            name = _shard_name(i, len(groups))

            def walk(group: list[str] = group) -> Iterator[tuple[str, Tensor]]:
                for ours in group:
                    yield from tensors(ours)
                    bar.update()

            stored = out.write_shard(name, walk(), 3 * len(group))
            weight_map |= dict.fromkeys(stored, name)
    if len(groups) > 1:
        n_bytes = sum(entry["bytes"] for entry in out.sums.values() if entry["tensors"])
        out.write_bytes("model.safetensors.index.json", _index(weight_map, n_bytes))
    return len(weight_map)
