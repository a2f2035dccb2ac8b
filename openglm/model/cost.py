"""What a config costs: parameters, floating-point operations, bytes. Pure arithmetic, no torch.

    python -c "from openglm.model.cost import n_parameters; from openglm.presets import preset; \
               print(n_parameters(preset('chatglm-6b')))"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from openglm.config import GLMConfig

__all__ = [
    "PRECISION_BYTES", "QUANTISED_BITS", "RankTensor", "WeightForm", "check_ranks", "flops_per_token",
    "is_small", "kv_bytes_per_token", "kv_heads_per_rank", "n_parameters", "parameters_by_part", "rank_tensors",
    "weight_bytes_by_part",
]  # fmt: skip

PRECISION_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
QUANTISED_BITS = {"int8": 8, "int4": 4}
SCALE_BYTES = 2  # float16
SMALL = 3_000_000_000  # parameters; that guiding helps was measured at 1.5 billion, larger ones were not tried


def parameters_by_part(config: GLMConfig) -> dict[str, int]:
    """Parameter counts by part: embedding, attention, mlp, norm, head (0 when tied); they add up to the model."""
    c, bias = config, config.linear_bias
    attention_dim = c.n_heads * c.head_dim
    qkv = c.qkv_dim * (c.dim + c.qkv_bias)
    out = c.dim * (attention_dim + bias)
    n_up = 1 if c.mlp == "gelu" else 2
    mlp = n_up * c.ffn_dim * (c.dim + bias) + c.dim * (c.ffn_dim + bias)
    norm = c.dim * (2 if c.norm == "layer" else 1)
    return {
        "embedding": (c.vocab_size + (2 * (c.max_seq_len + 1) if c.positions == "learned" else 0)) * c.dim,
        "attention": c.n_layers * (qkv + out),
        "mlp": c.n_layers * mlp,
        "norm": norm * (c.n_layers * (4 if c.sandwich else 2) + 1),
        "head": 0 if c.tie_embeddings else c.vocab_size * c.dim,
    }


def n_parameters(config: GLMConfig) -> int:
    """All parameters, a tied head counted once."""
    return sum(parameters_by_part(config).values())


def is_small(config: GLMConfig) -> bool:
    """Whether a model of this shape has so few parameters that an agent does well to lead it."""
    return n_parameters(config) < SMALL


def flops_per_token(config: GLMConfig, seq_len: int, head_share: float = 1.0) -> float:
    """Floating-point operations of one token's forward pass (2 per multiply-add); training takes three times as many.

    Attention counts every key of a `seq_len` context (a causal kernel may do half). head_share: share of tokens that
    go through the output matrix.
    """
    parts = parameters_by_part(config)
    matrices = parts["attention"] + parts["mlp"] + head_share * config.vocab_size * config.dim
    return 2.0 * matrices + 4.0 * config.n_layers * config.n_heads * config.head_dim * seq_len


def kv_bytes_per_token(config: GLMConfig, bytes_per_value: float = 2.0) -> int:
    """Bytes of keys and values that one token leaves in the cache, over all layers."""
    return int(2 * config.n_layers * config.n_kv_heads * config.head_dim * bytes_per_value)


# -------------------------------------------------------------------- bytes of weights, whole and cut for ranks


@dataclass(frozen=True, kw_only=True)
class WeightForm:
    """How weights are stored.

    precision: "fp32", "fp16" or "bf16", of everything that is not quantised. quantize: None, "int8" or "int4": the
    four matrices of every block, packed, with a float16 scale for each `group` columns of a row (None: the whole row,
    as in GLM-130B and ChatGLM). minimum: a float16 minimum beside each scale (GGUF's Q4_1 and Q4_K).
    embeddings: the embedding and the head are quantised too.
    """

    precision: str = "fp16"
    quantize: str | None = None
    group: int | None = 32
    minimum: bool = False
    embeddings: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISION_BYTES:
            raise ValueError(f"precision must be one of {', '.join(PRECISION_BYTES)}, not {self.precision!r}")
        if self.quantize is not None and self.quantize not in QUANTISED_BITS:
            raise ValueError(f"quantize must be one of {', '.join(QUANTISED_BITS)}, not {self.quantize!r}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be at least 1 column, or a whole row, not {self.group}")

    def quantises(self, tensor: RankTensor) -> bool:
        if self.quantize is None or not tensor.matrix:
            return False
        return self.embeddings or tensor.part not in ("embedding", "head")

    def n_bytes(self, tensor: RankTensor) -> int:
        """Bytes of one such tensor; a group that a rank's edge cuts has a scale on either side."""
        if self.quantize is None or not self.quantises(tensor):
            return tensor.rows * tensor.columns * PRECISION_BYTES[self.precision]
        packed = -(-tensor.columns * QUANTISED_BITS[self.quantize] // 8)
        groups = 1 if self.group is None else -(-tensor.columns // self.group)
        return tensor.rows * (packed + groups * SCALE_BYTES * (2 if self.minimum else 1))


@dataclass(frozen=True)
class RankTensor:
    """`count` equal tensors (rows, columns) that one rank holds; biases and norms are one row, never quantised."""

    part: Literal["embedding", "attention", "mlp", "norm", "head"]
    rows: int
    columns: int
    count: int
    matrix: bool = True


def check_ranks(config: GLMConfig, tp: int) -> None:
    """ValueError naming the cause when `tp` tensor-parallel ranks cannot share the model equally."""
    if tp < 1:
        raise ValueError(f"tensor parallelism needs at least 1 rank, not {tp}")
    kv = config.n_kv_heads
    checks = [
        (config.n_heads % tp, f"{config.n_heads} attention heads"),
        (min(kv % tp, tp % kv), f"{kv} key-value heads"),
        (config.ffn_dim % tp, f"the MLP's {config.ffn_dim} inner dimensions"),
        (config.vocab_size % tp, f"the vocabulary's {config.vocab_size} rows"),
    ]
    for rest, what in checks:
        if rest:
            raise ValueError(f"{what} do not divide among {tp} ranks: choose another tensor-parallel size")


def kv_heads_per_rank(config: GLMConfig, tp: int) -> int:
    """Key-value heads that a rank holds: its share, or one, held by several ranks, when there are fewer than ranks."""
    return max(1, config.n_kv_heads // tp)


def rank_tensors(config: GLMConfig, tp: int = 1) -> Iterator[RankTensor]:
    """What one of `tp` ranks holds. Raises ValueError when they do not divide the model.

    The rule of Megatron-LM (Shoeybi et al. 2019): qkv and the MLP's up matrix are cut by rows with their biases, the
    attention output and the MLP's down matrix by columns; their biases, norms and learned position tables are held by
    every rank; embedding and head are cut by rows.
    """
    check_ranks(config, tp)
    c, n = config, config.n_layers
    heads = c.n_heads // tp * c.head_dim
    qkv = heads + 2 * kv_heads_per_rank(c, tp) * c.head_dim
    ffn = c.ffn_dim // tp
    up = ffn if c.mlp == "gelu" else 2 * ffn
    yield RankTensor("embedding", c.vocab_size // tp, c.dim, 1)
    if c.positions == "learned":
        yield RankTensor("embedding", c.max_seq_len + 1, c.dim, 2, matrix=False)
    yield RankTensor("attention", qkv, c.dim, n)
    yield RankTensor("attention", c.dim, heads, n)
    yield RankTensor("mlp", up, c.dim, n)
    yield RankTensor("mlp", c.dim, ffn, n)
    if c.qkv_bias:
        yield RankTensor("attention", 1, qkv, n, matrix=False)
    if c.linear_bias:
        yield RankTensor("attention", 1, c.dim, n, matrix=False)
        yield RankTensor("mlp", 1, up + c.dim, n, matrix=False)
    n_norms = (4 if c.sandwich else 2) * n + 1
    yield RankTensor("norm", 1, c.dim, n_norms * (2 if c.norm == "layer" else 1), matrix=False)
    if not c.tie_embeddings:
        yield RankTensor("head", c.vocab_size // tp, c.dim, 1)


def weight_bytes_by_part(config: GLMConfig, form: WeightForm, tp: int = 1) -> dict[str, int]:
    """Bytes of weights on one of `tp` ranks, keyed as `parameters_by_part`."""
    parts = dict.fromkeys(parameters_by_part(config), 0)
    for tensor in rank_tensors(config, tp):
        parts[tensor.part] += tensor.count * form.n_bytes(tensor)
    return parts
