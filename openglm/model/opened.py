"""OpenedModel: any checkpoint, opened and understood but not loaded; its weights come one at a time, in our form.

    python -c "from openglm.model.opened import open_model; print(open_model('path').config)"

A folder of ours, a released folder (THUDM or Hugging Face layout), model-parallel shards, or a .gguf file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.model.checkpoint import CONFIG, MANIFEST, CheckpointMeta, read_config
from openglm.model.export import our_fields
from openglm.model.gguf import GgufSource, open_gguf
from openglm.model.released import (
    KNOWN,
    ignorable,
    is_tied_head,
    is_vision,
    read_json,
    released_config,
    sat_config,
)
from openglm.model.sat import SatSource, find_shards
from openglm.model.sources import FileSource, Source, TensorInfo, describe, dtype_name, open_files, read_thudm_quant
from openglm.model.transformer import Transformer
from openglm.model.weights import FAMILIES, Family, import_parts, names_of, part_orders
from openglm.ops.native import GgufMatrix
from openglm.ops.quant import QuantParts, QuantTensor, Weight
from openglm.types import SamplingParams

__all__ = ["OpenedModel", "QuantisedSource", "check_tied_head", "open_model"]

CHECKED_ROWS = 64  # of a matrix that should be a copy of another, when a checkpoint is opened
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class OpenedModel:
    """path: what was opened. family: "openglm", a key of weights.FAMILIES, or "gguf". table: None: names are ours.

    source: tensors in the checkpoint's own names. meta.chat_format and the prompt's prefix are completed by what knows
    the tokenizer. chat_template: the checkpoint's own Jinja text. tokenizer_fields: a tokenizer inside the file (GGUF).
    kv_prefix: (2, n_layers, n_kv_heads, P, head_dim) of a P-Tuning v2 prefix. change: applied to each weight on its
    way (a LoRA), and adapters: the folders it comes from.
    """

    path: Path
    family: str
    config: GLMConfig
    meta: CheckpointMeta
    source: Source
    table: Family | None = None
    chat_template: str | None = None
    tokenizer_fields: Mapping[str, Any] | None = None
    kv_prefix: Tensor | None = None
    change: Callable[[str, Weight], Weight] | None = field(default=None, compare=False)
    adapters: tuple[Path, ...] = ()

    def names(self) -> dict[str, tuple[str, ...]]:
        """Our tensor names, in the model's order, with the checkpoint's."""
        if self.table is None:
            return {name: (name,) for name in _our_names(self.config)}
        return names_of(self.table, self.config)

    def get(self, name: str) -> Weight:
        """One weight by our name."""
        weight = self.get_parts(name)
        return weight.dequantise(torch.bfloat16) if isinstance(weight, QuantParts) else weight

    def get_parts(self, name: str) -> Weight | QuantParts:
        """`get`, with quantised parts of different forms left as they are."""
        theirs = self.names()[name]
        parts = []
        for part in theirs:
            try:
                parts.append(self.source.get(part))
            except KeyError:
                raise ValueError(f"{self.path} lacks the tensor {part}: fetch it again") from None
        weight = parts[0] if self.table is None else import_parts(self.table, self.config, name, parts)
        if self.change is None:
            return weight
        return self.change(name, weight.dequantise(torch.bfloat16) if isinstance(weight, QuantParts) else weight)

    def kept_matrices(self) -> dict[str, list[GgufMatrix]]:
        """By our names, the weights of a GGUF file that are only to be packed: matrices where they lie, one below
        another. Not those of a type that is not kept quantised; none with a LoRA on top, and of another file.
        """
        kept: dict[str, list[GgufMatrix]] = {}
        if not isinstance(self.source, GgufSource) or self.table is None or self.change is not None:
            return kept
        for name, theirs in self.names().items():
            orders = part_orders(self.table, self.config, name, [self.source.shape(part)[0] for part in theirs])
            found = [self.source.matrix(part, order) for part, order in zip(theirs, orders, strict=True)]
            matrices = [m for m in found if m is not None]
            if len(matrices) == len(found):
                kept[name] = matrices
        return kept

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """(our name, weight) of every tensor, read one at a time."""
        for name in self.names():
            yield name, self.get(name)

    def vision_bytes(self) -> dict[str, int]:
        """Bytes by the checkpoint's name of every tensor of a vision tower: the language model does without them."""
        names = [name for name in self.source.names() if is_vision(name)]
        return {name: sum(n for _, n in self.source.stored(name)) for name in names}

    def stored(self) -> Iterator[tuple[str, str, int]]:
        """(our name, type as the files name it, bytes) of everything that is stored, from the headers alone."""
        for name, theirs in self.names().items():
            for part in theirs:
                for kind, n_bytes in self.source.stored(part):
                    yield name, kind, n_bytes


