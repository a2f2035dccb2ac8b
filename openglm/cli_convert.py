"""`openglm convert`: a checkpoint in another form.

    python -m openglm convert MODEL OUT --format hf
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from openglm.cli_options import read_text

__all__: list[str] = []

FORMATS = ("openglm", "hf", "gguf", "sat")  # as openglm.convert.FORMATS, which --help need not import


def convert_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="SRC", help="checkpoint folder (ours or as released) or .gguf file")
    p.add_argument("target", metavar="DST", help="folder to write, or FILE.gguf; it must not exist yet")
    p.add_argument("--format", required=True, choices=FORMATS, help="ours, Hugging Face's, GGUF, or shards (SAT)")
    p.add_argument("--quantize", metavar="Q", help="int4 or int8: round the matrices on the way (gguf: Q4_0, Q8_0)")
    p.add_argument("--group", metavar="N", help="columns that share a scale, or row (default: 32)")
    p.add_argument("--symmetric", action="store_true", help="int4: a scale alone for each group, no minimum")
    p.add_argument("--method", metavar="M", help="gptq (default: int4), awq, mse or absmax: docs/QUANTISATION.md")
    p.add_argument("--calibration", metavar="FILE", nargs="+", help="UTF-8 text for gptq or awq (default: our own)")
    p.add_argument("--embeddings", metavar="Q", help="none, int8 or int4 (default: none)")
    p.add_argument("--head", metavar="Q", help="none, int8 or int4, where it is not the embedding (default: none)")
    p.add_argument("--quantize-embeddings", action="store_true", help="embedding and head as the rest")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 for other weights (default: as stored; gguf: float16)")
    p.add_argument("--tp", type=int, default=1, metavar="N", help="ranks to cut shards for (sat; default: 1)")
    p.add_argument("--adapter", metavar="DIR", help="a LoRA (PEFT) to merge")
    p.add_argument("--text-only", action="store_true", help="the language model of a GLM-4V, without its vision tower")
    p.add_argument("--report", metavar="FILE.html", help="compare both models on --text and write a page about it")
    p.add_argument("--text", metavar="FILE", nargs="+", help="UTF-8 texts for the report, such as one a language")
    p.epilog = "A killed conversion continues when the same command is given again."


def convert_value(o: argparse.Namespace) -> dict[str, Any]:
    """What --json prints: path, format, tensors, weight_bytes, continued, method; with --text-only also left_out and
    left_out_bytes; with --report also report.
    """
    from openglm.convert import convert
    from openglm.loading import open_reference, resolve

    source = resolve(o.source)
    if isinstance(source, str):
        raise ValueError(f"{source} has random weights, which are not worth keeping: give a checkpoint")
    spec = _spec(o)
    if (o.report is None) != (o.text is None):
        raise ValueError("--report FILE.html and --text FILE go together: the report compares both models on text")
    if o.report is not None and o.format == "sat":
        raise ValueError("--report goes with --format openglm, hf or gguf: shards are not read back for it")
    if o.report is not None and not Path(o.report).resolve().parent.is_dir():
        raise ValueError(f"--report {o.report}: its folder does not exist")
    texts = {Path(name).name: read_text(name) for name in o.text or ()}
    if len(texts) < len(o.text or ()):
        raise ValueError("two --text files have the same name: the report could not tell them apart")
    calibration = [read_text(name) for name in o.calibration or ()]
    found = convert(
        open_reference(source, o.adapter), o.target, o.format, spec, o.dtype, o.tp, calibration, o.text_only
    )
    value: dict[str, Any] = {
        "path": str(found.path), "format": o.format, "tensors": found.n_tensors, "weight_bytes": found.n_bytes,
        "continued": found.continued, "method": found.method,
    }  # fmt: skip
    if o.text_only:
        value |= {"left_out": found.left_out, "left_out_bytes": found.left_out_bytes}
    if o.report is not None:
        from openglm.quality import compare_models, write_report

        quality = compare_models(open_reference(source, o.adapter), open_reference(found.path), texts)
        write_report(o.report, quality)
        value["report"] = quality.summary() | {"path": o.report}
    return value


def _spec(o: argparse.Namespace) -> Any:
    from openglm.quant import QuantSpec

    given = {
        "--group": o.group, "--symmetric": o.symmetric, "--method": o.method, "--embeddings": o.embeddings,
        "--head": o.head, "--quantize-embeddings": o.quantize_embeddings,
    }  # fmt: skip
    if o.quantize is None:
        for name, value in given.items():
            if value:
                raise ValueError(f"{name} goes with --quantize int4 or int8")
        return None
    if o.quantize_embeddings and (o.embeddings or o.head):
        raise ValueError("--quantize-embeddings is --embeddings and --head at once: give either")
    both = o.quantize if o.quantize_embeddings else "none"
    method = o.method or ("gptq" if o.calibration else None)
    return QuantSpec.parse(o.quantize, o.group, o.symmetric, method, o.embeddings or both, o.head or both)


def convert_print(value: dict[str, Any]) -> None:
    note = f", rounded by {value['method']}" if value["method"] else ""
    note += ", continued" if value["continued"] else ""
    print(f"{value['path']}: {value['tensors']} tensors, {value['weight_bytes'] / 2**20:,.1f} MiB{note}")
    if "left_out" in value:
        print(f"left out: the vision tower, {value['left_out']} tensors, {value['left_out_bytes'] / 2**20:,.1f} MiB")
    for text in value.get("report", {}).get("texts", []):
        print(f"{text['name']}: perplexity {text['source_perplexity']:.3f} -> {text['perplexity']:.3f}, KL divergence "
              f"{text['kl_divergence']:.5f} nats, same top token {100 * text['top1_agreement']:.1f} %")  # fmt: skip
    if "report" in value:
        print(value["report"]["path"])
