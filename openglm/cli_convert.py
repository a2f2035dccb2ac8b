"""`openglm convert`: a checkpoint in another form.

    python -m openglm convert MODEL OUT --format hf
"""

from __future__ import annotations

import argparse
from typing import Any

__all__: list[str] = []

FORMATS = ("openglm", "hf", "gguf", "sat")  # as openglm.convert.FORMATS, which --help need not import


def convert_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SRC", help="checkpoint folder (ours or as released) or .gguf file")
    p.add_argument("target", metavar="DST", help="folder to write, or FILE.gguf; it must not exist yet")
    p.add_argument("--format", required=True, choices=FORMATS, help="ours, Hugging Face's, GGUF, or shards (SAT)")
    p.add_argument("--quantize", metavar="Q", help="int4 or int8: round the matrices on the way (gguf: Q4_0, Q8_0)")
    p.add_argument("--group", metavar="N", help="columns that share a scale, or row (default: 32)")
    p.add_argument("--quantize-embeddings", action="store_true", help="quantise embedding and head too")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 for other weights (default: as stored; gguf: float16)")
    p.add_argument("--tp", type=int, default=1, metavar="N", help="ranks to cut shards for (sat; default: 1)")
    p.add_argument("--adapter", metavar="DIR", help="a LoRA (PEFT) to merge")
    p.epilog = "A killed conversion continues when the same command is given again."


def convert_value(o: argparse.Namespace) -> dict[str, Any]:
    from openglm.convert import convert
    from openglm.loading import open_reference, resolve
    from openglm.quant import QuantSpec

    source = resolve(o.source)
    if isinstance(source, str):
        raise ValueError(f"{source} has random weights, which are not worth keeping: give a checkpoint")
    if o.quantize is None and (o.group is not None or o.quantize_embeddings):
        raise ValueError("--group and --quantize-embeddings go with --quantize int4 or int8")
    spec = None if o.quantize is None else QuantSpec.parse(o.quantize, o.group, o.quantize_embeddings)
    found = convert(open_reference(source, o.adapter), o.target, o.format, spec, o.dtype, o.tp)
    return {
        "path": str(found.path), "format": o.format, "tensors": found.n_tensors, "weight_bytes": found.n_bytes,
        "continued": found.continued,
    }  # fmt: skip


def convert_print(value: dict[str, Any]) -> None:
    note = ", continued" if value["continued"] else ""
    print(f"{value['path']}: {value['tensors']} tensors, {value['weight_bytes'] / 2**20:,.1f} MiB{note}")
