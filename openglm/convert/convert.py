"""Convert: any checkpoint that opens into our format, Hugging Face's, GGUF, or model-parallel shards (SAT).

    python -m openglm convert SRC DST --format openglm --quantize int4

Weights go through one at a time, so a conversion holds the largest tensor and not the model. Stop ids, chat template,
tokenizer and sampling defaults travel with them. A killed conversion goes on where it was: finished shards are kept,
and what is finished of a GGUF file.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from openglm.convert.plan import Plan, write_shards
from openglm.convert.released import to_hf, to_sat
from openglm.loading import Reference
from openglm.model.checkpoint import CONFIG, MANIFEST, VERSION
from openglm.model.gguf import VECTOR_TYPES, GgufSource
from openglm.model.opened import OpenedModel, check_tied_head
from openglm.model.transformer import Transformer
from openglm.model.writer import OutputFolder, named_tensors
from openglm.quant import QuantSpec
from openglm.quant.calibrate import Calibration, own_texts, windows

__all__ = ["FORMATS", "Converted", "convert"]

Format = Literal["openglm", "hf", "gguf", "sat"]
FORMATS = ("openglm", "hf", "gguf", "sat")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Converted:
    """path: what was written. n_bytes: of its weights. continued: an earlier, killed conversion was gone on with.

    method: how weights were rounded, None where none were. left_out: tensors of a vision tower that stayed behind, and
    left_out_bytes.
    """

    path: Path
    n_bytes: int
    n_tensors: int
    continued: bool
    method: str | None = None
    left_out: int = 0
    left_out_bytes: int = 0


def convert(
    reference: Reference,
    target: str | Path,
    format: Format = "openglm",
    spec: QuantSpec | None = None,
    dtype: str | None = None,
    tp: int = 1,
    calibration: Sequence[str] = (),
    text_only: bool = False,
) -> Converted:
    """Write a checkpoint in another form. Raises ValueError in one line for what that form cannot hold.

    spec: quantise while converting (openglm, sat by whole rows, gguf as Q4_0 or Q8_0). dtype: of floating-point
    weights, default as stored (gguf: float16). tp: ranks to cut for (sat). calibration: texts for gptq and awq, which
    run the model one block at a time; default the package's own, English and Chinese. text_only: leave out the vision
    tower of a GLM-4V, which no format here holds; without it such a model is refused.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: give one of {', '.join(DTYPES)}")
    if tp != 1 and format != "sat":
        raise ValueError(f"--tp goes with --format sat, not {format}")
    if spec is not None and format == "hf":
        raise ValueError("--quantize does not go with --format hf, which has no form for it: use openglm or gguf")
    if spec is not None and format != "gguf":  # whose types have no choice of methods
        spec = spec.resolved(text=format == "openglm" and reference.tokenizer is not None)
    if calibration and (spec is None or not spec.calibrated):
        raise ValueError("text for calibration goes with --quantize and --method gptq (the default then) or awq")
    opened = reference.opened
    if opened.kv_prefix is not None:
        raise ValueError("a P-Tuning v2 prefix cannot be merged into weights: keep it as --adapter")
    vision = _left_behind(opened, text_only)
    check_tied_head(opened)
    if spec is not None and opened.config.tie_embeddings and spec.head and spec.head != spec.embeddings:
        raise ValueError("embedding and head of this model are one matrix: choose its form with --embeddings")
    shapes = {n: tuple(t.shape) for n, t in Transformer(opened.config, device="meta").state_dict().items()}
    plan = Plan(opened, spec, DTYPES[dtype] if dtype else None, shapes)
    if format == "gguf":
        try:
            return replace(_to_gguf(reference, Path(target), plan), **vision)
        except OSError as error:
            raise _disk_error(target, error) from error
    ids = None
    if spec is not None and spec.calibrated and format == "openglm":
        ids = _calibration_ids(reference, spec, calibration)
        plan = replace(plan, calibration=Calibration(opened, spec, ids, dict(opened.meta.special_ids)))
    identity = {
        "format": format, "quantize": None if spec is None else asdict(spec), "dtype": dtype, "tp": tp,
        "calibration": None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        **_sources(opened),
    }  # fmt: skip
    out = OutputFolder(target, identity)
    try:
        if format == "sat":
            n_tensors = to_sat(reference, out, plan, tp)
        else:
            n_tensors = to_hf(reference, out, plan) if format == "hf" else _to_openglm(reference, out, plan)
    except ValueError:
        out.discard_if_empty()
        raise
    except OSError as error:
        raise _disk_error(target, error) from error
    n_bytes = sum(entry["bytes"] for entry in out.sums.values() if entry["tensors"])
    out.commit()
    method = None if spec is None else spec.method
    return Converted(Path(target), n_bytes, n_tensors, out.continued, method, **vision)


