"""The Trainer: accumulation, exact resume, kills, refused steps, memory plan, and its one-line errors."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from openglm.train.config import SpikeConfig, load_config
from openglm.train.memory import MemoryPlan, check_memory, plan_memory
from openglm.train.objectives import TensorRows, normaliser
from openglm.train.progress import RunLog
from openglm.train.schedule import batch_rows, lr_factor
from openglm.train.stability import LossScaler, SpikeGuard
from openglm.train.trainer import Trainer
from tests.train_helpers import SHAPE, CountingStream, PlainObjective, tiny_config, tiny_trainer

REPOSITORY = Path(__file__).resolve().parents[1]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}


def gradients(trainer: Trainer, micro_rows: int, n: int) -> dict[str, torch.Tensor]:
    """Gradient of n rows in micro-batches, by the trainer's own accumulation."""
    micro = [trainer.stream.next_rows(micro_rows) for _ in range(n // micro_rows)]
    trainer.optimizer.zero_grad()
    trainer._forward_backward(micro, 1.0 / sum(normaliser(m) for m in micro))
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], exact: bool = True) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if exact:
            assert torch.equal(tensor, other[name]), name
        else:
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6, msg=name)


def test_accumulation_equals_the_big_batch() -> None:
    """Rows carry different weights, so averaging micro-batch means would be wrong."""
    assert_same(gradients(tiny_trainer(), 2, 12), gradients(tiny_trainer(), 12, 12), exact=False)


def test_the_gradient_is_that_of_the_plain_formula() -> None:
    trainer = tiny_trainer()
    ours = gradients(trainer, 4, 8)
    plain = tiny_trainer().model
    rows = TensorRows.from_rows(CountingStream().next_rows(8))
    hidden = plain(rows.forward_batch(SHAPE)).flatten(0, 1)[rows.index]
    losses = torch.nn.functional.cross_entropy(hidden @ plain.head_weight().T, rows.targets, reduction="none")
    ((losses * rows.weights).sum() / rows.weights.sum()).backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert_same(ours, theirs, exact=False)


