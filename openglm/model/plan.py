"""Will a model run on these devices? Memory by part, the largest context and batch, a bound on speed. No torch.

    python -m openglm plan glm-130b --devices 4x24GB --quantize int4

Everything is counted from the shape of the model and of one prefill and one decode step, as `model/transformer.py`
takes them; there are no safety factors. On each device are added up

- weights: its share by the tensor-parallel rule (`cost.rank_tensors`);
- the key-value cache: `batch` sequences of `context` tokens;
- activations: the hidden states alive at the worst moment of a layer, of the tokens in one pass. That is a prompt of
  `context` tokens, or a chunk of it; a prefix mask lets the first token see the last one, so such a prompt goes
  through in one pass. Attention is fused: no matrix of scores;
- workspace: the mask of a prefix model, one block of a quantised matrix while it is dequantised
  (`model/linear.py`), and the logits of one token a sequence.

What the driver and the CUDA context take is no part: see `model/devices.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openglm.config import GLMConfig
from openglm.model.cost import (
    PRECISION_BYTES,
    WeightForm,
    check_ranks,
    kv_heads_per_rank,
    n_parameters,
    rank_tensors,
    weight_bytes_by_part,
)
from openglm.model.devices import Device

__all__ = ["KV_PRECISIONS", "PREFILL_CHUNK", "DevicePlan", "Plan", "Workload", "plan"]

KV_PRECISIONS = (*PRECISION_BYTES, "int8")
PREFILL_CHUNK = 2048
DEQUANTISED_BLOCK = 1 << 23  # weights that model/linear.py dequantises at a time on a device


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is run. context: tokens of a sequence, prompt and answer. batch: sequences at once, on each replica.

    kv: precision of the cache, one of KV_PRECISIONS.
    chunk: tokens of a prompt that go through the model in one pass; without effect on prefix models.
    """

    context: int
    batch: int = 1
    kv: str = "fp16"
    chunk: int = PREFILL_CHUNK

    def __post_init__(self) -> None:
        for name in ("context", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.kv not in KV_PRECISIONS:
            raise ValueError(f"kv must be one of {', '.join(KV_PRECISIONS)}, not {self.kv!r}")


@dataclass(frozen=True)
class DevicePlan:
    """Bytes on one device. kv_bytes_per_token: of one token of one sequence."""

    device: Device
    weight_bytes_by_part: dict[str, int]
    kv_bytes_per_token: int
    kv_bytes: int
    activation_bytes: int
    workspace_bytes: int

    @property
    def weight_bytes(self) -> int:
        return sum(self.weight_bytes_by_part.values())

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.workspace_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.device.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        bandwidth = self.device.bandwidth
        return {
            "device": self.device.name,
            "memory_bytes": self.device.memory_bytes,
            "bandwidth_bytes_per_s": None if bandwidth is None else int(bandwidth),
            "weight_bytes": self.weight_bytes,
            "weight_bytes_by_part": self.weight_bytes_by_part,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
            "workspace_bytes": self.workspace_bytes,
            "total_bytes": self.total_bytes,
            "free_bytes": self.device.memory_bytes - self.total_bytes,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class Plan:
    """A plan for all devices: `tp` of them share the model, and there are n_devices / tp such replicas.

    max_context: largest context that fits at this batch, max_batch the largest batch at this context; 0: none does.
    tokens_per_s: of all sequences together, None when the bandwidth of a device is not known. It is a bound: every
    decode step reads the weights once and the cache of every sequence at its full context, and does nothing else.
    """

    config: GLMConfig
    form: WeightForm
    work: Workload
    tp: int
    devices: tuple[DevicePlan, ...]
    max_context: int
    max_batch: int
    tokens_per_s: float | None
    stored: Mapping[str, int] | None = None

    @property
    def fits(self) -> bool:
        return all(d.fits for d in self.devices)

    def to_dict(self) -> dict[str, Any]:
        """The value of --json. Keys: see `plan_value` of openglm/cli_plan.py."""
        whole = _weights(self.config, self.form, 1, self.stored)
        per_token = kv_bytes(self.config, self.work.kv)
        quantize, replicas = self.form.quantize, len(self.devices) // self.tp
        return {
            "parameters": n_parameters(self.config),
            "precision": self.form.precision,
            "quantize": quantize,
            "group": None if quantize is None else "row" if self.form.group is None else self.form.group,
            "quantize_embeddings": self.form.embeddings,
            "kv_precision": self.work.kv,
            "context": self.work.context,
            "batch": self.work.batch,
            "prefill_tokens": tokens_in_a_pass(self.config, self.work),
            "tp": self.tp,
            "replicas": replicas,
            "weight_bytes": sum(whole.values()),
            "weight_bytes_by_part": whole,
            "kv_bytes_per_token": per_token,
            "kv_bytes": per_token * self.work.context * self.work.batch * replicas,
            "devices": [d.to_dict() for d in self.devices],
            "fits": self.fits,
            "max_context": self.max_context,
            "max_batch": self.max_batch,
            "tokens_per_s": self.tokens_per_s,
        }


def plan(
    config: GLMConfig,
    devices: Sequence[Device],
    form: WeightForm,
    work: Workload,
    tp: int | None = None,
    stored: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a model on `devices`, `tp` of which share one copy of it (default: all).

    stored: bytes by part of a checkpoint whose tensors differ in type, in place of what `form` gives; a rank's share
    of each part is as in `form`.
    Raises ValueError in one line for a context longer than the model's and for ranks that do not divide the devices,
    the heads, the MLP or the vocabulary, and for groups that do not divide the columns of a matrix.
    """
    tp = len(devices) if tp is None else tp
    if work.context > config.max_seq_len:
        raise ValueError(f"a context of {work.context} tokens is over the model's {config.max_seq_len}: ask for less")
    if tp < 1 or len(devices) % tp:
        raise ValueError(f"{tp} tensor-parallel ranks do not divide {len(devices)} devices: choose another --tp")
    try:
        check_ranks(config, tp)
    except ValueError as error:
        sizes = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and _divides(config, n)]
        raise ValueError(f"{error}; --tp may be {', '.join(map(str, sizes))}") from None

    for tensor in rank_tensors(config):
        if form.group is not None and form.quantises(tensor) and tensor.columns % form.group:
            raise ValueError(f"groups of {form.group} do not divide the {tensor.columns} columns of a matrix")

    def fits(context: int, batch: int) -> bool:
        there = Workload(context=context, batch=batch, kv=work.kv, chunk=work.chunk)
        return all(_on_device(config, d, form, there, tp, stored).fits for d in set(devices))

    on_each = {d: _on_device(config, d, form, work, tp, stored) for d in set(devices)}
    return Plan(
        config, form, work, tp, tuple(on_each[d] for d in devices),
        max_context=_largest(lambda n: fits(n, work.batch), config.max_seq_len),
        max_batch=_largest(lambda n: fits(work.context, n)),
        tokens_per_s=_bound(config, work, tp, tuple(on_each[d] for d in devices)), stored=stored,
    )  # fmt: skip


def _divides(config: GLMConfig, tp: int) -> bool:
    try:
        check_ranks(config, tp)
    except ValueError:
        return False
    return True


def _largest(fits: Callable[[int], bool], limit: int | None = None) -> int:
    """The largest n that fits, at most `limit`; what is smaller fits as well. 0 when 1 does not."""
    if limit is not None and fits(limit):
        return limit
    low, high = 0, 1  # low fits, high does not once the loop is over
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -------------------------------------------------------------------- parts


def _on_device(
    config: GLMConfig, device: Device, form: WeightForm, work: Workload, tp: int, stored: Mapping[str, int] | None
) -> DevicePlan:
    per_token = kv_bytes(config, work.kv, tp)
    return DevicePlan(
        device,
        _weights(config, form, tp, stored),
        per_token,
        per_token * work.context * work.batch,
        activation_bytes(config, form, work, tp),
        workspace_bytes(config, form, work, tp),
    )


def _weights(config: GLMConfig, form: WeightForm, tp: int, stored: Mapping[str, int] | None) -> dict[str, int]:
    """Bytes of weights by part on one of `tp` ranks."""
    rank = weight_bytes_by_part(config, form, tp)
    if stored is None:
        return rank
    whole = weight_bytes_by_part(config, form)
    return {part: -(-stored.get(part, 0) * n // whole[part]) if n else 0 for part, n in rank.items()}


def kv_bytes(config: GLMConfig, precision: str, tp: int = 1) -> int:
    """Bytes of keys and values that one token leaves on one of `tp` ranks, over all layers."""
    head = config.head_dim * (1 if precision == "int8" else PRECISION_BYTES[precision])
    return 2 * config.n_layers * kv_heads_per_rank(config, tp) * head


def tokens_in_a_pass(config: GLMConfig, work: Workload) -> int:
    """Tokens that go through the model at once: a prompt or a chunk of it, or one token of each sequence."""
    prompt = work.context if config.mask == "prefix" else min(work.context, work.chunk)
    return max(prompt, work.batch)


def activation_bytes(config: GLMConfig, form: WeightForm, work: Workload, tp: int = 1) -> int:
    """Bytes of hidden states alive at the worst moment of a layer (`Block.forward`), per device.

    Around both halves of a block: the stream before the block and inside it, the normalised stream, and its multiple
    where that is the residual. Attention: the fused projection, its rotated copy, the heads' output, the sum.
    MLP: the up projection, the activated half and the product; or the first two and the sum.
    """
    c = config
    q, kv = c.n_heads // tp * c.head_dim, kv_heads_per_rank(c, tp) * c.head_dim
    ffn = c.ffn_dim // tp
    around = (4 if c.residual == "normed" else 3) * c.dim
    attention = (q + 2 * kv) + (q + kv) + q + c.dim
    mlp = 2 * ffn + c.dim if c.mlp == "gelu" else max(4 * ffn, 3 * ffn + c.dim)
    angles = 0 if c.positions == "learned" else 2 * 4 * (c.rotary_dim // 2)  # cos and sin, float32
    return tokens_in_a_pass(c, work) * ((around + max(attention, mlp)) * PRECISION_BYTES[form.precision] + angles)


def workspace_bytes(config: GLMConfig, form: WeightForm, work: Workload, tp: int = 1) -> int:
    """Bytes of buffers that a pass takes besides hidden states, per device.

    The mask is one number for each pair of tokens. A block of a quantised matrix is held in float32 and as activations;
    INT4 is unpacked to bytes first and held in float32 before and after scaling (`QuantTensor.dequantise`). Logits:
    this rank's in the precision of the activations, all of them in float32, twice for sampling.
    """
    value = PRECISION_BYTES[form.precision]
    mask = tokens_in_a_pass(config, work) ** 2 * value if config.mask == "prefix" else 0
    quantised = [t.rows * t.columns for t in rank_tensors(config, tp) if form.quantises(t)]
    block = min(max(quantised, default=0), DEQUANTISED_BLOCK)
    block *= 1 + 4 + 4 if form.quantize == "int4" else 4 + value % 4
    logits = work.batch * (config.vocab_size // tp * value + 2 * config.vocab_size * 4)
    return mask + block + logits


def _bound(config: GLMConfig, work: Workload, tp: int, devices: Sequence[DevicePlan]) -> float | None:
    """Tokens a second of all sequences if a decode step took only the time to read weights and cache."""
    seconds = 0.0
    for d in devices:
        if d.device.bandwidth is None:
            return None
        # An embedding is read a row a token; the whole of it only where it is the head as well.
        idle = 0 if config.tie_embeddings else d.weight_bytes_by_part["embedding"]
        seconds = max(seconds, (d.weight_bytes - idle + d.kv_bytes) / d.device.bandwidth)
    return work.batch * (len(devices) // tp) / seconds
