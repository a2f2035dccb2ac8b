"""From an opened checkpoint to a Transformer: one weight at a time, quantised ones kept quantised.

    python -m pytest -q tests/test_load.py
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from openglm.model.checkpoint import CheckpointMeta, read_config, verify_manifest
from openglm.model.linear import PackedEmbedding, PackedLinear, QuantEmbedding, RowParts, quantised_linear
from openglm.model.opened import OpenedModel, open_model
from openglm.model.transformer import Transformer
from openglm.ops.native import GgufMatrix, PackedMatrix, available, pack_gguf
from openglm.ops.quant import QuantParts, QuantTensor, Weight

__all__ = ["build_transformer", "load_checkpoint", "load_weights", "start_loading", "weight_bytes"]


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
    return start_loading(opened, device, dtype, packed)()


def start_loading(
    opened: OpenedModel,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> Callable[[], Transformer]:
    """`load_weights` in two steps, for what else there is to do meanwhile: the result's call ends it.

    Where matrices are only to be packed, the native library does so from now on, beside Python; else nothing happens
    before that call. Raises what `load_weights` does, in either step.
    """
    if opened.family == "openglm":
        verify_manifest(opened.path)
    if not packed or torch.device(device).type != "cpu" or not opened.kept_matrices():
        return lambda: build_transformer(opened, device, dtype, packed)
    model, jobs = _assembled(opened, torch.device(device), dtype, packed)
    pool = ThreadPoolExecutor(1)
    packing = pool.submit(pack_gguf, jobs)
    pool.shutdown(wait=False)

    def finish() -> Transformer:
        packing.result()
        return model

    return finish


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
    model, jobs = _assembled(opened, torch.device(device), dtype, packed)
    pack_gguf(jobs)
    return model


def _assembled(
    opened: OpenedModel, device: torch.device, dtype: torch.dtype | None, packed: bool
) -> tuple[Transformer, list[tuple[GgufMatrix, PackedMatrix]]]:
    """The model, and what is still to be packed into matrices of its own."""
    model = Transformer(opened.config, device="meta")
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    direct = opened.kept_matrices() if packed and device.type == "cpu" and available() else {}
    jobs: list[tuple[GgufMatrix, PackedMatrix]] = []
    computes = dtype

    def check(name: str, shape: Sequence[int]) -> None:
        wanted = expected.pop(name)
        if wanted != tuple(shape):
            raise ValueError(
                f"{opened.path}: {name} is {tuple(shape)}, the config says {wanted}: it does not fit the config"
            )

    for name, matrices in direct.items():
        check(name, (sum(m.shape[0] for m in matrices), matrices[0].shape[1]))
        jobs += _put_unfilled(model, name, matrices, computes or torch.float32)
    for name, weight in _ahead(opened, [name for name in opened.names() if name not in direct]):
        check(name, weight.shape)
        if computes is None and isinstance(weight, Tensor):
            computes = weight.dtype
        _put(model, name, weight, device, dtype, computes or torch.float32, packed)
    if expected:
        raise ValueError(f"{opened.path} lacks {sorted(expected)[0]} and {len(expected) - 1} more: fetch it again")
    if opened.kv_prefix is not None:
        model.kv_prefix = opened.kv_prefix.to(device, dtype or computes)
    return model.requires_grad_(False).eval(), jobs


def _ahead(opened: OpenedModel, names: Sequence[str]) -> Iterator[tuple[str, Weight | QuantParts]]:
    """Those of `opened.weights()`, the next ones being read and unpacked meanwhile on all cores, one thread each."""
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


def _put_unfilled(
    model: Transformer, name: str, matrices: list[GgufMatrix], computes: torch.dtype
) -> list[tuple[GgufMatrix, PackedMatrix]]:
    """Layers of packed matrices that are yet to be filled, each with what goes into it."""
    path = name.removesuffix(".weight")
    parent_path, _, child = path.rpartition(".")
    if child == "up" and model.config.mlp != "gelu" and len(matrices) == 1:  # the kernels want two
        n = model.config.ffn_dim
        matrices = [matrices[0].take_rows(0, n), matrices[0].take_rows(n, 2 * n)]
    jobs = [(matrix, matrix.empty()) for matrix in matrices]
    layers: list[nn.Module] = [PackedLinear(packed) for _, packed in jobs]
    if child == "embed":
        _put_table(model, PackedEmbedding(jobs[0][1], computes), layers[0])
    else:
        setattr(model.get_submodule(parent_path), child, layers[0] if len(layers) == 1 else RowParts(layers))
    return jobs


def _put_embedding(model: Transformer, weight: QuantTensor, computes: torch.dtype, packed: bool) -> None:
    head = quantised_linear(weight, packed)
    table: nn.Module = QuantEmbedding(weight, computes)
    if isinstance(head, PackedLinear):
        table = PackedEmbedding(head.matrix, computes)
    _put_table(model, table, head)


def _put_table(model: Transformer, table: nn.Module, head: nn.Module) -> None:
    """The embedding's table and, where it is tied to it, the head, which share their memory."""
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
