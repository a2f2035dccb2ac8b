"""LoRA adapters that `peft` itself wrote, put on at load: the same logits as peft's own model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from openglm.convert import convert
from openglm.engine import Engine
from openglm.loading import Reference, open_reference
from openglm.model.adapters import apply_adapter
from openglm.model.load import build_transformer
from openglm.model.opened import OpenedModel, open_model
from openglm.model.writer import OutputFolder
from openglm.ops.quant import QuantTensor

IDS = [3, 14, 15, 92, 6, 5, 35, 89, 79]
KINDS: dict[str, dict[str, Any]] = {
    "Glm": {"partial_rotary_factor": 0.5, "head_dim": 16, "attention_bias": True, "pad_token_id": None},
    "Qwen2": {}, "Llama": {},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "everywhere": {"target_modules": "all-linear", "r": 2, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"target_modules": ["k_proj", "o_proj", "down_proj"], "r": 4, "lora_alpha": 8,
                 "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"o_proj": 32}},
}  # fmt: skip


def make(tmp_path: Path, kind: str, setting: str) -> tuple[Path, Path, torch.Tensor]:
    """(base folder, adapter folder, peft's logits)."""
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    peft = pytest.importorskip("peft", reason="needs the test extra: peft")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=131, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=88, max_position_embeddings=128, **KINDS[kind],
    )  # fmt: skip
    base = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS[setting])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model(torch.tensor([IDS])).logits[0].detach()


def logits(opened: OpenedModel) -> torch.Tensor:
    return Engine(build_transformer(opened, dtype=torch.float32), {}).logits(IDS)


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_same_logits_as_peft(tmp_path: Path, kind: str, setting: str) -> None:
    base, adapter, wanted = make(tmp_path, kind, setting)
    assert not torch.allclose(logits(open_model(base)), wanted, atol=1e-2), "the adapter must matter"
    torch.testing.assert_close(logits(apply_adapter(open_model(base), adapter)), wanted, rtol=0, atol=5e-5)


def test_on_a_converted_base_and_merged_by_convert(tmp_path: Path) -> None:
    """An adapter in Hugging Face's names goes on our copy of its base, and `convert` writes the sum."""
    base, adapter, wanted = make(tmp_path, "Glm", "everywhere")
    convert(Reference(open_model(base), None, None), tmp_path / "ours")
    on_ours = apply_adapter(open_model(tmp_path / "ours"), adapter)
    torch.testing.assert_close(logits(on_ours), wanted, rtol=0, atol=5e-5)
    convert(Reference(on_ours, None, None), tmp_path / "merged")
    torch.testing.assert_close(logits(open_model(tmp_path / "merged")), wanted, rtol=0, atol=5e-5)


def test_on_a_quantised_release(shared_data: Path, tmp_path: Path) -> None:
    """ChatGLM2's fused projection, INT8: the sum is taken with the dequantised weights (kept in bfloat16)."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    module = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value"
    a, b = torch.randn(4, 64, generator=generator), torch.randn(128, 4, generator=generator)
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    opened = open_model(shared_data / "golden" / "chatglm2-6b" / "int8")
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    quantised = opened.source.get(name)
    assert isinstance(quantised, QuantTensor)
    wanted = quantised.dequantise() + b @ a * 2.0
    # Ours has its rows in another order; the table that undoes it is tested on its own.
    from openglm.model.weights import export_weights

    ours = apply_adapter(opened, tmp_path).get("layers.0.attn.qkv.weight")
    assert opened.table is not None
    ((_, theirs),) = export_weights(opened.table, opened.config, [("layers.0.attn.qkv.weight", ours)])
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(theirs.float(), wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("change", "words"), [
    ({"peft_type": "IA3"}, "type 'IA3'"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "trained biases"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
])  # fmt: skip
def test_other_kinds_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    base, adapter, _ = make(tmp_path, "Llama", "attention")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        apply_adapter(open_model(base), adapter)


def test_an_adapter_of_another_base(tmp_path: Path, shared_data: Path) -> None:
    _, adapter, _ = make(tmp_path, "Llama", "attention")
    with pytest.raises(ValueError, match="which this model lacks: the adapter was trained for another base"):
        apply_adapter(open_model(shared_data / "golden" / "chatglm-6b"), adapter)
    base, _, _ = make(tmp_path / "other", "Qwen2", "attention")
    config = json.loads((base / "config.json").read_text())
    assert config["hidden_size"] == 48
    other = apply_adapter(open_model(shared_data / "golden" / "chatglm2-6b"), adapter)
    with pytest.raises(ValueError, match="the adapter was trained for another base"):
        build_transformer(other)


def test_an_adapter_folder_alone_finds_its_base(tmp_path: Path) -> None:
    base, adapter, wanted = make(tmp_path, "Llama", "attention")
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    torch.testing.assert_close(logits(open_reference(adapter).opened), wanted, rtol=0, atol=5e-5)
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "somebody/some-model"}))
    with pytest.raises(ValueError, match="is a LoRA for 'somebody/some-model': give the folder of that model"):
        open_reference(adapter)


def test_a_killed_merge_is_not_continued_with_another_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, wanted = make(tmp_path, "Llama", "attention")
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    monkeypatch.setattr("openglm.convert.plan.SHARD_BYTES", 4096)

    def killed(self: OutputFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OutputFolder, "commit", killed)
        convert(Reference(apply_adapter(open_model(base), other), None, None), tmp_path / "merged")
    found = convert(Reference(apply_adapter(open_model(base), adapter), None, None), tmp_path / "merged")
    assert not found.continued
    torch.testing.assert_close(logits(open_model(tmp_path / "merged")), wanted, rtol=0, atol=5e-5)
