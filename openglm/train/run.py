"""From a run config to a trained model: builds the parts, resumes, trains, writes run_dir/model and report.html.

openglm train runs/tiny.yaml steps=50 --resume auto

run_dir/  run.yaml (resolved)  log.jsonl  checkpoints/  model/ (the result, an ordinary checkpoint)  report.html
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from openglm.config import GLMConfig
from openglm.data.stream import RowStream
from openglm.model.checkpoint import CheckpointMeta, read_config, save_checkpoint
from openglm.model.init import init_weights
from openglm.model.linear import QuantLinear
from openglm.model.load import load_checkpoint
from openglm.model.transformer import Transformer
from openglm.tokenizer import Tokenizer
from openglm.train.config import TrainConfig, load_config, model_config
from openglm.train.memory import available_bytes, check_memory, keep_freed_memory, measure_baseline, plan_memory
from openglm.train.objectives import OBJECTIVES, Objective
from openglm.train.progress import RunLog, rewind_log
from openglm.train.report import write_report
from openglm.train.state import CheckpointStore, Loaded, read
from openglm.train.trainer import Sampler, Trainer
from openglm.types import IGNORE

__all__ = ["RunResult", "build", "check_plan", "device_of", "initial_model", "main", "run", "with_precision"]


@dataclass(frozen=True)
class RunResult:
    """finished: all steps done, False when a signal ended the run early. loss: of the last step. eval: held-out means
    by kind, empty when never measured. model_dir: None unless finished."""

    run_dir: Path
    model_dir: Path | None
    finished: bool
    step: int
    tokens: int
    loss: float
    eval: dict[str, float]
    seconds: float


def main(
    config_path: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), resume: str = "auto",
    sampler: Sampler | None = None,
) -> RunResult:  # fmt: skip
    """`openglm train`. Raises ValueError, one line, for every mistake of the user's."""
    return run(load_config(config_path, overrides), resume, sampler)