def _disk_error(target: str | Path, error: OSError) -> OSError | ValueError:
    """A full disk in one line; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return ValueError(
        f"disk full while writing {target}: free some space and give the same command again to continue, "
        "or another target"
    )


def _left_behind(opened: OpenedModel, text_only: bool) -> dict[str, Any]:
    """left_out and left_out_bytes of `Converted`. Raises ValueError for a vision tower that nobody gave up."""
    sizes = opened.vision_bytes()
    n_bytes = sum(sizes.values())
    if sizes and not text_only:
        raise ValueError(
            f"{opened.path} has a vision tower ({len(sizes)} tensors, {n_bytes:,} bytes), which would be lost: "
            "--text-only converts the language model alone"
        )
    if text_only and not sizes:
        raise ValueError(f"{opened.path} has no vision tower: leave out --text-only")
    return {"left_out": len(sizes), "left_out_bytes": n_bytes}


def _sources(opened: OpenedModel) -> dict[str, Any]:
    return {"source": _fingerprint(opened.path), "adapters": [_fingerprint(folder) for folder in opened.adapters]}


def _fingerprint(path: Path) -> list[Any]:
    """Files of a source with sizes and times, so that another source is not mixed in. Hidden files may be ours."""
    paths = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    return [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]


def _calibration_ids(reference: Reference, spec: QuantSpec, texts: Sequence[str]) -> Tensor:
    """Pieces of the texts, behind what stands in front of any text that this model continues."""
    if reference.tokenizer is None:
        raise ValueError(f"{reference.opened.path} has no tokenizer to read text with: use --method mse")
    head = reference.meta.text_head(reference.meta.special_ids)
    texts = texts or own_texts()
    return windows([reference.tokenizer.encode(text) for text in texts], head, reference.opened.config.max_seq_len)


# -------------------------------------------------------------------- our format


def _to_openglm(reference: Reference, out: OutputFolder, plan: Plan) -> int:
    n_tensors = write_shards(out, plan, lambda ours: named_tensors(ours, plan.weight(ours)))
    for name, content in _text_files(reference).items():
        out.write_bytes(name, content)
    head = {"format": "openglm", "version": VERSION, "model": plan.opened.config.to_dict(), **asdict(reference.meta)}
    out.write_bytes(CONFIG, (json.dumps(head, indent=1, ensure_ascii=False) + "\n").encode())
    out.write_bytes(MANIFEST, out.manifest())
    return n_tensors


def _text_files(reference: Reference) -> dict[str, bytes]:
    """Tokenizer files and the chat template."""
    files = {} if reference.tokenizer is None else dict(reference.tokenizer.files)
    if reference.opened.chat_template is not None:
        files["chat_template.jinja"] = reference.opened.chat_template.encode()
    return files


# -------------------------------------------------------------------- GGUF


def _to_gguf(reference: Reference, target: Path, plan: Plan) -> Converted:
    from openglm.model.gguf_tokenizer import gguf_tokenizer_fields
    from openglm.model.gguf_write import GgufOutput

    if target.suffix != ".gguf":
        raise ValueError(f"--format gguf writes one file: give a name that ends in .gguf, not {target}")
    if target.exists():
        raise ValueError(f"{target} exists already: give another name, or remove it")
    if plan.spec is not None:
        plain = QuantSpec(plan.spec.bits)
        if plan.spec != plain:
            raise ValueError(
                "GGUF files are quantised as Q4_0 or Q8_0, the embedding with the rest: leave out --group, --symmetric,"
                " --method, --calibration, --embeddings and --head; what --format openglm quantised is kept bit for bit"
            )
        type = "Q4_0" if plan.spec.bits == 4 else "Q8_0"
    else:
        type = GGUF_TYPES[plan.dtype or torch.float16]
    plan = replace(plan, spec=None, dtype=None)  # the writer rounds to its own types
    opened, names = plan.opened, plan.opened.names()
    fields = opened.tokenizer_fields
    if fields is None:
        fields = {} if reference.tokenizer is None else gguf_tokenizer_fields(reference.tokenizer)
    identity = {"format": "gguf", "type": type, **_sources(opened)}
    with GgufOutput(
        target, opened.config, reference.meta, fields, type, opened.chat_template, identity, _vector_type(plan)
    ) as out:
        for name in tqdm(names, desc="convert", unit="tensor", delay=2, leave=False):
            if name not in out.done:
                out.add(name, plan.weight(name))
        out.commit()
    return Converted(target, target.stat().st_size, len(names), out.continued)


def _vector_type(plan: Plan) -> str | None:
    """The half-precision type that all norms and biases have, if they have one."""
    source = plan.opened.source
    if isinstance(source, GgufSource):
        return source.vector_type
    kinds = {kind for name, kind, _ in plan.opened.stored() if len(plan.shapes[name]) == 1}
    return kinds.pop() if len(kinds) == 1 and kinds <= VECTOR_TYPES.keys() else None
