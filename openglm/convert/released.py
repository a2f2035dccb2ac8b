"""Into the released layouts: Hugging Face folders, and model-parallel shards of GLM-130B and the original GLM.

    python -m openglm convert MODEL OUT --format hf
    python -m openglm convert MODEL OUT --format sat --tp 4 --quantize int4 --group row
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from openglm.config import GLMConfig
from openglm.convert.plan import Plan, write_shards
from openglm.loading import Reference
from openglm.model.checkpoint import CONFIG
from openglm.model.export import generation_config, hf_architecture, hf_config
from openglm.model.hf_tokenizer import cuts_like_qwen2, hf_tokenizer_files
from openglm.model.sat import cut
from openglm.model.sources import dtype_name, pack_thudm_quant
from openglm.model.weights import FAMILIES, export_weights, names_of
from openglm.model.writer import OutputFolder
from openglm.ops.quant import QuantTensor, Weight, floats
from openglm.quant import quantise

__all__ = ["to_hf", "to_sat"]

# -------------------------------------------------------------------- Hugging Face


def to_hf(reference: Reference, out: OutputFolder, plan: Plan) -> int:
    """Weights, configs and tokenizer for transformers. Quantised weights become plan.dtype, default the norms'."""
    opened = plan.opened
    kind_of_norms = floats(plan.weight("norm.weight")).dtype
    dtype = plan.dtype or (kind_of_norms if kind_of_norms.itemsize == 2 else torch.bfloat16)
    texts: dict[str, bytes] = {}
    if reference.tokenizer is not None:
        texts = hf_tokenizer_files(reference.tokenizer, opened.chat_template, reference.meta.stop_ids)
    qwen_text = not texts or cuts_like_qwen2(texts["tokenizer.json"])
    kind, family = hf_architecture(opened.config, opened.family, qwen_text)

    def tensors(ours: str) -> Iterator[tuple[str, Tensor]]:
        weight = floats(plan.weight(ours), dtype)
        for name, part in export_weights(FAMILIES[family], opened.config, [(ours, weight)]):
            assert isinstance(part, Tensor)
            yield name, part.contiguous()

    n_tensors = write_shards(out, plan, tensors)
    stored = floats(plan.weight("layers.0.attn.out.weight"), dtype).dtype
    texts |= {
        CONFIG: _json(hf_config(opened.config, reference.meta, kind, dtype_name(stored))),
        "generation_config.json": _json(generation_config(reference.meta)),
    }
    for name, content in texts.items():
        out.write_bytes(name, content)
    return n_tensors


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


# -------------------------------------------------------------------- model-parallel shards


def to_sat(reference: Reference, out: OutputFolder, plan: Plan, tp: int) -> int:
    """One file a rank, each written in a pass of its own over the weights."""
    config = plan.opened.config
    if config.mask != "prefix" or config.norm != "layer" or (config.mlp == "gelu" and config.positions == "rope"):
        raise ValueError("only GLM-130B and the original GLM have a form as shards: use --format openglm")
    if tp < 1 or config.n_heads % tp:
        raise ValueError(f"{config.n_heads} heads do not divide among {tp} ranks: choose another --tp")
    spec = plan.spec
    if spec is not None and (spec.group is not None or not spec.symmetric or spec.embeddings or spec.head):
        raise ValueError("shards are quantised by whole rows, without embeddings: add --group row")
    if spec is not None and spec.calibrated:
        raise ValueError(f"shards are quantised without text: --method absmax or mse, not {spec.method}")
    family = "glm-10b" if config.positions == "learned" else "glm-130b"
    iteration = str(reference.meta.description.get("iteration", 0))
    for rank in tqdm(range(tp), desc="convert", unit="rank", delay=2, leave=False):
        part = RankPart(plan, family, tp, rank)
        out.write_torch(f"{iteration}/mp_rank_{rank:02d}_model_states.pt", part.forms(), part.get)
    out.write_bytes("latest", f"{iteration}\n".encode())
    out.write_bytes("model_args.json", _json(_model_args(config, family, reference)))
    return len(names_of(FAMILIES[family], config))


class RankPart:
    """The tensors of one rank. Quantised parts are quantised apart, as GLM-130B's own tool does."""

    def __init__(self, plan: Plan, family: str, tp: int, rank: int) -> None:
        self.plan, self.family, self.tp, self.rank = plan, family, tp, rank
        self.whole = replace(plan, spec=None)
        self._owner: dict[str, str] = {}  # stored name -> ours
        self._tensors = lru_cache(maxsize=1)(self._read)

    def forms(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """(dtype, shape) of every tensor by its stored name."""
        found = {}
        for ours in self.plan.shapes:
            for name, tensor in self._read(ours).items():
                found[name] = (tensor.dtype, tuple(tensor.shape))
                self._owner[name] = ours
        return found

    def get(self, name: str) -> Tensor:
        return self._tensors(self._owner[name])[name]

    def _read(self, ours: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        config, spec = self.plan.opened.config, self.plan.spec
        for name, weight in export_weights(FAMILIES[self.family], config, [(ours, self.whole.weight(ours))]):
            part = cut(name, weight, self.family, self.tp)[self.rank]
            form = None if spec is None else spec.of(ours, self.plan.shapes[ours])
            if form is not None:
                part = quantise(floats(part), form)
            tensors |= _stored(name, part)
        return tensors


def _stored(name: str, weight: Weight) -> dict[str, Tensor]:
    """NAME, with NAME_scale for a packed matrix."""
    if not isinstance(weight, QuantTensor):
        return {name: weight}
    packed, scale = pack_thudm_quant(weight)
    return {name: packed, f"{name}_scale": scale}


def _model_args(config: GLMConfig, family: str, reference: Reference) -> dict[str, Any]:
    """model_args.json: the sizes that the shards themselves do not tell, and the special ids."""
    names = {"<sop>": "sop", "<eop>": "eop", "</s>": "eos", "<|endoftext|>": "eos", "[CLS]": "ENC"}
    if family == "glm-10b":
        names |= {"[MASK]": "MASK", "[gMASK]": "gMASK", "[sMASK]": "sMASK"}
    context = "max_position_embeddings" if family == "glm-10b" else "max_sequence_length"
    return {
        "num_layers": config.n_layers, "hidden_size": config.dim, "num_attention_heads": config.n_heads,
        "vocab_size": config.vocab_size, context: config.max_seq_len, "layernorm_epsilon": config.norm_eps,
        "special_ids": {names.get(n, n): i for n, i in reference.meta.special_ids.items()},
    }  # fmt: skip
