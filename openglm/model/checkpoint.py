"""Our checkpoint: a folder with config.json, model.safetensors, tokenizer files and a manifest of sha256 sums.

Written to a temporary folder, fsynced and renamed, so that a killed process leaves the last good one. Reading checks
sizes and sums first and says in one line which file is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from openglm.config import GLMConfig, from_dict
from openglm.model.transformer import Transformer

__all__ = ["CheckpointMeta", "read_config", "save_checkpoint", "sha256_file", "verify_manifest"]

WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class CheckpointMeta:
    """What travels with the weights besides the shape.

    special_ids: name -> id. stop_ids: ids that end an answer. chat_format: name in `openglm.formats`, None for a base
    model. tokenizer: kind of the tokenizer files, None without. generation: defaults for SamplingParams fields.
    description: free facts, such as training data and steps. prompt_prefix, prompt_suffix: ids around a text to be
    continued; None: [gMASK] <sop> in front where special_ids has them. fill_suffix: ids that end a text whose blanks
    are to be filled, unless it ends in a blank.
    """

    special_ids: dict[str, int] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    chat_format: str | None = None
    tokenizer: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    prompt_prefix: tuple[int, ...] | None = None
    prompt_suffix: tuple[int, ...] = ()
    fill_suffix: tuple[int, ...] = ()

    def text_head(self, special_ids: Mapping[str, int]) -> list[int]:
        """What stands in front of a text that is scored: the known prefix, else [gMASK] <sop> where there are such."""
        if self.prompt_prefix is not None and not self.prompt_suffix:
            return list(self.prompt_prefix)
        names = ("[gMASK]", "<sop>")
        return [special_ids[name] for name in names] if all(name in special_ids for name in names) else []


def save_checkpoint(
    folder: str | Path,
    weights: Transformer | Mapping[str, Tensor],
    config: GLMConfig,
    meta: CheckpointMeta,
    tokenizer_files: Mapping[str, bytes] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a checkpoint folder in one step; an existing one is replaced only when the new one is complete.

    dtype: type that floating-point weights are stored in, default as they are.
    """
    folder = Path(folder)
    state = weights.state_dict() if isinstance(weights, Transformer) else dict(weights)
    tensors = {
        name: t.detach().to("cpu", dtype if t.is_floating_point() else None).contiguous() for name, t in state.items()
    }
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        head = {"format": "openglm", "version": VERSION, "model": config.to_dict(), **asdict(meta)}
        (temporary / CONFIG).write_text(json.dumps(head, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, data in (tokenizer_files or {}).items():
            (temporary / name).write_bytes(data)
        sums = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(sums, indent=1) + "\n")
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(temporary: Path, folder: Path) -> None:
    """Fsync everything in `temporary` and rename it to `folder`, setting an existing `folder` aside until then."""
    for path in [*temporary.rglob("*"), temporary]:
        _fsync(path)
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_manifest(folder: Path) -> None:
    """Compare every file with the manifest; raises ValueError naming the first one cut short, changed or missing."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: the copy is incomplete; fetch it again")
    for name, entry in json.loads(path.read_text()).items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing: the manifest lists it; fetch the checkpoint again")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"{file} has {size} bytes instead of {entry['bytes']}: it was cut short; fetch it again")
        if sha256_file(file) != entry["sha256"]:
            raise ValueError(f"{file} does not match its sha256 in {MANIFEST}: it is damaged; fetch it again")


def read_config(folder: str | Path) -> tuple[GLMConfig, CheckpointMeta]:
    """Shape and meta of a checkpoint folder, without reading weights."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {CONFIG}")
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(head, dict) or head.get("format") != "openglm":
        raise ValueError(f"{path} was not written by openglm (no \"format\": \"openglm\")")
    if head.get("version") != VERSION:
        raise ValueError(f"{path} has version {head.get('version')}, this openglm reads {VERSION}: upgrade openglm")
    meta = CheckpointMeta(
        special_ids=head.get("special_ids", {}),
        stop_ids=tuple(head.get("stop_ids", ())),
        chat_format=head.get("chat_format"),
        tokenizer=head.get("tokenizer"),
        generation=head.get("generation", {}),
        description=head.get("description", {}),
        prompt_prefix=None if head.get("prompt_prefix") is None else tuple(head["prompt_prefix"]),
        prompt_suffix=tuple(head.get("prompt_suffix", ())),
        fill_suffix=tuple(head.get("fill_suffix", ())),
    )
    return from_dict(head["model"]), meta
