"""Random weights of a preset's shape, quantised or not, as a checkpoint that no file holds.

    python -m openglm inspect "random:glm-4-9b?quantize=int4"

"random:PRESET?key=value&..." names one. Keys: fields of GLMConfig that are numbers; `seed`; and, as options of
`openglm convert`, quantize, group, symmetric (1), embeddings and head. Embedding and head go with INT8 by default where
the rest is quantised: random ones have no quality to lose. Each tensor is drawn when it is asked for, from a generator
of its own, so a model of any size holds no more than a few unquantised tensors at a time while it is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from openglm.config import GLMConfig, nearest
from openglm.model.checkpoint import CheckpointMeta
from openglm.model.init import init_tensor
from openglm.model.opened import OpenedModel
from openglm.model.sources import Weight
from openglm.model.transformer import Transformer
from openglm.presets import parse_preset
from openglm.quant.rounding import quantise
from openglm.quant.spec import QuantSpec

__all__ = ["RandomSource", "open_random"]

PREFIX = "random:"
KEYS = ("quantize", "group", "symmetric", "embeddings", "head", "seed")


class RandomSource:
    """A Source of weights drawn as `init_weights` would; bfloat16 where `spec` quantises nothing.

    The same seed gives the same values, quantised or not: quantised ones are the unquantised ones, rounded (absmax).
    """

    def __init__(self, config: GLMConfig, spec: QuantSpec | None = None, seed: int = 0) -> None:
        self.config, self.spec, self.seed = config, spec, seed
        meta = Transformer(config, device="meta").state_dict()
        self._shapes = {name: tuple(t.shape) for name, t in meta.items()}
        self._numbers = {name: i for i, name in enumerate(meta)}
        for name in self._shapes:
            self._spec_of(name)  # groups that do not fit are found here

    def _spec_of(self, name: str) -> QuantSpec | None:
        return None if self.spec is None else self.spec.of(name, self._shapes[name])

    def names(self) -> Iterable[str]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def stored(self, name: str) -> list[tuple[str, int]]:
        spec, shape = self._spec_of(name), self._shapes[name]
        return [("bfloat16", 2 * math.prod(shape)) if spec is None else (f"int{spec.bits}", spec.n_bytes(shape))]

    def get(self, name: str) -> Weight:
        weight, spec = torch.empty(self._shapes[name]), self._spec_of(name)
        generator = torch.Generator().manual_seed((self.seed << 16) + self._numbers[name])
        init_tensor(name, weight, self.config, generator)
        weight = weight.bfloat16()
        return weight if spec is None else quantise(weight, spec)


def open_random(reference: str) -> OpenedModel:
    """The model that "random:PRESET?key=value&..." names. Raises ValueError naming what is wrong with a key."""
    name, _, query = reference.removeprefix(PREFIX).partition("?")
    own: dict[str, str] = {}
    rest = []
    known = [*(f.name for f in dataclasses.fields(GLMConfig)), *KEYS]
    for part in filter(None, query.split("&")):
        key, separator, value = part.partition("=")
        if separator and key not in known:
            raise ValueError(f"{reference}: unknown key {key!r}{nearest(key, known)}")
        if separator and key in KEYS:
            own[key] = value
        else:
            rest.append(part)
    config = parse_preset(f"{name}?{'&'.join(rest)}")
    source = RandomSource(config, _spec(reference, own), _whole(own.get("seed", "0"), f"{reference}: seed"))
    return OpenedModel(Path(reference), "random", config, CheckpointMeta(), source)


def _spec(reference: str, own: dict[str, str]) -> QuantSpec | None:
    """What the keys ask for."""
    if "quantize" not in own:
        lone = [key for key in KEYS[1:-1] if key in own]
        if lone:
            raise ValueError(f"{reference}: {lone[0]} goes with quantize=int4 or int8")
        return None
    symmetric = bool(_whole(own.get("symmetric", "0"), f"{reference}: symmetric"))
    parts = (own.get("embeddings", "int8"), own.get("head", "int8"))
    return QuantSpec.parse(own["quantize"], own.get("group"), symmetric, "absmax", *parts)


def _whole(text: str, what: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{what} is a whole number, not {text!r}")
    return int(text)
