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
    (missing_rank, ["the shards hold 96 of 192 rows of QKV: files of some ranks are missing"]),
    (missing_shard, ["model-00002-of-00002.safetensors is missing, model.safetensors.index.json names it"]),
    (pickled_code, ["pytorch_model-00002-of-00002.bin holds more than tensors and is refused, nothing of it was run"]),
    (unknown_architecture, ["unknown model_type 'mamba'; known: ", "GLM-130B", "ChatGLM2-6B", "glm4", "qwen2", "GGUF"]),
    (unknown_gguf_type, ["tensor token_embd.weight has type IQ2_XXS, which is not supported"]),
    (lora_of_another_base, ["q_proj.weight, which this model lacks: the adapter was trained for another base"]),
    (tensor_parallel(3), ["4 heads do not divide among 3 ranks: choose another --tp"]),
    (tensor_parallel(0), ["do not divide among 0 ranks: choose another --tp"]),
    (scaled_apart, ["ranks scaled apart", "start from unquantised weights"]),
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
