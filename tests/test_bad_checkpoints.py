"""A checkpoint that cannot be used: through the command line, one clear line and exit code 2 for each kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openglm.cli import main

Make = Callable[[Path, Path], list[object]]  # (golden sets, folder of its own) -> arguments


def copied(sets: Path, name: str, folder: Path) -> Path:
    target = folder / name.replace("/", "-")
    shutil.copytree(sets / name, target, ignore=shutil.ignore_patterns("*.npz", "int*", "mp*", "cases.json", "*.md"))
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755)
    return target


def cut_shard(sets: Path, folder: Path) -> list[object]:
    model = copied(sets, "chatglm2-6b", folder)
    shard = model / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 2 // 3])
    return ["inspect", model]


def damaged_shard(sets: Path, folder: Path) -> list[object]:
    """Of the right length, with other bytes in the middle of a tensor."""
    model = copied(sets, "chatglm2-6b", folder)
    shard = model / "pytorch_model-00001-of-00002.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(data)
    return ["logits", model, "--tokens", "1,2", "--out", folder / "x.npy"]


def pointer_for_shard(sets: Path, folder: Path) -> list[object]:
    model = copied(sets, "glm-4-9b", folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (model / "model-00002-of-00002.safetensors").write_text(pointer)
    return ["inspect", model]


def pointer_for_tokenizer(sets: Path, folder: Path) -> list[object]:
    model = copied(sets, "chatglm3-6b", folder)
    (model / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return ["generate", model, "--prompt", "hello"]


def pointer_for_gguf(sets: Path, folder: Path) -> list[object]:
    (folder / "x.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return ["inspect", folder / "x.gguf"]


def field(name: str, value: object, file: str = "config.json") -> Make:
    """A GLM-4 with one field of a JSON file changed."""

    def make(sets: Path, folder: Path) -> list[object]:
        model = copied(sets, "glm-4-9b", folder)
        old = json.loads((model / file).read_text()) if (model / file).is_file() else {}
        (model / file).write_text(json.dumps(old | {name: value}))
        return ["logits", model, "--tokens", "1,2", "--out", folder / "x.npy"]

    return make


def not_a_number(verb: str, *options: object) -> Make:
    def make(sets: Path, folder: Path) -> list[object]:
        from safetensors.torch import load_file, save_file

        model = copied(sets, "glm-4-9b", folder)
        shard = model / "model-00001-of-00002.safetensors"
        weights = load_file(shard)
        weights["transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"][0, 0] = torch.nan
        save_file(weights, shard)
        out = ["--out", folder / "x.npy"] if verb == "logits" else []
        return [verb, model, "--tokens", "1,2", *out, *options]

    return make


def missing_rank(sets: Path, folder: Path) -> list[object]:
    inner = sets / "glm-130b" / "mp2" / "4930"
    shutil.copy(inner / "mp_rank_00_model_states.pt", folder)
    return ["inspect", folder]


def missing_shard(sets: Path, folder: Path) -> list[object]:
    model = copied(sets, "glm-4-9b", folder)
    (model / "model-00002-of-00002.safetensors").unlink()
    return ["inspect", model]


def pickled_code(sets: Path, folder: Path) -> list[object]:
    model = copied(sets, "chatglm2-6b", folder)
    torch.save({"x": pytest.raises}, model / "pytorch_model-00002-of-00002.bin")
    return ["logits", model, "--tokens", "1,2", "--out", folder / "x.npy"]


def unknown_architecture(sets: Path, folder: Path) -> list[object]:
    model = copied(sets, "glm-4-9b", folder)
    (model / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    return ["inspect", model]


def unknown_gguf_type(sets: Path, folder: Path) -> list[object]:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((1, 66), np.uint8), raw_dtype=GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ["inspect", folder / "x.gguf"]


def lora_of_another_base(sets: Path, folder: Path) -> list[object]:
    from safetensors.torch import save_file

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": torch.zeros(4, 64), f"{name}.lora_B.weight": torch.zeros(64, 4)},
              folder / "adapter_model.safetensors")  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return ["logits", sets / "chatglm-6b", "--adapter", folder, "--tokens", "5", "--out", folder / "x.npy"]


def lora(**settings: object) -> Make:
    """A LoRA of rank 4 for a GLM-4, with these settings."""

    def make(sets: Path, folder: Path) -> list[object]:
        from safetensors.torch import save_file

        name = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value"
        save_file({f"{name}.lora_A.weight": torch.zeros(4, 64), f"{name}.lora_B.weight": torch.zeros(128, 4)},
                  folder / "adapter_model.safetensors")  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
        return ["logits", sets / "glm-4-9b", "--adapter", folder, "--tokens", "5", "--out", folder / "x.npy"]

    return make


def tensor_parallel(size: int) -> Make:
    return lambda sets, folder: [
        "convert", sets / "glm-130b" / "mp1", folder / "out", "--format", "sat", "--tp", size,
    ]  # fmt: skip


def scaled_apart(sets: Path, folder: Path) -> list[object]:
    return ["convert", sets / "glm-130b" / "mp2-int4", folder / "out", "--format", "sat", "--tp", 1]


def no_tokenizer(sets: Path, folder: Path) -> list[object]:
    return ["generate", sets / "chatglm2-6b", "--prompt", "hello"]


@pytest.mark.parametrize(("make", "words"), [
    (cut_shard, ["pytorch_model-00002-of-00002.bin was cut short inside the tensor transformer.", "fetch it again"]),
    (damaged_shard, ["pytorch_model-00001-of-00002.bin is damaged inside the tensor transformer.", "fetch it again"]),
    (pointer_for_shard, ["model-00002-of-00002.safetensors is a pointer of Git LFS", "run git lfs pull"]),
    (pointer_for_tokenizer, ["tokenizer.model is a pointer of Git LFS", "run git lfs pull"]),
    (pointer_for_gguf, ["x.gguf is a pointer of Git LFS", "run git lfs pull"]),
    (field("add_qkv_bias", "false"), ["config.json: add_qkv_bias must be true or false, not 'false'"]),
    (field("rope_ratio", 0), ["config.json: rope_ratio must be a positive number, not 0"]),
    (field("rope_ratio", float("nan")), ["config.json: rope_ratio must be a positive number, not nan"]),
    (field("num_layers", "3"), ["config.json: n_layers must be a positive integer, not '3'"]),
    (field("eos_token_id", "2"), ["eos_token_id must be a token id or a list of them, not '2'"]),
    (field("eos_token_id", [2, "3"], "generation_config.json"), ["eos_token_id must be a token id or a list of them"]),
    (field("top_p", 7, "generation_config.json"), ["generation_config.json: top_p must be 0.0 to 1.0, not 7"]),
    (field("num_layers", 2), ["no use for: transformer.encoder.layers.2.", "config and weights belong apart"]),
    (not_a_number("logits"), ["logits that are no numbers: its weights are damaged"]),
    (not_a_number("generate", "--temperature", 0), ["logits that are no numbers: its weights are damaged"]),
    (missing_rank, ["the shards hold 96 of 192 rows of QKV: files of some ranks are missing"]),
    (missing_shard, ["model-00002-of-00002.safetensors is missing, model.safetensors.index.json names it"]),
    (pickled_code, ["pytorch_model-00002-of-00002.bin holds more than tensors and is refused, nothing of it was run"]),
    (unknown_architecture, ["unknown model_type 'mamba'; known: ", "GLM-130B", "ChatGLM2-6B", "glm4", "qwen2", "GGUF"]),
    (unknown_gguf_type, ["tensor token_embd.weight has type IQ2_XXS, which is not supported"]),
    (lora_of_another_base, ["q_proj.weight, which this model lacks: the adapter was trained for another base"]),
    (lora(r=8, lora_alpha=8), ["query_key_value.weight has rank 4, but adapter_config.json says 8: they belong apart"]),
    (lora(lora_alpha=8), ["has rank 4, but adapter_config.json says 8"]),  # PEFT's default
    (lora(r=4, lora_alpha=float("inf")), ["lora_alpha must be a number, not inf"]),
    (tensor_parallel(3), ["4 heads do not divide among 3 ranks: choose another --tp"]),
    (tensor_parallel(0), ["do not divide among 0 ranks: choose another --tp"]),
    (scaled_apart, ["ranks scaled apart", "give --tp with the ranks", "start from unquantised weights"]),
    (no_tokenizer, ["has no tokenizer", "tokenizer files beside the weights", "token ids"]),
])  # fmt: skip
def test_one_line_and_exit_2(
    make: Make, words: list[str], shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(a) for a in make(shared_data / "golden", tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("openglm: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert sorted(tmp_path.rglob("*")) == before, "a mistake leaves nothing behind"
