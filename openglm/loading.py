"""From a model reference to everything that runs it: an opened checkpoint, its tokenizer and its chat format.

    python -c "from openglm.loading import open_reference; print(open_reference('path').opened.family)"

A reference is a folder (ours, or as THUDM, Hugging Face or SAT released it; a LoRA's, whose base lies on this machine),
a .gguf file, or nothing: the bundled model. Nothing of the weights is read here.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from openglm.model.adapters import ADAPTER_CONFIG, ENCODER, apply_adapter, is_adapter, with_prefix
from openglm.model.checkpoint import CONFIG, CheckpointMeta
from openglm.model.cost import n_parameters
from openglm.model.opened import OpenedModel, open_model
from openglm.model.released import read_json

if TYPE_CHECKING:
    from openglm.formats import ChatFormat
    from openglm.tokenizer import Tokenizer

__all__ = [
    "BUNDLED", "Reference", "default_dtype", "open_reference", "open_weights", "pick_device", "resolve", "with_text",
]  # fmt: skip

BUNDLED = Path(__file__).parent / "assets" / "glm-nano"


@dataclass(frozen=True)
class Reference:
    """opened: with its meta completed by what the tokenizer knows. tokenizer, chat_format: None where there is none."""

    opened: OpenedModel
    tokenizer: Tokenizer | None
    chat_format: ChatFormat | None

    @property
    def meta(self) -> CheckpointMeta:
        return self.opened.meta


def resolve(reference: str | Path | None) -> Path | str:
    """The folder or file a reference names, or "random:PRESET" as it is; ValueError in one line when there is none."""
    if reference is None:
        if not (BUNDLED / "config.json").is_file():
            raise ValueError("the bundled model is missing from this installation: give a model folder")
        return BUNDLED
    if isinstance(reference, str) and reference.startswith("random:"):
        return reference
    path = Path(reference).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    from openglm.presets import PRESETS

    if str(reference).partition("?")[0] in PRESETS:
        raise ValueError(f"{reference} is a preset without weights: give a folder, or random:{reference}")
    if path.exists():
        raise ValueError(f"{reference} is a file but no .gguf: give the folder of the checkpoint")
    raise ValueError(f"no model at {reference}: give a checkpoint folder, a .gguf file or random:PRESET")


def open_reference(
    path: Path, adapter: str | Path | None = None, chat_format: str | None = None
) -> Reference:
    """Open a checkpoint with its text side: `open_weights`, then `with_text`."""
    return with_text(open_weights(path, adapter), chat_format)


def open_weights(path: Path, adapter: str | Path | None = None) -> OpenedModel:
    """A checkpoint as it lies. adapter: a LoRA or P-Tuning v2 folder on top of it. Raises ValueError in one line."""
    if adapter is None and is_adapter(path):
        path, adapter = _base_of(path), path
    opened = open_model(path)
    if any(name.startswith(ENCODER) for name in opened.source.names()):
        opened = with_prefix(opened, opened.path)
    if adapter is not None:
        opened = apply_adapter(opened, adapter)
    return opened


def with_text(opened: OpenedModel, chat_format: str | None = None) -> Reference:
    """With its tokenizer, chat format, and what these complete.

    chat_format: name in `openglm.formats` to use whatever the checkpoint says. Raises ValueError in one line.
    """
    tokenizer = _tokenizer(opened)
    if tokenizer is not None:
        _check_vocabulary(opened, tokenizer)
    ours = _is_ours(opened)  # told by its meta, before that is completed
    opened = dataclasses.replace(opened, meta=_completed(opened, tokenizer))
    return _with_format(opened, tokenizer, chat_format, ours)


def _base_of(adapter: Path) -> Path:
    """The local folder that an adapter says it was trained on: at that path, or of that name beside the adapter."""
    if (adapter / ADAPTER_CONFIG).is_file():
        what, base = "LoRA", str(read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    else:
        what, base = "P-Tuning v2 prefix", str(read_json(adapter / CONFIG).get("_name_or_path") or "")
    name = Path(base).name
    found = [Path(base), adapter / base] if base else []
    found += [folder / name for folder in (adapter.parent, adapter.absolute().parent.parent) if name]
    for folder in found:
        if folder.is_dir() and not is_adapter(folder):
            return folder
    raise ValueError(f"{adapter} is a {what} for {base!r}: give the folder of that model, and this one as --adapter")


def _tokenizer(opened: OpenedModel) -> Tokenizer | None:
    """The tokenizer of the checkpoint; None when it comes with no file of one."""
    from openglm.tokenizer import Tokenizer, has_tokenizer

    if opened.tokenizer_fields is not None:
        there = "tokenizer.ggml.model" in opened.tokenizer_fields
        return Tokenizer.from_gguf(opened.tokenizer_fields) if there else None
    if opened.family == "openglm":
        return None if opened.meta.tokenizer is None else Tokenizer.load(opened.path)
    folder = opened.path
    return Tokenizer.load(folder) if has_tokenizer(folder) else None


def _check_vocabulary(opened: OpenedModel, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > opened.config.vocab_size:
        raise ValueError(
            f"{opened.path}: the tokenizer has {tokenizer.vocab_size} ids but the model's vocabulary holds "
            f"{opened.config.vocab_size}: they do not belong together"
        )
    meta = opened.meta
    if opened.family == "openglm" and meta.special_ids and meta.special_ids != tokenizer.special_ids:
        raise ValueError(
            f"{opened.path}: config.json and tokenizer disagree on special ids: they do not belong together"
        )


# -------------------------------------------------------------------- what the tokenizer completes


def _completed(opened: OpenedModel, tokenizer: Tokenizer | None) -> CheckpointMeta:
    """Special ids from the tokenizer, and what goes around a text that is to be continued, by the family's rule."""
    meta = opened.meta
    if _is_ours(opened):
        return meta
    special = dict(meta.special_ids) if tokenizer is None else {**tokenizer.special_ids, **meta.special_ids}
    meta = dataclasses.replace(meta, special_ids=special, tokenizer=None if tokenizer is None else tokenizer.kind)
    head = tuple(special[name] for name in ("[gMASK]", "<sop>") if name in special)
    whole = head if len(head) == 2 else ()
    if opened.family == "chatglm-6b":
        return dataclasses.replace(meta, prompt_prefix=(), prompt_suffix=whole)
    if opened.family in ("glm-130b", "glm-10b"):
        begin, end = ("[CLS]", "<|endoftext|>") if opened.family == "glm-10b" else ("", "</s>")
        start, closing = (tuple(special[n] for n in (name,) if n in special) for name in (begin, end))
        return dataclasses.replace(meta, prompt_prefix=start, prompt_suffix=whole, fill_suffix=closing)
    template = opened.chat_template
    if meta.prompt_prefix is not None:  # we wrote it
        return meta
    if whole and (template is None or "[gMASK]<sop>" in template):
        return dataclasses.replace(meta, prompt_prefix=whole)
    return dataclasses.replace(meta, prompt_prefix=() if tokenizer is None else tokenizer.prefix_ids)