@pytest.mark.parametrize("change", [{"activation_checkpointing": True}, {"batch_rows": 4}, {"micro_batch_rows": 2}])
def test_recomputation_and_micro_batches_change_nothing(change: dict[str, Any], tmp_path: Path) -> None:
    base = {"batch_rows": 4} if "batch_rows" in change else {}
    one, other = tiny_trainer(tiny_config(tmp_path, **base)), tiny_trainer(tiny_config(tmp_path, **change))
    for _ in range(3):
        a, b = one.train_step(), other.train_step()
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_the_loss_falls(tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path, steps=60))
    losses = [trainer.train_step().loss for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(optimizer: str, precision: str, tmp_path: Path) -> None:
    """4 + 3 steps equal 7, bit for bit: weights, optimizer state, data cursor, generators."""
    changes: dict[str, Any] = {"optimizer": {"name": optimizer, "lr": 3e-3}, "precision": precision}
    whole = tiny_trainer(tiny_config(tmp_path / "a", **changes))
    for _ in range(7):
        whole.train_step()
    first = tiny_trainer(tiny_config(tmp_path / "b", **changes))
    for _ in range(4):
        first.train_step()
    first.store.save(first.snapshot())
    first.store.wait()
    second = tiny_trainer(tiny_config(tmp_path / "b", **changes), seed=5)
    loaded = second.store.latest()
    assert loaded is not None and loaded.snapshot.step == 4
    second.restore(loaded.snapshot)
    for _ in range(3):
        second.train_step()
    assert second.step == whole.step == 7 and second.tokens == whole.tokens
    assert_same(weights(whole), weights(second))
    assert_same(whole.optimizer.state_dict(), second.optimizer.state_dict())
    assert whole.stream.state_dict() == second.stream.state_dict()


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.train_helpers import tiny_config, tiny_trainer
from openglm.train.progress import RunLog
import openglm.train.state as state
if sys.argv[3] == "slow":
    state.before_publishing = lambda folder: time.sleep(60) if "00000004" in folder.name else None
trainer = tiny_trainer(tiny_config(sys.argv[1], steps=400, checkpoint_every=2, threads=1))
loaded = trainer.store.latest()
if loaded:
    trainer.restore(loaded.snapshot)
log = RunLog(Path(sys.argv[1]))
trainer.train(log)
"""


def start(folder: Path, mode: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(folder), str(REPOSITORY), mode]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def wait_for(condition: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the training process did not get that far"
        time.sleep(0.05)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    child = start(tmp_path, "slow")
    folder = tmp_path / "checkpoints"
    wait_for(lambda: (folder / ".writing-step-00000004" / "manifest.json").is_file())
    child.send_signal(signal.SIGKILL)
    child.wait()
    trainer = tiny_trainer(tiny_config(tmp_path, steps=400))
    loaded = trainer.store.latest()
    assert loaded is not None and loaded.snapshot.step == 2
    trainer.restore(loaded.snapshot)
    other = tiny_trainer(tiny_config(tmp_path / "other", steps=400))
    for _ in range(5):
        other.train_step()
    while trainer.step < 5:
        trainer.train_step()
    assert_same(weights(trainer), weights(other))


def test_a_signal_leaves_a_checkpoint_of_the_last_step(tmp_path: Path) -> None:
    child = start(tmp_path, "fast")
    wait_for(lambda: len(list((tmp_path / "checkpoints").glob("step-*"))) >= 1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"step"' in line]
    loaded = tiny_trainer(tiny_config(tmp_path)).store.latest()
    assert loaded is not None and loaded.snapshot.step == max(steps)


class Poisoned(PlainObjective):
    """NaN in the loss of one step."""

    def __init__(self, step: int) -> None:
        self.calls, self.step = 0, step

    def loss(self, model: Any, rows: TensorRows) -> Any:
        result = super().loss(model, rows)
        self.calls += 1
        return result._replace(loss=result.loss * float("nan")) if self.calls == self.step else result


def test_a_nan_is_skipped_logged_and_never_applied(tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path, batch_rows=4, steps=4))
    trainer.objective = Poisoned(3)
    log = RunLog(tmp_path)
    trainer.train(log)
    log.close()
    assert all(torch.isfinite(t).all() for t in weights(trainer).values())
    assert trainer.optimizer.updates == 3
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "skip"] == [3]


def test_spikes_are_refused_and_a_new_level_is_accepted() -> None:
    guard = SpikeGuard(SpikeConfig())
    assert all(guard.judge(3.0, 1.0) is None for _ in range(20))
    assert "gradient norm" in str(guard.judge(3.0, 11.0)) and "loss" in str(guard.judge(6.1, 1.0))
    assert guard.judge(3.0, 9.0) is None
    assert any(guard.judge(7.0, 1.0) is None for _ in range(64))
    with pytest.raises(ValueError, match="lower optimizer.lr"):
        for _ in range(50):
            guard.judge(float("nan"), 1.0)


def test_dynamic_loss_scale() -> None:
    scaler = LossScaler(scale=8.0, window=3)
    scaler.update(True)
    assert scaler.scale == 8.0  # hysteresis: one overflow is forgiven
    scaler.update(True)
    assert scaler.scale == 4.0
    for _ in range(3):
        scaler.update(False)
    assert scaler.scale == 8.0


def test_fp16_and_bf16_train_like_fp32(tmp_path: Path) -> None:
    last = {}
    for precision in ("fp32", "bf16", "fp16"):
        trainer = tiny_trainer(tiny_config(tmp_path, precision=precision, steps=30))
        last[precision] = [trainer.train_step() for _ in range(30)][-1].loss
    assert last["bf16"] == pytest.approx(last["fp32"], rel=0.05) == pytest.approx(last["fp16"], rel=0.05)


def test_embedding_gradient_shrink_is_alpha_times_the_lookup_gradient(tmp_path: Path) -> None:
    """With an untied head the whole embedding gradient comes from the lookup."""
    from tests import train_helpers

    untied = dataclasses.replace(SHAPE, tie_embeddings=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_helpers, "SHAPE", untied)
        changes = {"model": untied.to_dict()}
        whole = gradients(tiny_trainer(tiny_config(tmp_path, **changes)), 4, 4)
        shrunk = gradients(tiny_trainer(tiny_config(tmp_path, embedding_grad_shrink=0.1, **changes)), 4, 4)
    torch.testing.assert_close(shrunk["embed.weight"], 0.1 * whole["embed.weight"])
    torch.testing.assert_close(shrunk["head.weight"], whole["head.weight"])


def test_schedules() -> None:
    config = tiny_config(steps=101, schedule={"warmup_steps": 10, "min_lr_ratio": 0.1},
                         batch_warmup={"start_rows": 4, "steps": 10}, batch_rows=16)  # fmt: skip
    assert lr_factor(0, config) == pytest.approx(0.1) and lr_factor(9, config) == 1.0
    assert lr_factor(55, config) == pytest.approx(0.55) and lr_factor(100, config) == pytest.approx(0.1)
    assert [batch_rows(step, config) for step in (0, 3, 5, 9, 10, 50)] == [4, 4, 8, 12, 16, 16]


def test_disk_full_while_checkpointing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openglm.train.state as state

    trainer = tiny_trainer(tiny_config(tmp_path, steps=8, checkpoint_every=2))

    def full(folder: Path) -> None:
        if folder.name > ".writing-step-00000003":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "before_publishing", full)
    log = RunLog(tmp_path)
    with pytest.raises(ValueError, match="No space left"):
        trainer.train(log)
    log.close()
    assert trainer.step == 8, "a checkpoint that fails midway does not end the run"
    assert [p.name for p in trainer.store.complete()] == ["step-00000002"]
    assert not list((tmp_path / "checkpoints").glob(".writing*"))


def test_damaged_checkpoints_fall_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path))
    for _ in range(2):
        trainer.train_step()
        trainer.store.save(trainer.snapshot())
    trainer.store.wait()
    newest = trainer.store.complete()[-1] / "trainer.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    loaded = trainer.store.latest()
    assert loaded is not None and loaded.snapshot.step == 1 and "sha256" in capsys.readouterr().err
    older = trainer.store.complete()[0] / "model" / "model.safetensors"
    older.write_bytes(older.read_bytes()[:-10])
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        trainer.store.latest()


def test_a_run_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_config(tmp_path))
    snapshot = trainer.snapshot()
    other = tiny_trainer(tiny_config(tmp_path))
    other.identity = {"model": "another"}
    with pytest.raises(ValueError, match="use another run_dir, or start over"):
        other.restore(snapshot)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"optimizer": {"lrr": 3}}, "did you mean 'lr'"),
        ({"steps": "many"}, "steps"),
        ({"micro_batch_rows": 3}, "multiple"),
        ({"precision": "fp8"}, "precision"),
    ],
)  # fmt: skip
def test_config_mistakes_name_the_key(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_config({"objective": "lm", "run_dir": "x", "steps": 2, "model": "glm-nano"} | values)


def test_memory_that_is_not_there_is_refused_with_advice() -> None:
    config = tiny_config()
    plan = plan_memory(config, SHAPE, PlainObjective(), 96)
    parameters = sum(p.numel() for p in tiny_trainer().model.parameters())
    assert plan.device["parameters"] >= 4 * parameters and plan.device["optimizer state"] >= 8 * parameters
    check_memory(plan, config, "cpu", (1 << 40, 1 << 40))
    with pytest.raises(ValueError, match="micro_batch_rows=2"):
        check_memory(plan, config, "cpu", (1000, 1000))
    with pytest.raises(ValueError, match="GPU memory"):
        check_memory(MemoryPlan({"parameters": 10}, {}), config, "cuda", (5, 100))


def test_deep_models_are_extrapolated_from_their_layers() -> None:
    config = tiny_config()
    deep = dataclasses.replace(SHAPE, n_layers=20)
    by_layer = plan_memory(config, deep, PlainObjective(), 96).device["parameters"]
    state = sum(4 * p.numel() for p in __import__("openglm.model.transformer", fromlist=["x"]).Transformer(
        deep, "meta").parameters())  # fmt: skip
    assert by_layer == pytest.approx(state, rel=0.02)
