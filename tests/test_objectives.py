"""Objectives from run configs: the reference of keys, and dialogues mixed into blank filling."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import openglm
from openglm.convert import convert
from openglm.data.example import KINDS
from openglm.data.prepare import prepare
from openglm.loading import open_reference
from openglm.model.checkpoint import read_config
from openglm.quant import QuantSpec
from openglm.train.config import OptimizerConfig, ScheduleConfig, SpikeConfig, TrainConfig, load_config
from openglm.train.objectives import OBJECTIVES
from openglm.train.objectives.infill import InfillData
from openglm.train.objectives.lm import LMData
from openglm.train.objectives.sft import SFTData
from openglm.train.run import build, run
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("title", "kind"),
    [("The run", TrainConfig), ("`optimizer`", OptimizerConfig), ("`schedule`", ScheduleConfig),
     ("`spike`", SpikeConfig), ("`data` of `infill`", InfillData), ("`data` of `lm`", LMData),
     ("`data` of `sft`", SFTData)],
)  # fmt: skip
def test_the_reference_names_every_key_and_no_other(title: str, kind: type) -> None:
    text = (REPOSITORY / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text, flags=re.M)
    body = next(part for part in section if part.startswith(title + "\n"))
    if kind is LMData:
        named = set(re.findall(r"`(\w+)`", body.split("\n", 1)[1]))
    else:
        cells = re.findall(r"^\| (`.*?) \|", body, flags=re.M)
        named = {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}
    assert named == {field.name for field in dataclasses.fields(kind)}


@pytest.fixture
def mixed_run(tiny_checkpoint: Path, tmp_path: Path) -> dict[str, object]:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The fox number {i} jumps. 北京有{i}只狗。" * 5 for i in range(40)), encoding="utf-8")
    prepare([text], tiny_checkpoint, tmp_path / "shards")
    talk = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(30)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    return {
        "objective": "infill", "init_from": str(tiny_checkpoint), "run_dir": str(tmp_path / "run"), "steps": 2,
        "row_len": 64, "micro_batch_rows": 2, "batch_rows": 2, "precision": "fp32", "device": "cpu",
        "data": {
            "train": [str(tmp_path / "shards")], "instructions": [str(tmp_path / "chat.jsonl")],
            "instruction_share": 0.4,
        },
    }  # fmt: skip


def test_instructions_take_their_share_of_the_tokens(mixed_run: dict[str, object]) -> None:
    stream = build(load_config(mixed_run)).stream
    counts = dict.fromkeys(KINDS, 0)
    for _ in range(125):  # 1000 rows: the 32 that the packer still holds open are within the tolerance
        rows = stream.next_rows(8)
        for kind, name in enumerate(KINDS):
            counts[name] += int(((rows.kinds == kind) & (rows.segments >= 0)).sum())
    assert counts["sft"] / sum(counts.values()) == pytest.approx(0.4, abs=0.04)


def test_a_model_that_saw_instructions_chats(mixed_run: dict[str, object]) -> None:
    result = run(load_config(mixed_run))
    assert result.model_dir is not None
    model = openglm.load(result.model_dir, device="cpu")
    assert model.chat([{"role": "user", "content": "What is 3?"}], max_new_tokens=4, seed=1).content is not None
    assert set(read_config(result.model_dir)[1].stop_ids) == {
        model.tokenizer.special_ids[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>")
    }


def test_every_objective_is_in_the_config() -> None:
    assert set(OBJECTIVES) == {"infill", "lm", "sft"}


@pytest.mark.parametrize("fast", [True, False])
def test_slow_bf16_is_said_before_the_run(
    mixed_run: dict[str, object], fast: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("openglm.train.run.bf16_is_fast", lambda device: fast)
    build(load_config(mixed_run | {"precision": "bf16"}))
    assert ("use precision=fp32" in capsys.readouterr().err) is not fast
    auto = build(load_config({k: v for k, v in mixed_run.items() if k != "precision"}))
    assert auto.config.precision == ("bf16" if fast else "fp32")


def test_training_starts_from_a_sharded_checkpoint_and_not_from_a_quantised_one(
    mixed_run: dict[str, object], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openglm.convert.plan.SHARD_BYTES", 8192)
    reference = open_reference(tiny_checkpoint)
    convert(reference, tmp_path / "sharded")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    whole, sharded = (
        build(load_config(mixed_run | {"init_from": str(folder)})).model.state_dict()
        for folder in (tiny_checkpoint, tmp_path / "sharded")
    )
    assert all(torch.equal(sharded[name], tensor) for name, tensor in whole.items())
    convert(reference, tmp_path / "int8", spec=QuantSpec(8, 16, True))
    with pytest.raises(ValueError, match="is quantised: train the unquantised model"):
        build(load_config(mixed_run | {"init_from": str(tmp_path / "int8")}))
