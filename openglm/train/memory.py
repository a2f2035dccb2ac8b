"""How much memory a run will need, part by part, before it takes any of it.

One training step runs on fake tensors, which have shapes and types but no data: every operation of the real step is
seen, with autocast, recomputation and the chunked loss, and what is alive at the worst moment is added up by what it
is for. That takes a second or two and no memory, whatever the size of the model.
"""

from __future__ import annotations

import ctypes
import dataclasses
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openglm.config import GLMConfig
from openglm.model.transformer import Transformer
from openglm.train.config import TrainConfig
from openglm.train.objectives import Objective, TensorRows
from openglm.train.progress import rss_bytes

__all__ = ["MemoryPlan", "available_bytes", "check_memory", "keep_freed_memory", "measure_baseline", "plan_memory"]

# Layers traced one by one; deeper models are extrapolated, their layers being alike.
MAX_TRACED_LAYERS = 12

# Resident memory over the sum of live tensors on a CPU (holes in the C library's heap, oneDNN's scratch): 20 to 26 %
# in runs of bf16 and fp32, 2 and 8 rows.
CPU_SLACK = 0.2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part. On a GPU `device` holds the step and `host` the rest; on a CPU both add up in one memory."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    def lines(self) -> list[str]:
        """A table, one part a line."""
        rows = [*self.device.items(), *self.host.items(), ("total", self.device_bytes + self.host_bytes)]
        return [f"  {name:<44}{n_bytes / 2**20:>12,.1f} MiB" for name, n_bytes in rows]


class _Tracker(TorchDispatchMode):
    """Counts live bytes of every storage by the phase that made it; remembers the breakdown at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "parameters"
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._peak_bytes = 0
        self._seen: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        total = self.live.total()
        if total > self._peak_bytes:
            self._peak_bytes, self.peak = total, dict(self.live)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        phase, n_bytes = self.phase, storage.nbytes()
        self._seen[key] = phase
        self.live[phase] += n_bytes

        def free() -> None:
            self.live[phase] -= n_bytes
            self._seen.pop(key, None)

        weakref.finalize(storage, free).atexit = False


def _trace(config: TrainConfig, shape: GLMConfig, objective: Objective, n_targets: int, device: str) -> dict[str, int]:
    """Bytes alive at the worst moment of a step of `shape`, by phase."""
    from openglm.train.optim import Optimizer
    from openglm.train.trainer import AUTOCAST, prepare_model

    tracker = _Tracker()
    dtype = AUTOCAST[config.precision]
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        model = Transformer(shape, device)
        prepare_model(model, dataclasses.replace(config, compile=False))
        tracker.phase = "optimizer state"
        optimizer = Optimizer(model, config.optimizer, shape)
        for _ in range(min(2, config.batch_rows // config.micro_batch_rows)):
            tracker.phase = "data buffers"
            rows = _fake_rows(config, n_targets, device)
            tracker.phase = "activations"
            handle = model.norm.register_forward_hook(
                lambda *_: setattr(tracker, "phase", "loss (one chunk of logits)")
            )
            with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
                result = objective.loss(model, rows)
            handle.remove()
            tracker.phase = "gradients and backward"
            loss = result.loss * 1.0
            del result
            loss.backward()
            del loss
        tracker.phase = "optimizer scratch"
        optimizer.grad_norm()
        optimizer.scale_grads(0.5)
        optimizer.step(1.0)
    return {phase: n for phase, n in tracker.peak.items() if n}


def _fake_rows(config: TrainConfig, n_targets: int, device: str) -> TensorRows:
    shape = (config.micro_batch_rows, config.row_len)
    n = max(1, n_targets)

    def zeros(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return TensorRows(
        zeros(shape, torch.int64), zeros((2, *shape), torch.int64), zeros(shape, torch.int32),
        zeros(shape, torch.bool), zeros((n,), torch.int64), zeros((n,), torch.int64), zeros((n,), torch.float32),
        zeros((n,), torch.int64), {"lm": n},
    )  # fmt: skip


def measure_baseline(config: TrainConfig, shape: GLMConfig, objective: Objective, device: str) -> int:
    """Bytes that the process holds before the run: interpreter, data, and the libraries' code and compiled kernels.

    The latter are loaded at their first use; so a step of a tiny model is taken for real, and thrown away.
    """
    from openglm.train.optim import Optimizer
    from openglm.train.trainer import AUTOCAST

    small = dataclasses.replace(shape, n_layers=1, vocab_size=min(shape.vocab_size, 512))
    model = Transformer(small, device)
    model.requires_grad_(True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = Optimizer(model, config.optimizer, small)
    rows = _fake_rows(dataclasses.replace(config, micro_batch_rows=1), config.row_len, device)
    dtype = AUTOCAST[config.precision]
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        loss = objective.loss(model, rows).loss
    loss.backward()
    optimizer.step(1.0)
    return rss_bytes()


def plan_memory(
    config: TrainConfig,
    shape: GLMConfig,
    objective: Objective,
    n_targets: int,
    device: str = "cpu",
    baseline: int = 0,
) -> MemoryPlan:
    """Memory of the run at its worst moment.

    n_targets: targets in one micro-batch. baseline: bytes the process holds before the model is built (interpreter,
    libraries, data); measured by the caller, since it is the machine's and not the run's.
    """
    if shape.n_layers <= MAX_TRACED_LAYERS:
        step = _trace(config, shape, objective, n_targets, device)
    else:
        small, large = (
            _trace(config, dataclasses.replace(shape, n_layers=n), objective, n_targets, device) for n in (4, 8)
        )
        more = (shape.n_layers - 8) / 4
        step = {k: large[k] + round((large[k] - small.get(k, 0)) * more) for k in large}
    if device == "cpu":
        step["allocator slack and scratch of the kernels"] = int(sum(step.values()) * CPU_SLACK)
    copy = step.get("parameters", 0) + step.get("optimizer state", 0)
    host = {"process before the model (measured)": baseline}
    if config.checkpoint_every:
        host["checkpoint copy, while it is written"] = copy
    return MemoryPlan(step, host)


def keep_freed_memory() -> None:
    """Let the C library keep large freed buffers instead of handing each back to the system.

    A training step frees and takes the same hundreds of megabytes again; fresh pages for them cost a tenth of the
    time on a CPU. No effect where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(option, 2**31 - 1)


