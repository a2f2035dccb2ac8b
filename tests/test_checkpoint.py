"""Checkpoint folders: out and back, and every kind of damage gets its one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from openglm.model.checkpoint import CheckpointMeta, read_config, save_checkpoint
from openglm.model.init import init_weights
from openglm.model.load import load_checkpoint
from openglm.model.transformer import Transformer
from openglm.presets import preset

CONFIG = preset("glm-nano", vocab_size=64, dim=32, n_layers=2, ffn_dim=48)
META = CheckpointMeta({"<sop>": 60}, (61, 62), "glm-4", "bpe", {"temperature": 0.5}, {"steps": 3})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "m", init_weights(Transformer(CONFIG)), CONFIG, META, {"tokenizer.json": b"{}"})
    return tmp_path / "m"


def test_out_and_back(folder: Path) -> None:
    model, meta = load_checkpoint(folder)
    assert meta == META and model.config == CONFIG
    for ours, other in zip(model.parameters(), init_weights(Transformer(CONFIG)).parameters(), strict=True):
        assert torch.equal(ours, other)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["m"]  # no temporary folder stays


def test_saving_over_an_old_one_and_in_half(folder: Path) -> None:
    save_checkpoint(folder, init_weights(Transformer(CONFIG), seed=9), CONFIG, META, dtype=torch.bfloat16)
    model, _ = load_checkpoint(folder, dtype=torch.float32)
    expected = init_weights(Transformer(CONFIG), seed=9).embed.weight.bfloat16().float()
    assert torch.equal(model.embed.weight, expected)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["m"]


def test_cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="model.safetensors has .* it was cut short"):
        load_checkpoint(folder)


def test_flipped_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors does not match its sha256"):
        load_checkpoint(folder)


def test_missing_file_and_foreign_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by openglm"):
        read_config(tmp_path)


def test_config_that_does_not_fit_the_weights(folder: Path) -> None:
    head = json.loads((folder / "config.json").read_text())
    head["model"]["vocab_size"] = 65
    data = json.dumps(head).encode()
    (folder / "config.json").write_bytes(data)
    import hashlib

    sums = json.loads((folder / "manifest.json").read_text())
    sums["config.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(sums))
    with pytest.raises(ValueError, match="embed.weight is .64, 32., the config says .65, 32."):
        load_checkpoint(folder)


def test_disk_full_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("openglm.model.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, init_weights(Transformer(CONFIG), seed=9), CONFIG, META)
    model, _ = load_checkpoint(folder)
    assert torch.equal(model.embed.weight, init_weights(Transformer(CONFIG)).embed.weight)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["m"]