def _is_ours(opened: OpenedModel) -> bool:
    """Whether we wrote it, so that its meta is complete."""
    return opened.family == "openglm" or (opened.family == "gguf" and bool(opened.meta.special_ids))


def _with_format(opened: OpenedModel, tokenizer: Tokenizer | None, name: str | None, ours: bool) -> Reference:
    if tokenizer is None:
        if name is not None:
            raise ValueError(f"{opened.path} has no tokenizer, so it takes no chat format")
        return Reference(opened, None, None)
    from openglm.formats import detect_format, get_format

    name = name or opened.meta.chat_format
    if name is None and not ours:
        family = {"chatglm-6b": "chatglm-6b", "glm-130b": "glm-130b", "glm-10b": None}
        name = family.get(opened.family, "?")
        if name == "?":
            name = detect_format(tokenizer.special_ids, opened.chat_template)
            if name is None and opened.family == "chatglm2":
                name = "chatglm2"
    if name is None:
        return Reference(opened, tokenizer, None)
    chat_format = get_format(name, tokenizer, template=opened.chat_template)
    stops = tuple(sorted({*opened.meta.stop_ids, *chat_format.stop_ids}))
    meta = dataclasses.replace(opened.meta, chat_format=name, stop_ids=stops)
    return Reference(dataclasses.replace(opened, meta=meta), tokenizer, chat_format)


def pick_device(name: str) -> torch.device:
    """The device of that name, "auto" for cuda where there is one. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: give auto, cpu or cuda") from None
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: give auto, cpu or cuda")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there ({torch.cuda.device_count()} GPUs are): give --device cpu")
    return place


def default_dtype(opened: OpenedModel, place: torch.device) -> torch.dtype | None:
    """As stored on a GPU. On a CPU float32, which every CPU multiplies fast, unless only the stored form fits."""
    if place.type != "cpu":
        return None
    needed = 4 * n_parameters(opened.config)
    if hasattr(os, "sysconf") and needed > 0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    return torch.float32