@lru_cache(maxsize=8)
def _our_names(config: GLMConfig) -> tuple[str, ...]:
    return tuple(Transformer(config, device="meta").state_dict())


class QuantisedSource:
    """A Source over files that hold some matrices packed: THUDM's INT8 and INT4, or our own form."""

    def __init__(self, files: FileSource, bits: int = 0) -> None:
        self.files, self.bits = files, bits

    def names(self) -> Iterable[str]:
        ours = {name.removesuffix(".q") for name in self.files.names() if name.endswith(".weight.q")}
        parts = (".weight.q", ".weight.scale", ".weight.minimum", ".weight_scale")
        return [*(n for n in self.files.names() if not n.endswith(parts)), *sorted(ours)]

    def shape(self, name: str) -> tuple[int, ...]:
        tensors = self.files.tensors
        if f"{name}.q" in tensors:
            rows, width = tensors[f"{name}.q"].shape
            return rows, width * 8 // self._bits(name)
        shape = tensors[name].shape
        return (shape[0], shape[1] * 8 // self.bits) if f"{name}_scale" in tensors else shape

    def stored(self, name: str) -> list[tuple[str, int]]:
        parts = [f"{name}.{leaf}" for leaf in ("q", "scale", "minimum")] + [name, f"{name}_scale"]
        found = [self.files.tensors[part] for part in parts if part in self.files.tensors]
        packed = next((f"int{self._bits(name)}" for _ in found[1:]), None)  # scales go with the packed matrix
        return [(packed or dtype_name(info.dtype), info.n_bytes) for info in found]

    def _bits(self, name: str) -> int:
        q = self.files.tensors.get(f"{name}.q")
        return self.bits if q is None else 4 if q.dtype == torch.uint8 else 8

    def get(self, name: str) -> Weight:
        tensors = self.files.tensors
        if f"{name}.q" in tensors:
            minimum = f"{name}.minimum"
            return QuantTensor(
                tensors[f"{name}.q"].read(), tensors[f"{name}.scale"].read(),
                tensors[minimum].read() if minimum in tensors else None,
            )  # fmt: skip
        weight = tensors[name].read()
        if f"{name}_scale" not in tensors:
            return weight
        return read_thudm_quant(weight, tensors[f"{name}_scale"].read(), weight.shape[1] * 8 // self.bits)


# -------------------------------------------------------------------- opening


def open_model(path: str | Path) -> OpenedModel:
    """Open a checkpoint by what it holds. Reads headers and configs, no weights.

    Raises ValueError in one line: nothing there, unknown architecture, a damaged or missing file.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file but no .gguf: give the folder of the checkpoint")
        return _open_gguf(path)
    if not path.is_dir():
        raise ValueError(f"no model at {path}")
    if (path / CONFIG).is_file():
        head = read_json(path / CONFIG)
        return _open_ours(path) if head.get("format") == "openglm" else _open_released(path, head)
    shards = find_shards(path)
    if shards is not None:
        return _open_sat(path, shards)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _open_gguf(files[0])
    if files:
        raise ValueError(f"{path} holds {len(files)} .gguf files: give one of them, such as {files[0].name}")
    raise ValueError(f"{path} is no checkpoint: it has no {CONFIG}; known: {KNOWN}")


def _open_ours(path: Path) -> OpenedModel:
    config, meta = read_config(path)
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} has no {MANIFEST}: the copy is incomplete; fetch it again")
    template = path / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    source = QuantisedSource(open_files(path))
    opened = OpenedModel(path, "openglm", config, meta, source, None, text)
    _check_names(opened, frozenset(source.names()))
    return opened


def _open_released(path: Path, head: dict[str, Any]) -> OpenedModel:
    files = _without_prefix(open_files(path))
    bits = int(head.get("quantization_bit") or 0)
    source = QuantisedSource(files, bits)
    names = frozenset(source.names())
    if bits not in (0, 4, 8):
        raise ValueError(f"{path / CONFIG}: quantization_bit {bits} is not supported: 4 or 8")
    packed = any(name.endswith("weight_scale") for name in files.names())
    if bits and not packed:
        raise ValueError(f"{path / CONFIG} says quantization_bit {bits}, but no weight is packed: set it to 0")
    if packed and not bits:
        raise ValueError(f"{path} holds packed weights but {CONFIG} has no quantization_bit: fetch it again")
    if "quantization_config" in head:
        method = (head["quantization_config"] or {}).get("quant_method")
        raise ValueError(f"{path} is quantised by {method!r}, which is not supported: take the unquantised release")
    if names and all(name.startswith("transformer.prefix_encoder.") for name in names):
        raise ValueError(f"{path} is a P-Tuning v2 prefix alone: give its base model, and this folder as --adapter")
    family, config = released_config(head, path, names, source.shape)
    table = FAMILIES[family]
    if family == "chatglm2" and not head.get("multi_query_attention", False):  # the code reads each head's [q | k | v]
        table = replace(table, qkv="heads")
    meta = _released_meta(path, head, family, config)
    opened = OpenedModel(path, family, config, meta, source, table, _template(path))
    _check_names(opened, names)
    check_tied_head(opened, CHECKED_ROWS)
    return opened


def _without_prefix(files: FileSource) -> FileSource:
    """The original GLM's folders may name its tensors inside a module "glm"."""
    return FileSource({name.removeprefix("glm."): info for name, info in files.tensors.items()})


def _open_sat(path: Path, shards: list[Path]) -> OpenedModel:
    source = SatSource(shards)
    args: dict[str, Any] = {}
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "model_args.json").is_file():
            args = read_json(folder / "model_args.json")
            break
    names = frozenset(source.names())
    family, config = sat_config(args, names, source.shape)
    special = _sat_special_ids(args, family, config)
    stops = tuple(sorted({special[n] for n in ("<eop>", "</s>", "<|endoftext|>") if n in special}))
    opened = OpenedModel(path, family, config, CheckpointMeta(special, stops), source, FAMILIES[family])
    _check_names(opened, names)
    return opened


def _open_gguf(path: Path) -> OpenedModel:
    found = open_gguf(path)
    return OpenedModel(
        path, "gguf", found.config, found.meta, found.source, found.family, found.chat_template, found.tokenizer_fields
    )


def _check_names(opened: OpenedModel, names: frozenset[str]) -> None:
    """Every tensor of the model is there and every other one is known: what is left over would be lost in silence."""
    wanted = {name for theirs in opened.names().values() for name in theirs}
    if missing := sorted(wanted - names):
        raise ValueError(f"{opened.path} lacks {describe(missing)}: fetch it again")
    left = sorted(name for name in names - wanted if not ignorable(name, opened.config))
    if left:
        raise ValueError(
            f"{opened.path} holds tensors that this architecture has no use for: {describe(left)}; "
            "config and weights belong apart"
        )


def check_tied_head(opened: OpenedModel, n_rows: int | None = None) -> None:
    """What stands where the output matrix would be must be a copy of the embedding, or it would be lost in silence.

    n_rows: how many rows, evenly spread, to compare; None: all. Raises ValueError where they differ.
    """
    tensors = opened.source.files.tensors if isinstance(opened.source, QuantisedSource) else {}
    for name in filter(lambda name: is_tied_head(name, opened.config), tensors):
        if not _same_rows(tensors[name], tensors[opened.names()["embed.weight"][0]], n_rows):
            raise ValueError(
                f"{opened.path} holds {name}, which differs from the embedding although this model has one matrix for "
                f"both: in {CONFIG} tie_word_embeddings must be false, or the tensor does not belong here"
            )


def _same_rows(a: TensorInfo, b: TensorInfo, n_rows: int | None) -> bool:
    if a.shape != b.shape:
        return False
    total = a.shape[0]
    step, count = (ROWS_AT_ONCE, ROWS_AT_ONCE) if n_rows is None else (max(1, total // n_rows), 1)
    spans = ((first, min(count, total - first)) for first in range(0, total, step))
    return all(torch.equal(_rows(a, *span), _rows(b, *span)) for span in spans)


def _rows(info: TensorInfo, first: int, count: int) -> Tensor:
    """Some rows of a matrix in float32; the others are not read."""
    row_bytes = info.n_bytes // info.shape[0] if info.strides is None else info.strides[0] * info.dtype.itemsize
    offset, shape = info.offset + first * row_bytes, (count, *info.shape[1:])
    return replace(info, offset=offset, shape=shape, check=None).read().float()


# -------------------------------------------------------------------- what travels


def _released_meta(path: Path, head: Mapping[str, Any], family: str, config: GLMConfig) -> CheckpointMeta:
    """Special ids that the config itself names, stop ids and generation defaults."""
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    stops = generation.get("eos_token_id", head.get("eos_token_id"))
    stop_ids = tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)
    for stop in stop_ids:
        if not isinstance(stop, int) or isinstance(stop, bool):
            raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, not {stops!r}")
    special: dict[str, int] = {}
    if family == "chatglm-6b":
        head = {name: value for name, value in head.items() if value is not None}
        sop = head.get("bos_token_id", 150004 if head.get("vocab_size") == 150528 else 130004)
        # The order of the released vocabulary: [MASK] [gMASK] [sMASK] unused <sop> <eop>.
        special = {
            "[MASK]": head.get("mask_token_id", sop - 4), "[gMASK]": head.get("gmask_token_id", sop - 3),
            "<sop>": sop, "<eop>": head.get("eos_token_id", sop + 1),
        }  # fmt: skip
    elif family == "glm-10b":
        special = _sat_special_ids(head, family, config)
    kept = _generation(generation)
    try:
        SamplingParams(**kept)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / 'generation_config.json'}: {error}") from None
    return CheckpointMeta(special, stop_ids, generation=kept, **our_fields(head))


def _generation(values: Mapping[str, Any]) -> dict[str, Any]:
    """SamplingParams fields from a generation_config.json."""
    sampling = ("temperature", "top_k", "top_p", "min_p")
    others = ("repetition_penalty", "frequency_penalty", "presence_penalty", "max_new_tokens", "min_new_tokens")
    kept = {name: values[name] for name in others if values.get(name)}
    if values.get("do_sample") is False:
        return kept | {"temperature": 0.0}
    return kept | {name: values[name] for name in sampling if values.get(name)}


def _sat_special_ids(args: Mapping[str, Any], family: str, config: GLMConfig) -> dict[str, int]:
    """From model_args.json, else those of the released vocabularies, told by the number of rows."""
    canonical = {"sop": "<sop>", "eop": "<eop>", "eos": "</s>" if family == "glm-130b" else "<|endoftext|>",
                 "MASK": "[MASK]", "gMASK": "[gMASK]", "sMASK": "[sMASK]", "ENC": "[CLS]"}  # fmt: skip
    if not isinstance(args.get("special_ids", {}), dict):
        raise ValueError('special_ids must be an object such as {"sop": 150004}: correct it or leave it out')
    if "special_ids" in args:
        return {canonical.get(name, name): int(i) for name, i in args["special_ids"].items() if name != "pad"}
    if family == "glm-130b" and config.vocab_size == 150528:
        names = ("[MASK]", "[gMASK]", "[sMASK]", "eod", "<sop>", "<eop>", "[CLS]", "dBLOCK")
        return {name: 150000 + i for i, name in enumerate(names)} | {"</s>": 20002}
    if family == "glm-10b" and config.vocab_size == 50304:
        ids = enumerate("<|endoftext|> <sop> <eop> [CLS] [MASK] [SEP] [UNK] [gMASK] [sMASK] dBLOCK".split(), 50256)
        return {name: i for i, name in ids}
    return {}


def _template(path: Path) -> str | None:
    """The chat template: chat_template.jinja, or in tokenizer_config.json (the default one of several)."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    if not (path / "tokenizer_config.json").is_file():
        return None
    try:
        found = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError):
        return None  # the tokenizer's own reader says what is wrong with the file
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
