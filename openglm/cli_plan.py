"""The verb that plans: does a model fit on these devices, with how much context, how fast at best.

    python -m openglm plan glm-130b --devices 4x24GB --quantize int4

plan_options adds its options, plan_value computes what --json prints, plan_print shows it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openglm.config import GLMConfig, nearest

if TYPE_CHECKING:
    from openglm.model.cost import WeightForm
    from openglm.model.opened import OpenedModel
    from openglm.ops.quant import Weight

__all__: list[str] = []

DEFAULT_CONTEXT = 2048
DEVICES = "4x24GB, 24GB,24GB, 80GiB, 4x24GB@936GB/s, 4xRTX3090"
PRECISION = "of weights that are not quantised: fp16, bf16, fp32 (default: as stored, fp16)"


def plan_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", help="checkpoint, or a preset (default: the bundled model)")
    p.add_argument("--devices", required=True, metavar="LIST", help=DEVICES)
    p.add_argument("--precision", metavar="P", help=PRECISION)
    p.add_argument("--quantize", metavar="Q", help="the blocks' matrices: int4 or int8 (default: as stored)")
    p.add_argument("--group", metavar="N", help="columns that share a scale, or row (default: 32, or as stored)")
    p.add_argument("--quantize-embeddings", action="store_true", help="quantize embedding and head too")
    p.add_argument("--kv", metavar="P", help="precision of the cache: fp16, bf16, fp32, int8 (default: as --precision)")
    p.add_argument("--context", type=int, metavar="N", help="tokens of a sequence (default: 2048 or the model's)")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once on each replica (default: 1)")
    p.add_argument("--tp", type=int, metavar="N", help="devices that share one copy of the model (default: all)")
    p.add_argument("--chunk", type=int, metavar="N", help="prompt tokens in one pass, causal models (default: 2048)")


def plan_value(o: argparse.Namespace) -> dict[str, Any]:
    """What --json prints. Sizes are integers of bytes.

    model, preset, stored_types (of a checkpoint planned as it lies, else null), parameters; precision, quantize,
    group, quantize_embeddings, kv_precision; context, batch, prefill_tokens (tokens in one pass), tp, replicas;
    weight_bytes, weight_bytes_by_part (one whole copy: embedding, attention, mlp, norm, head), kv_bytes_per_token (of
    one sequence, on all ranks), kv_bytes (of all sequences); devices: a list with device, memory_bytes,
    bandwidth_bytes_per_s or null, weight_bytes, weight_bytes_by_part, kv_bytes_per_token, kv_bytes, activation_bytes,
    workspace_bytes, total_bytes, free_bytes (negative where it does not fit), fits; fits (all devices); max_context
    at this batch, max_batch at this context (0: none fits); tokens_per_s: upper bound for all sequences together,
    null where a device's bandwidth is not known.
    """
    from openglm.model.devices import parse_devices
    from openglm.model.plan import PREFILL_CHUNK, Workload, plan
    from openglm.presets import PRESETS

    model = _model(o.model)
    config = model.config
    if o.chunk is not None and config.mask == "prefix":
        raise ValueError("--chunk is for causal models: with a prefix mask a prompt goes through in one pass")
    form = _form(o, model.form)
    as_stored = o.precision is o.quantize is o.group is None and not o.quantize_embeddings
    work = Workload(
        context=min(DEFAULT_CONTEXT, config.max_seq_len) if o.context is None else o.context,
        batch=o.batch,
        kv=form.precision if o.kv is None else o.kv,
        chunk=PREFILL_CHUNK if o.chunk is None else o.chunk,
    )
    result = plan(config, parse_devices(o.devices), form, work, o.tp, model.bytes_by_part if as_stored else None)
    same = [preset for preset, known in PRESETS.items() if known == config]
    types = model.types if as_stored else None
    return {"model": model.name, "preset": same[0] if same else None, "stored_types": types, **result.to_dict()}


@dataclass(frozen=True)
class _Stored:
    """A preset (in fp16), or a checkpoint as it lies. types: of its tensors, the largest share first.

    bytes_by_part: of its weights once loaded; None for a preset, which `form` says all of.
    """

    name: str
    config: GLMConfig
    form: WeightForm
    types: list[str] | None = None
    bytes_by_part: Mapping[str, int] | None = None


def _model(reference: str | None) -> _Stored:
    from openglm.loading import resolve
    from openglm.model.cost import WeightForm
    from openglm.presets import PRESETS, parse_preset
    from openglm.quant.random_model import open_random

    name = (reference or "").removeprefix("random:")
    if reference is not None and not Path(reference).expanduser().exists():
        known = name.partition("?")[0] in PRESETS
        if not known and not reference.startswith("random:"):
            hint = nearest(name, list(PRESETS))
            raise ValueError(f"no model at {reference}{hint}: give a checkpoint, or a preset: {', '.join(PRESETS)}")
        if "quantize=" not in reference:
            return _Stored(reference, parse_preset(name), WeightForm())
    from openglm.model.opened import open_model

    source = resolve(reference)
    opened = open_random(source) if isinstance(source, str) else open_model(source)
    types, bytes_by_part = _loaded(opened)
    form = _form_of(opened.get("layers.0.attn.out.weight"))
    return _Stored(str(opened.path), opened.config, form, types, bytes_by_part)


def _loaded(opened: OpenedModel) -> tuple[list[str], dict[str, int]]:
    """(types in the files, bytes by part once loaded) of a checkpoint.

    Types and shapes come from headers. What form tensors of a type, or of several joined, take once loaded is seen on
    the smallest of them, which alone is read.
    """
    from openglm.ops.quant import QuantParts

    kinds: dict[str, tuple[str, ...]] = {}
    types: dict[str, int] = {}
    for name, kind, n_bytes in opened.stored():
        kinds[name] = (*kinds.get(name, ()), kind)
        types[kind] = types.get(kind, 0) + n_bytes
    shapes = {name: [opened.source.shape(t) for t in theirs] for name, theirs in opened.names().items()}
    by_size = sorted(kinds, key=lambda name: sum(prod(shape) for shape in shapes[name]), reverse=True)
    samples = {of: opened.get_parts(name) for of, name in {kinds[name]: name for name in by_size}.items()}
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "norm": 0, "head": 0}
    for name, of in kinds.items():
        like = samples[of]
        forms = like.parts if isinstance(like, QuantParts) else [like] * len(shapes[name])
        parts[_part(name)] += sum(_n_bytes(shape, form) for shape, form in zip(shapes[name], forms, strict=True))
    return sorted(types, key=lambda kind: -types[kind]), parts


def _part(name: str) -> str:
    """Which part a tensor of ours belongs to."""
    for mark, part in ((".attn.", "attention"), (".mlp.", "mlp"), ("embed", "embedding"), ("head.", "head")):
        if mark in name:
            return part
    return "norm"


def _n_bytes(shape: tuple[int, ...], like: Weight) -> int:
    """Bytes of a tensor of this shape in the form of another."""
    from openglm.ops.quant import QuantTensor

    if not isinstance(like, QuantTensor):
        return prod(shape) * like.itemsize
    rows, columns = shape
    groups = 1 if like.group_size == like.columns else columns // like.group_size
    scales = groups * like.scale.itemsize * (1 if like.minimum is None else 2)
    return rows * (columns * like.bits // 8 + scales)


def _form_of(weight: Weight) -> WeightForm:
    """The form of a checkpoint, told by one matrix: what activations are computed in, and the base for options."""
    from openglm.model.cost import WeightForm
    from openglm.ops.quant import QuantTensor

    if isinstance(weight, QuantTensor):
        group = None if weight.group_size == weight.columns else weight.group_size
        return WeightForm(quantize=f"int{weight.bits}", group=group, minimum=weight.minimum is not None)
    names = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}
    return WeightForm(precision=names.get(str(weight.dtype), "fp16"))


def _form(o: argparse.Namespace, stored: WeightForm) -> WeightForm:
    """The stored form with what the options ask for in its place."""
    form = stored if o.precision is None else replace(stored, precision=o.precision)
    if o.quantize is not None:
        form = replace(form, quantize=o.quantize, group=32, minimum=False)
    if form.quantize is None and (o.group is not None or o.quantize_embeddings):
        option = "--group" if o.group is not None else "--quantize-embeddings"
        raise ValueError(f"{option} goes with --quantize int4 or int8")
    if o.group is not None:
        if o.group != "row" and not o.group.isdecimal():
            raise ValueError(f"--group wants a number of columns or row, not {o.group!r}")
        form = replace(form, group=None if o.group == "row" else int(o.group))
    return replace(form, embeddings=o.quantize_embeddings)


# -------------------------------------------------------------------- shown


def plan_print(value: dict[str, Any]) -> None:
    form = value["precision"]
    if value["quantize"]:
        group = "whole rows" if value["group"] == "row" else f"groups of {value['group']}"
        form = f"{value['quantize']} in {group}, the rest {form}"
    if value["stored_types"]:
        form = f"stored as {', '.join(value['stored_types'])}"
    groups = f", {value['replicas']} replicas" if value["replicas"] > 1 else ""
    loaded = " once loaded" if value["stored_types"] else ""
    print(f"{value['model']}: {value['parameters']:,} parameters, {form}: {_size(value['weight_bytes'])} of weights"
          f"{loaded}, {value['kv_bytes_per_token']:,} bytes of cache a token")  # fmt: skip
    print(f"context {value['context']:,}, batch {value['batch']}, tensor-parallel over {value['tp']}{groups}")
    print()
    shown: list[dict[str, Any]] = []
    for device in value["devices"]:
        if device not in shown:
            shown.append(device)
            _print_device(device, value["devices"].count(device))
    print("fits" if value["fits"] else "does not fit")
    print(f"largest context at batch {value['batch']}: {_count(value['max_context'])}")
    print(f"largest batch at context {value['context']:,}: {_count(value['max_batch'])}")
    if value["tokens_per_s"] is not None:
        print(f"at most {value['tokens_per_s']:.1f} tokens/s in all: the time to read weights and cache once a token")


def _print_device(device: dict[str, Any], count: int) -> None:
    print(f"{'each of ' if count > 1 else ''}{count} x {device['device']}")
    rows = [(f"weights: {part}", n) for part, n in device["weight_bytes_by_part"].items() if n]
    per_token = f"cache ({device['kv_bytes_per_token']:,} bytes a token)"
    rows += [(per_token, device["kv_bytes"]), ("activations", device["activation_bytes"]),
             ("workspace", device["workspace_bytes"]), ("total", device["total_bytes"]),
             ("free" if device["fits"] else "missing", abs(device["free_bytes"]))]  # fmt: skip
    for name, n_bytes in rows:
        print(f"  {name:<36}{_size(n_bytes):>12}")


def _size(n_bytes: int) -> str:
    unit, size = next((u for u in (("GB", 1e9), ("MB", 1e6)) if n_bytes >= u[1] / 10), ("kB", 1e3))
    return f"{n_bytes / size:,.2f} {unit}"


def _count(n: int) -> str:
    return f"{n:,}" if n else "none fits"
