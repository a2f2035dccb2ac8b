"""What `openglm plan` says of activations and workspace against the tensors that the model itself keeps alive."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openglm.cli import main
from openglm.model.batch import ForwardBatch
from openglm.model.cache import KVCache
from openglm.model.cost import WeightForm
from openglm.model.linear import BLOCK_ELEMENTS, QuantLinear
from openglm.model.load import load_weights, weight_bytes
from openglm.model.opened import open_model
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
    import openglm.model.cache as module

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


# -------------------------------------------------------------------- checkpoints of several types, loaded


def planned_bytes(path: Path, capsys: pytest.CaptureFixture[str], devices: str = "1GB") -> dict[str, Any]:
    assert main(["plan", str(path), "--devices", devices, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    "folder", ["chatglm-6b", "chatglm-6b/int4", "chatglm2-6b/int8", "glm-130b/mp2", "glm-10b/mp2"]
)
def test_released_checkpoints_take_what_is_planned(
    shared_data: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    path = shared_data / "golden" / folder
    loaded = weight_bytes(load_weights(open_model(path)))
    assert planned_bytes(path, capsys)["weight_bytes"] == loaded


def test_a_gguf_of_many_types_takes_what_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Q4_0 queries and keys joined with Q8_0 values, types that our form holds and types that it does not."""
    gguf = pytest.importorskip("gguf")
    writer: Any = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for add, value in ((writer.add_block_count, 2), (writer.add_context_length, 64), (writer.add_embedding_length, 64),
                       (writer.add_feed_forward_length, 128), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 1e4),
                       (writer.add_rope_dimension_count, 16)):  # fmt: skip
        add(value)
    writer.add_token_list([f"t{i}" for i in range(96)])
    tensors: dict[str, tuple[int, int, str]] = {
        "token_embd": (96, 64, "Q8_0"), "output": (96, 64, "F16"), "output_norm": (64, 0, "F32")
    }  # fmt: skip
    for i in range(2):
        tensors |= {f"blk.{i}.attn_q": (64, 64, "Q4_0"), f"blk.{i}.attn_k": (32, 64, "Q4_0"),
                    f"blk.{i}.attn_v": (32, 64, "Q8_0" if i else "Q4_0"), f"blk.{i}.attn_output": (64, 64, "Q4_1"),
                    f"blk.{i}.ffn_gate": (128, 64, "Q4_1"), f"blk.{i}.ffn_up": (128, 64, "Q4_1"),
                    f"blk.{i}.ffn_down": (64, 128, "Q5_0"), f"blk.{i}.attn_norm": (64, 0, "F32"),
                    f"blk.{i}.ffn_norm": (64, 0, "F32")}  # fmt: skip
    for name, (rows, columns, kind) in tensors.items():
        values = np.random.default_rng(0).normal(size=(rows, columns) if columns else rows).astype(np.float32)
        code = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plan_of_file = planned_bytes(tmp_path / "m.gguf", capsys)
    assert plan_of_file["weight_bytes"] == weight_bytes(load_weights(open_model(tmp_path / "m.gguf")))
    assert set(plan_of_file["stored_types"]) == {"Q8_0", "F16", "F32", "Q4_0", "Q4_1", "Q5_0"}
    halves = planned_bytes(tmp_path / "m.gguf", capsys, "2x1GB")["devices"]
    shares, norm = sum(d["weight_bytes"] for d in halves), plan_of_file["weight_bytes_by_part"]["norm"]
    assert shares == plan_of_file["weight_bytes"] + norm  # every rank has the norms
