"""From an opened checkpoint to a Transformer: one weight at a time, quantised ones kept quantised.

    python -m pytest -q tests/test_load.py
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from openglm.model.checkpoint import CheckpointMeta, read_config, verify_manifest
from openglm.model.linear import PackedEmbedding, PackedLinear, QuantEmbedding, quantised_linear
from openglm.model.opened import OpenedModel, open_model
from openglm.model.transformer import Transformer
from openglm.ops.quant import QuantParts, QuantTensor, Weight

__all__ = ["build_transformer", "load_checkpoint", "load_weights", "weight_bytes"]


def load_weights(
    opened: OpenedModel,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Transformer:
    """The model with its weights on `device`; floating-point ones in `dtype`, default as stored.

    Quantised matrices stay as they are and compute in the dtype of their activations. packed: on a CPU they are put
    into the order that the native library reads, where there is one. Raises ValueError for a damaged file and for a
    tensor that does not fit the config.
    """
    if opened.family == "openglm":
        verify_manifest(opened.path)
    return build_transformer(opened, device, dtype, packed)


def load_checkpoint(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, CheckpointMeta]:
    """Model and meta from a folder of ours. Raises ValueError for a damaged or foreign one."""
    _, meta = read_config(folder)
    verify_manifest(Path(folder))
    return build_transformer(open_model(folder), device, dtype), meta


def build_transformer(
    opened: OpenedModel,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Transformer:
    """`load_weights` of a checkpoint that need not be checked against a manifest."""
    model = Transformer(opened.config, device="meta")
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    computes = dtype
    for name, weight in _ahead(opened):
        wanted = expected.pop(name)
        if wanted != tuple(weight.shape):
            shape = tuple(weight.shape)
            raise ValueError(
                f"{opened.path}: {name} is {shape}, the config says {wanted}: it does not fit the config"
            )
        if computes is None and isinstance(weight, Tensor):
            computes = weight.dtype
        _put(model, name, weight, torch.device(device), dtype, computes or torch.float32, packed)
    if expected:
        raise ValueError(f"{opened.path} lacks {sorted(expected)[0]} and {len(expected) - 1} more: fetch it again")
    if opened.kv_prefix is not None:
        model.kv_prefix = opened.kv_prefix.to(device, dtype or computes)
    return model.requires_grad_(False).eval()


def _ahead(opened: OpenedModel) -> Iterator[tuple[str, Weight | QuantParts]]:
    """`opened.weights()`, with the next ones being read and unpacked meanwhile on all cores, one thread each."""
    names = list(opened.names())
    n_workers, n_threads = min(4, os.cpu_count() or 1), torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: deque[Future[Weight | QuantParts]] = deque()
            asked = iter(names)
            for name in names:
                while len(waiting) <= n_workers and (following := next(asked, None)) is not None:
                    waiting.append(pool.submit(opened.get_parts, following))
                yield name, waiting.popleft().result()
    finally:
        torch.set_num_threads(n_threads)


def _put(
    model: Transformer, name: str, weight: Weight | QuantParts, device: torch.device, dtype: torch.dtype | None,
    computes: torch.dtype, packed: bool,
) -> None:  # fmt: skip
    """Set one parameter, or put a quantised layer in place of its module."""
    path, _, leaf = name.rpartition(".")
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = getattr(parent, child)
    if isinstance(weight, Tensor):
        setattr(module, leaf, nn.Parameter(weight.to(device, dtype), requires_grad=False))
        return
    assert leaf == "weight"
    weight = weight.to(device)
    if isinstance(module, nn.Embedding):
        assert isinstance(weight, QuantTensor)
        _put_embedding(model, weight, computes, packed)
        return
    gated = child == "up" and model.config.mlp != "gelu"
    setattr(parent, child, quantised_linear(weight, packed, model.config.ffn_dim if gated else None))


def _put_embedding(model: Transformer, weight: QuantTensor, computes: torch.dtype, packed: bool) -> None:
    """The table and, where it is tied to it, the head, which share their memory."""
    head = quantised_linear(weight, packed)
    table: nn.Module = QuantEmbedding(weight, computes)
    if isinstance(head, PackedLinear):
        table = PackedEmbedding(head.matrix, computes)
    model.register_module("embed", table)
    if model.config.tie_embeddings:
        model.head = head


def weight_bytes(model: Transformer) -> int:
    """Bytes of all parameters and quantised matrices, shared ones counted once."""
    seen: dict[int, int] = {}
    matrices = [m.matrix for m in model.modules() if isinstance(m, (PackedLinear, PackedEmbedding))]
    packed = [t for m in matrices for t in (m.data, m.scale, m.minimum) if t is not None]
    for tensor in [*model.parameters(), *model.buffers(), *packed]:
        seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