def available_bytes(device: str) -> tuple[int, int]:
    """Bytes that this process can still take: (device, host). On a CPU the first is the second."""
    host = _host_available()
    if device == "cuda":
        return torch.cuda.mem_get_info()[0], host
    return host, host


def _host_available() -> int:
    """MemAvailable, or less where a control group sets a limit."""
    available = 1 << 62
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        available = int(lines["MemAvailable"].split()[0]) * 1024
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            available = min(available, int(limit.read()) - int(used.read()))
    except (OSError, KeyError, ValueError):  # not Linux, or no limit ("max")
        pass
    return available


def check_memory(plan: MemoryPlan, config: TrainConfig, device: str, available: tuple[int, int]) -> None:
    """ValueError with advice when the run will not fit; `available` is measured before the model is built."""
    baseline = plan.host.get("process before the model (measured)", 0)
    host_need = plan.host_bytes - baseline
    pairs = [("GPU", plan.device_bytes, available[0]), ("main", host_need, available[1])]
    if device == "cpu":
        pairs = [("main", plan.device_bytes + host_need, available[1])]
    for kind, need, have in pairs:
        if need > have:
            raise ValueError(
                f"the run needs {need / 2**30:.2f} GiB of {kind} memory and {have / 2**30:.2f} GiB are free: "
                + _advice(config)
            )


def _advice(config: TrainConfig) -> str:
    advice = []
    if config.micro_batch_rows > 1:
        advice.append(f"set micro_batch_rows={config.micro_batch_rows // 2} (same result, batch_rows stays)")
    if not config.activation_checkpointing:
        advice.append("set activation_checkpointing=true")
    if config.checkpoint_every:
        advice.append("set checkpoint_every=0")
    return ", ".join([*advice, "shorten row_len, or take a smaller model"])