def run(config: TrainConfig, resume: str = "auto", sampler: Sampler | None = None) -> RunResult:
    """Train as `config` says.

    resume: "auto" (latest checkpoint of run_dir, if any), "never", or a checkpoint folder.
    """
    start = time.perf_counter()
    config = with_precision(config)
    trainer = build(config, sampler)
    run_dir = Path(config.run_dir)
    loaded = _resume(trainer, run_dir, resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    _write_yaml(run_dir / "run.yaml", config)
    rewind_log(run_dir / "log.jsonl", trainer.step)
    log = RunLog(run_dir, config.tensorboard)
    try:
        if loaded is not None:
            log.write("resume", {"step": trainer.step, "path": str(loaded.path), "time": time.time()})
            print(f"resumed from {loaded.path}", file=sys.stderr)
        else:
            log.write("start", {"step": 0, "time": time.time(), "device": str(trainer.device)})
        trainer.train(log)
        finished = trainer.step >= config.steps
        log.write("end", {"step": trainer.step, "finished": finished, "time": time.time()})
    finally:
        trainer.store.wait()
        log.close()
    write_report(run_dir)
    model_dir = _save_result(trainer, run_dir / "model") if finished else None
    return RunResult(
        run_dir, model_dir, finished, trainer.step, trainer.tokens,
        trainer.last.loss if trainer.last is not None else float("nan"), trainer.last_eval,
        time.perf_counter() - start,
    )  # fmt: skip


def build(config: TrainConfig, sampler: Sampler | None = None) -> Trainer:
    """Trainer at step 0, everything checked against everything, the memory plan on stderr."""
    config = with_precision(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    keep_freed_memory()
    tokenizer = _load_tokenizer(config)
    entry = OBJECTIVES[config.objective]
    data = entry.parse_data(config.data)
    shape, meta = _shape(config, tokenizer)
    streams: list[RowStream | None] = [
        entry.build_stream(data, shape, tokenizer, config.row_len, config.seed, "train"),
        entry.build_stream(data, shape, tokenizer, config.row_len, config.seed, "val") if config.eval_every else None,
    ]
    assert streams[0] is not None
    objective = entry.build_objective(chunk=config.loss_chunk or None)
    device = device_of(config)
    if config.precision == "bf16" and not bf16_is_fast(device):
        print(f"note: this {device} has no bf16 arithmetic and emulates it many times slower: use precision=fp32",
              file=sys.stderr)  # fmt: skip
    check_plan(config, shape, objective, streams[0], device)
    model = initial_model(config, shape, device)
    store = CheckpointStore(Path(config.run_dir) / "checkpoints", shape, meta, tokenizer.files, config.keep_checkpoints)
    identity = {
        "objective": config.objective,
        "model": shape.to_dict(),
        "tokenizer": tokenizer.fingerprint,
        "seed": config.seed,
        "row_len": config.row_len,
    }
    return Trainer(config, model, objective, streams[0], streams[1], store, identity, sampler)


def with_precision(config: TrainConfig) -> TrainConfig:
    """The config with precision "auto" settled for the device it runs on: bf16 where that is fast, else fp32."""
    if config.precision != "auto":
        return config
    return replace(config, precision="bf16" if bf16_is_fast(device_of(config)) else "fp32")


def bf16_is_fast(device: str) -> bool:
    """Whether the device has bf16 arithmetic: CPUs with AVX-512 bf16 or the like, GPUs since Ampere."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_plan(config: TrainConfig, shape: GLMConfig, objective: Objective, stream: RowStream, device: str) -> None:
    """Print what the run will hold, part by part; ValueError with advice when that is more than there is."""
    before = stream.state_dict()
    batches = [stream.next_rows(config.micro_batch_rows) for _ in range(8)]
    stream.load_state_dict(before)
    n_targets = max(int((rows.targets != IGNORE).sum()) for rows in batches)
    baseline = measure_baseline(config, shape, objective, device)
    plan = plan_memory(config, shape, objective, n_targets, device, baseline)
    print("\n".join([f"memory of a step ({config.precision}, {n_targets:,} targets):", *plan.lines()]), file=sys.stderr)
    check_memory(plan, config, device, available_bytes(device))


def _load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The named one, else that of the starting checkpoint, else that of the first folder of token shards."""
    folder = config.tokenizer or config.init_from
    train = config.data.get("train")
    if folder is None and isinstance(train, list | tuple) and train and (Path(train[0]) / "tokenizer.json").is_file():
        folder = train[0]
    if folder is None:
        raise ValueError("run config: tokenizer is missing: the folder that `openglm tokenizer train` wrote")
    return Tokenizer.load(Path(folder))


def _shape(config: TrainConfig, tokenizer: Tokenizer) -> tuple[GLMConfig, CheckpointMeta]:
    """Model config and what travels with the checkpoints; ValueError when model, tokenizer and rows do not fit."""
    shape = model_config(config.model) if config.model is not None else None
    if config.init_from is not None:
        found, _ = read_config(config.init_from)
        if shape is not None and shape != found:
            raise ValueError(f"run config: model differs from the shape of {config.init_from}: leave model out")
        shape = found
    assert shape is not None
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer has {tokenizer.vocab_size} ids, the model {shape.vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size}, or use the tokenizer that belongs to the model"
        )
    if config.row_len > shape.max_seq_len:
        raise ValueError(f"row_len ({config.row_len}) is over the model's max_seq_len ({shape.max_seq_len})")
    return shape, _meta(config, tokenizer)


def _meta(config: TrainConfig, tokenizer: Tokenizer) -> CheckpointMeta:
    chat_format, stop_ids = None, ("<|endoftext|>", "<eop>")
    ids = tuple(tokenizer.special_ids[name] for name in stop_ids if name in tokenizer.special_ids)
    if config.objective == "sft" or config.data.get("instructions"):
        from openglm.formats import get_format

        chat_format = str(config.data.get("format", "glm-4"))
        ids = tuple(get_format(chat_format, tokenizer).stop_ids)
    return CheckpointMeta(
        special_ids=dict(tokenizer.special_ids), stop_ids=ids, chat_format=chat_format, tokenizer=tokenizer.kind,
        description={"objective": config.objective, "steps": config.steps, "seed": config.seed},
    )  # fmt: skip


def device_of(config: TrainConfig) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but this torch sees no GPU; use device=auto or cpu")
    return config.device


def initial_model(config: TrainConfig, shape: GLMConfig, device: str) -> Transformer:
    if config.init_from is not None:
        model, _ = load_checkpoint(config.init_from, device, torch.float32)
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            raise ValueError(f"run config: init_from {config.init_from} is quantised: train the unquantised model")
        return model
    return init_weights(Transformer(shape, device, torch.float32), config.seed, config.init)


def _resume(trainer: Trainer, run_dir: Path, resume: str) -> Loaded | None:
    if resume == "never":
        _set_aside(run_dir)
        return None
    loaded = trainer.store.latest() if resume == "auto" else read(_checkpoint_folder(Path(resume)))
    if loaded is not None:
        trainer.restore(loaded.snapshot)
    return loaded


def _checkpoint_folder(path: Path) -> Path:
    """A step folder itself, or the newest one of a run folder."""
    if (path / "trainer.json").is_file():
        return path
    steps = sorted((path / "checkpoints").glob("step-*"))
    if not steps:
        raise ValueError(f"--resume {path}: neither a training checkpoint nor a run folder with one")
    return steps[-1]


def _set_aside(run_dir: Path) -> None:
    """Move what an earlier run left behind into previous-N: starting over destroys nothing."""
    found = [run_dir / name for name in ("run.yaml", "log.jsonl", "checkpoints", "model", "report.html")]
    found = [path for path in found if path.exists()]
    if not found:
        return
    n = 1
    while (run_dir / f"previous-{n}").exists():
        n += 1
    folder = run_dir / f"previous-{n}"
    folder.mkdir()
    for path in found:
        path.rename(folder / path.name)
    print(f"the earlier run in {run_dir} is kept in {folder}", file=sys.stderr)


def _write_yaml(path: Path, config: TrainConfig) -> None:
    import yaml

    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        yaml.safe_dump(config.to_dict(), file, sort_keys=False, allow_unicode=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _save_result(trainer: Trainer, folder: Path) -> Path:
    """The trained weights as an ordinary checkpoint, with what they were trained on."""
    store = trainer.store
    facts = {
        "tokens": trainer.tokens,
        "loss": trainer.last.loss if trainer.last else None,
        "held_out": trainer.last_eval,
    }
    meta = replace(store.meta, description=store.meta.description | facts)
    save_checkpoint(folder, trainer.model.state_dict(), store.config, meta, store.tokenizer_files)
    return folder
