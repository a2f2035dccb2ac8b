"""What `openglm plan` says of activations and workspace against the tensors that the model itself keeps alive."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openglm.model.batch import ForwardBatch
from openglm.model.cache import KVCache
from openglm.model.cost import WeightForm
from openglm.model.linear import BLOCK_ELEMENTS, QuantLinear
from openglm.model.plan import DEQUANTISED_BLOCK, Workload, activation_bytes, kv_bytes, workspace_bytes
from openglm.model.transformer import Transformer
from openglm.ops.quant import QuantTensor
from openglm.presets import preset


class Live(TorchDispatchMode):
    """Bytes of the storages made under it that are alive, now and at the peak."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = [t.untyped_storage() for t in known]
        self._seen = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, n_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= n_bytes


@pytest.mark.parametrize(
    "name", ["glm-130b", "chatglm-6b", "glm-10b", "chatglm2-6b", "glm-4-9b-0414", "glm-edge-1.5b", "llama-2-7b"]
)
def test_a_pass_of_the_model_takes_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt through two real layers of full width, on the meta device: shapes and lifetimes without data."""
    import openglm.model.transformer as module

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return torch.empty_like(q.transpose(1, 2)).transpose(1, 2)

    monkeypatch.setattr(module, "attention", fused)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # meta has no autocast to ask about
    config = preset(name, n_layers=2)
    n = min(2048, config.max_seq_len)
    work, form = Workload(context=n), WeightForm()
    with torch.no_grad():
        model = Transformer(config, "meta", torch.float16)
        cache = KVCache(config, 1, n, "meta", torch.float16)
        live = Live([*model.parameters(), cache._data])
        ids, positions = (torch.zeros(*s, 1, n, dtype=torch.int64, device="meta") for s in ((), (config.n_axes,)))
        context = torch.zeros(1, n, dtype=torch.bool, device="meta") if config.mask == "prefix" else None
        batch = ForwardBatch(ids, positions, context=context)
        with live:
            hidden = model(batch, cache)
            of_layers, live.peak = live.peak, live.now
            model.logits(hidden[:, -1])
    for_logits = config.vocab_size * (2 + 4 + 4)
    expected = activation_bytes(config, form, work) + workspace_bytes(config, form, work) - for_logits
    assert expected == pytest.approx(of_layers, rel=0.01)
    assert live.peak - live.now <= for_logits
    assert cache._data.numel() * 2 == n * kv_bytes(config, "fp16")


@pytest.mark.parametrize(("quantize", "dtype", "columns"), [("int4", torch.uint8, 2048), ("int8", torch.int8, 4096)])
def test_a_quantised_matrix_takes_one_block_of_workspace(quantize: str, dtype: torch.dtype, columns: int) -> None:
    """The up projection of ChatGLM-6B, (16384, 4096), in the layer itself."""
    assert DEQUANTISED_BLOCK == BLOCK_ELEMENTS
    q = torch.zeros(16384, columns, dtype=dtype, device="meta")
    layer = QuantLinear(QuantTensor(q, torch.zeros(16384, 1, dtype=torch.float16, device="meta")))
    x = torch.zeros(1, 4096, dtype=torch.float16, device="meta")
    live = Live([x, layer.q, layer.scale])
    with torch.no_grad(), live:
        layer(x)
    config, work = preset("chatglm-6b"), Workload(context=1)
    packed, plain = (workspace_bytes(config, WeightForm(quantize=q), work) for q in (quantize, None))
    assert packed - plain == pytest.approx(live.peak, rel=0.02)
