"""One frozen description of every decoder of the GLM family. Imports no torch.

    python -c "from openglm.presets import preset; print(preset('glm-4-9b'))"

The released generations differ in a few declarative choices; `Transformer` reads these fields and nothing else,
never a model's name. Layout differences between checkpoints (row order of QKV, order of the GLU halves, rotary
pairing) are undone when weights are loaded (`model/weights.py`), so they have no field here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

__all__ = ["GLMConfig", "RopeConfig", "from_dict", "nearest"]


def nearest(word: str, known: list[str]) -> str:
    """A hint such as " (did you mean 'dim'?)", or "" when nothing is close."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    theta: base of the inverse frequencies, in rotations per token.
    fraction: share of each head's dimensions that is rotated, from the first one on.
    axes: 1, one position per token; 2, position and block position share the rotated part (ChatGLM-6B).
    freq_dtype: GLM-130B and ChatGLM-6B store inverse frequencies rounded to half, which moves logits by 0.01.
    position_scale: positions are divided by it (linear interpolation, ChatGLM2-6B-32K).
    yarn_factor, yarn_context: YaRN: context longer by this factor than the yarn_context trained on; 1 is off.
    llama3_factor, llama3_context: likewise by the rule of Llama 3.1.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    axes: Literal[1, 2] = 1
    freq_dtype: Literal["float32", "float16"] = "float32"
    position_scale: float = 1.0
    yarn_factor: float = 1.0
    yarn_context: int = 0
    llama3_factor: float = 1.0
    llama3_context: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"rope.fraction must be in (0, 1], not {self.fraction}")
        if self.axes not in (1, 2):
            raise ValueError(f"rope.axes must be 1 or 2, not {self.axes}")
        if not 1.0 < self.theta < math.inf:
            raise ValueError(f"rope.theta must be above 1, not {self.theta}")
        if not all(1.0 <= x < math.inf for x in (self.position_scale, self.yarn_factor, self.llama3_factor)):
            raise ValueError("rope.position_scale, rope.yarn_factor and rope.llama3_factor must be 1 (off) or more")
        if self.yarn_factor > 1.0 and (self.yarn_context < 1 or self.axes != 1):
            raise ValueError("rope.yarn_factor needs rope.yarn_context, the context trained on, and one axis")
        if self.llama3_factor > 1.0 and (self.llama3_context < 1 or self.axes != 1 or self.yarn_factor > 1.0):
            raise ValueError("rope.llama3_factor goes with rope.llama3_context and one axis, not with YaRN")


@dataclass(frozen=True, kw_only=True)
class GLMConfig:
    """Shape and declarative choices of one decoder.

    One residual rule covers all (see `model/transformer.py`):
        x = norm1(h);  h = residual_alpha * (x if residual == "normed" else h) + post_norm(attention(x))
    and likewise for the MLP, with `post_norm` the identity unless `sandwich`.

    mask: "causal", or "prefix": tokens before the start-of-piece token see each other in both directions.
    positions: "rope", or "learned": two tables of max_seq_len + 1 rows (position, block position) are added to the
    embedding, as in the original GLM; `rope` is then not used.
    sop_position: where two axes freeze at a [gMASK], the position of <sop> itself: the mask's, or its own index, as in
    the first release of ChatGLM-6B, for which a [MASK] also goes before a [gMASK].
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_seq_len: int
    norm: Literal["layer", "rms"] = "rms"
    norm_eps: float = 1e-5
    residual: Literal["stream", "normed"] = "stream"
    residual_alpha: float = 1.0
    sandwich: bool = False
    mlp: Literal["gelu", "geglu", "swiglu"] = "swiglu"
    qkv_bias: bool = True
    linear_bias: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    positions: Literal["rope", "learned"] = "rope"
    mask: Literal["causal", "prefix"] = "causal"
    sop_position: Literal["mask", "index"] = "mask"
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        for name in ("sandwich", "qkv_bias", "linear_bias", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if not isinstance(self.norm_eps, (int, float)) or not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a small positive number, not {self.norm_eps!r}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if self.positions == "rope" and self.rotary_dim % (2 * self.rope.axes):
            raise ValueError(f"rotated dimensions ({self.rotary_dim}) do not split into pairs on {self.rope.axes} axes")
        if self.residual == "stream" and self.residual_alpha != 1.0:
            raise ValueError("residual_alpha other than 1 goes with residual='normed' (DeepNorm)")
        if self.residual == "normed" and self.sandwich:
            raise ValueError("sandwich norms go with residual='stream'")
        if self.n_axes == 2 and self.mask != "prefix":
            raise ValueError("two position axes go with mask='prefix': block positions start at start-of-piece")

    @property
    def n_axes(self) -> int:
        """Positions of a token: 2 where a block position goes with it."""
        return 2 if self.positions == "learned" else self.rope.axes

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of each head."""
        return round(self.head_dim * self.rope.fraction)

    @property
    def qkv_dim(self) -> int:
        """Rows of the fused [Q | K | V] projection."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)


_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("layer", "rms"),
    "residual": ("stream", "normed"),
    "mlp": ("gelu", "geglu", "swiglu"),
    "positions": ("rope", "learned"),
    "mask": ("causal", "prefix"),
    "sop_position": ("mask", "index"),
}


def from_dict(values: dict[str, Any]) -> GLMConfig:
    """GLMConfig from a plain dict; unknown keys are an error that names the nearest field."""
    values = dict(values)
    rope = values.pop("rope", {})
    for cls, given in ((GLMConfig, values), (RopeConfig, rope)):
        known = [f.name for f in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(f"unknown {cls.__name__} field {key!r}{nearest(key, known)}")
    try:
        return GLMConfig(rope=RopeConfig(**cast(dict[str, Any], rope)), **values)
    except TypeError as error:
        raise ValueError(f"model config: {error}") from None
