"""QuantSpec: what a matrix is stored as, and how its integers and scales are found.

    python -m openglm convert MODEL OUT --format openglm --quantize int4
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

__all__ = ["CALIBRATED", "METHODS", "Method", "QuantSpec"]

Bits = Literal[0, 4, 8]
Method = Literal["absmax", "mse", "gptq", "awq"]
METHODS: tuple[Method, ...] = ("absmax", "mse", "gptq", "awq")
CALIBRATED = ("gptq", "awq")  # methods that need text
BITS = {"none": 0, "int4": 4, "int8": 8}


@dataclass(frozen=True)
class QuantSpec:
    """How matrices are stored.

    bits: 4 or 8. group: columns that share a scale, None for a whole row (GLM-130B). symmetric: scale alone; else scale
    and minimum. None: INT8 and whole rows are symmetric, INT4 in groups is not. embeddings, head: bits of these two,
    0 leaves them as they are; a tied matrix goes by `embeddings`.
    method: "absmax" rounds to nearest on the range of the values; "mse" searches the range with the least squared
    error, and goes by the embedding table in the first block's qkv (openglm.quant.embedded); "gptq" and "awq" run text
    through the model (openglm.quant.calibrate). None: "absmax", which is what GLM-130B does, but for INT4 in groups:
    "gptq" where `convert` can read text for the model, else "mse".
    Raises ValueError for what does not go together.
    """

    bits: Literal[4, 8] = 4
    group: int | None = 32
    symmetric: bool | None = None
    embeddings: Bits = 0
    head: Bits = 0
    method: Method | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"quantisation to {self.bits} bits is not supported: int4 or int8")
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise ValueError(f"a group must be an even number of columns, or row, not {self.group}")
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self.bits == 8 or self.group is None)
        if self.bits == 8 and not self.symmetric:
            raise ValueError("INT8 is symmetric: its integers are signed")
        if self.embeddings not in BITS.values() or self.head not in BITS.values():
            raise ValueError(f"embeddings and head have 0, 4 or 8 bits, not {self.embeddings} and {self.head}")
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: give one of {', '.join(METHODS)}")

    @classmethod
    def parse(
        cls, name: str, group: str | None = None, symmetric: bool = False, method: str | None = None,
        embeddings: str = "none", head: str = "none",
    ) -> QuantSpec:  # fmt: skip
        """From the words of the command line: int4 or int8, a number of columns or "row", none, int4 or int8."""
        if name not in ("int4", "int8"):
            raise ValueError(f"unknown quantisation {name!r}: give int4 or int8")
        if group is not None and group != "row" and not group.isdecimal():
            raise ValueError(f"a group is a number of columns or row, not {group!r}")
        for part, word in (("embeddings", embeddings), ("head", head)):
            if word not in BITS:
                raise ValueError(f"{part} are stored as {', '.join(BITS)}, not {word!r}")
        width = 32 if group is None else None if group == "row" else int(group)
        return cls(
            cast(Literal[4, 8], BITS[name]), width, True if symmetric else None, cast(Bits, BITS[embeddings]),
            cast(Bits, BITS[head]), cast("Method | None", method),
        )  # fmt: skip

    def resolved(self, text: bool) -> QuantSpec:
        """With its method chosen. text: whether the model can be calibrated."""
        if self.method is not None:
            return self
        return replace(self, method=("gptq" if text else "mse") if self.searched else "absmax")

    @property
    def calibrated(self) -> bool:
        return self.method in CALIBRATED

    @property
    def searched(self) -> bool:
        """Whether ranges are those of least error, not those of the values."""
        return self.method != "absmax" if self.method is not None else self.bits == 4 and self.group is not None

    def of(self, name: str, shape: tuple[int, ...]) -> QuantSpec | None:
        """The spec of the tensor of that name (ours), its bits chosen; None where it is not quantised.

        Embedding and head see no calibration: their range is searched. Raises ValueError when groups do not fit.
        """
        if len(shape) != 2 or name.startswith(("embed_position", "embed_block")):
            return None
        spec: QuantSpec = self
        if name in ("embed.weight", "head.weight"):
            bits = self.embeddings if name == "embed.weight" else self.head
            if not bits:
                return None
            symmetric = True if bits == 8 or self.bits == 8 else self.symmetric
            spec = replace(self, bits=bits, symmetric=symmetric, method="mse" if self.searched else "absmax")
        if shape[1] % (self.group or 2):
            raise ValueError(f"{name} has {shape[1]} columns, which groups of {self.group or 2} do not divide")
        return spec

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a matrix of this shape takes."""
        n_groups = 1 if self.group is None else shape[1] // self.group
        return shape[0] * (shape[1] * self.bits // 8 + n_groups * (2 if self.symmetric else 4))
