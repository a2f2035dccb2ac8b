"""TrainConfig: everything a run is made of, as frozen dataclasses that read from and write to YAML. No torch.

    openglm train runs/tiny.yaml steps=50 optimizer.lr=1e-3

A key that does not exist is an error that names the nearest one; a value of a wrong type is an error that names the
key. Paths are relative to the folder the command runs in.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openglm.config import GLMConfig, from_dict, nearest
from openglm.presets import preset

__all__ = [
    "BatchWarmup",
    "OptimizerConfig",
    "ScheduleConfig",
    "SpikeConfig",
    "TrainConfig",
    "load_config",
    "model_config",
]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """name: "adamw", or "muon": Muon for the matrices of the blocks, AdamW for the rest.

    lr: peak; muon_lr: peak for Muon's matrices, null = lr (updates are scaled to AdamW's size, so lr carries over).
    weight_decay: decoupled, on tensors of two or more dimensions only. grad_clip: global norm, 0 = off.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    muon_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up over `warmup_steps`, or over `warmup_fraction` of the run when null; then cosine decay to
    `min_lr_ratio` of the peak at the last step."""

    warmup_steps: int | None = None
    warmup_fraction: float = 0.02
    min_lr_ratio: float = 0.1


@dataclass(frozen=True, kw_only=True)
class BatchWarmup:
    """The batch grows linearly from `start_rows` to batch_rows over `steps`, in multiples of the micro-batch."""

    start_rows: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """A step is skipped when its gradient norm or loss exceeds this multiple of the running median; 0 = off.

    Losses and norms that are not finite are skipped in any case.
    """

    grad_factor: float = 10.0
    loss_factor: float = 2.0
    window: int = 64


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run.

    model: a preset's name, or a mapping of GLMConfig fields, `preset` among them if wanted; null with `init_from`.
    init_from: checkpoint folder whose weights and shape start the run. tokenizer: folder; null: that of init_from or
    of the first folder of token shards. data: what the objective reads (see train/objectives). micro_batch_rows: rows
    of one forward pass; batch_rows: rows of one optimizer step. loss_chunk: targets whose logits exist at once, 0 =
    about 4M logits. sample_every, eval_every, checkpoint_every: steps, 0 = never. embedding_grad_shrink: GLM-130B's
    alpha, 1 = off. threads: CPU threads, 0 = all. device auto: cuda where present.
    """

    objective: Literal["infill", "lm", "sft"]
    model: str | dict[str, Any] | None = None
    init_from: str | None = None
    tokenizer: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    run_dir: str
    seed: int = 0
    steps: int
    row_len: int = 512
    micro_batch_rows: int = 8
    batch_rows: int = 8
    batch_warmup: BatchWarmup | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    init: Literal["standard", "deepnorm"] = "standard"
    embedding_grad_shrink: float = 1.0
    activation_checkpointing: bool = False
    loss_chunk: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_rows: int = 64
    sample_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    tensorboard: bool = False
    threads: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f"run config: {message}")

        for name in ("steps", "row_len", "micro_batch_rows", "batch_rows", "log_every", "eval_rows"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("eval_every", "sample_every", "checkpoint_every", "threads", "seed", "loss_chunk"):
            need(getattr(self, name) >= 0, f"{name} must be 0 or more, not {getattr(self, name)}")
        need(self.keep_checkpoints >= 1, "keep_checkpoints must be at least 1")
        need(
            self.batch_rows % self.micro_batch_rows == 0,
            f"batch_rows ({self.batch_rows}) must be a multiple of micro_batch_rows ({self.micro_batch_rows})",
        )
        need(0 < self.embedding_grad_shrink <= 1, "embedding_grad_shrink must be in (0, 1]")
        o, s, b = self.optimizer, self.schedule, self.batch_warmup
        need(o.lr > 0 and (o.muon_lr is None or o.muon_lr > 0), "optimizer.lr and optimizer.muon_lr must be above 0")
        need(all(0 <= beta < 1 for beta in o.betas), "optimizer.betas must be in [0, 1)")
        need(
            o.eps > 0 and o.weight_decay >= 0 and o.grad_clip >= 0,
            "optimizer: eps > 0, weight_decay and grad_clip >= 0",
        )
        need(s.warmup_steps is None or s.warmup_steps >= 0, "schedule.warmup_steps must be 0 or more")
        need(0 <= s.warmup_fraction < 1 and 0 <= s.min_lr_ratio <= 1, "schedule: fractions must be in [0, 1]")
        need(self.spike.window >= 8, "spike.window must be at least 8")
        if b is not None:
            need(
                1 <= b.start_rows <= self.batch_rows and b.steps >= 1,
                "batch_warmup: 1 <= start_rows <= batch_rows, steps >= 1",
            )
        need(
            self.model is not None or self.init_from is not None,
            "give model (a preset or fields) or init_from (a checkpoint)",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML-able values."""
        return _plain(dataclasses.asdict(self))


def model_config(value: str | Mapping[str, Any]) -> GLMConfig:
    """GLMConfig from a preset's name, or from a mapping of fields with an optional `preset` to start from."""
    if isinstance(value, str):
        return preset(value)
    fields = dict(value)
    name = fields.pop("preset", None)
    if name is None:
        return from_dict(fields)
    rope = fields.pop("rope", None)
    base = preset(name, **fields)
    return from_dict(base.to_dict() | {"rope": dataclasses.asdict(base.rope) | rope}) if rope else base


def load_config(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """TrainConfig from a YAML file (or a mapping) and `a.b=c` overrides, whose values are read as YAML.

    Raises ValueError, one line: unreadable file, unknown key (nearest named), wrong type, value out of range.
    """
    values = _read(Path(path)) if isinstance(path, str | Path) else _plain(dict(path))
    for override in overrides:
        _apply(values, override)
    return typing.cast(TrainConfig, _build(TrainConfig, values, ""))


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such run config; runs/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the run config: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a run config is a YAML mapping of keys, not {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    import yaml

    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not key=value, such as optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: the value is not YAML") from None
    *folders, last = key.split(".")
    here = values
    for depth, name in enumerate(folders):
        inner = here.get(name)
        if isinstance(inner, str) and name == "model" and depth == 0:
            inner = {"preset": inner}  # model.n_layers=2 on top of `model: glm-nano`
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ValueError(f"override {override!r}: {'.'.join(folders[: depth + 1])} is a value, not a group of keys")
        here[name] = inner
        here = inner
    here[last] = value


def _build(cls: type, values: Any, where: str) -> Any:
    """Instance of a config dataclass from a mapping, types checked."""
    if not isinstance(values, Mapping):
        raise ValueError(f"run config: {where.rstrip('.')} must be a group of keys, not {values!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"run config: unknown key {where}{key}{nearest(str(key), known)}")
    given = {key: _value(hints[key], value, f"{where}{key}") for key, value in values.items()}
    for f in dataclasses.fields(cls):
        if f.name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"run config: {where}{f.name} is missing")
    return cls(**given)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type; integers pass as floats, and '1e-3', which YAML 1.1 reads as text, too."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [a for a in args if a is not type(None)]
        matching = [a for a in inner if isinstance(value, typing.get_origin(a) or a)]
        return _value((matching or inner)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where + ".")
    if origin is Literal:
        if value not in args:
            hint_text = nearest(str(value), [str(a) for a in args])
            raise ValueError(
                f"run config: {where} must be one of {', '.join(map(str, args))}, not {value!r}{hint_text}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ValueError(f"run config: {where} must be a list of {len(args)} numbers, not {value!r}")
        return tuple(_value(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    target = origin or hint
    if not isinstance(value, target) or (isinstance(value, bool) and target is not bool):
        name = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}[target]
        raise ValueError(f"run config: {where} must be {name}, not {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
