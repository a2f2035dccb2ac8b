"""Our Trainer beside transformers' Trainer on one GLM-4-style model: tokens/s, loss after the same steps, peak memory.

    pip install transformers accelerate
    python bench/train.py --repeats 3            # table, then one JSON line; about 3 minutes a repeat on two cores

Both start from the same weights and see the same 512-token rows in the same order, with the same AdamW, learning-rate
schedule, clipping and bf16 autocast over float32 weights. Each run is a process of its own, so that its peak memory is
its own; the order alternates from repeat to repeat. A step's time is from the end of one step to the end of the next:
data, forward, backward, optimizer and logging; the first steps are left out and the median is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the parent process stays free of torch: a child inherits its parent's peak memory on Linux
    from openglm.config import GLMConfig
    from openglm.data.example import Rows
    from openglm.train.config import TrainConfig

SHAPE: dict[str, Any] = {  # 27.6M parameters, 15M of them in the blocks
    "vocab_size": 16384, "dim": 384, "n_layers": 8, "n_heads": 6, "n_kv_heads": 2, "head_dim": 64, "ffn_dim": 1280,
    "max_seq_len": 1024, "rope": {"fraction": 0.5},
}  # fmt: skip
WARM_UP_STEPS = 5
NAMES = {"ours": "openglm", "hf": "transformers"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--row-len", type=int, default=512)
    parser.add_argument("--micro-rows", type=int, default=8, help="rows of one forward pass")
    parser.add_argument("--batch-rows", type=int, default=8, help="rows of one optimizer step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                        help="auto: bf16 where this CPU has it (default)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="torch.compile in both")
    parser.add_argument("--workers", type=int, default=0, help="data-loader processes of transformers")
    parser.add_argument("--worker", choices=("prepare", *NAMES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.precision == "auto":
        from openglm.train.run import bf16_is_fast

        args.precision = "bf16" if bf16_is_fast("cpu") else "fp32"
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be above {WARM_UP_STEPS}, the steps that are not timed")
    if args.batch_rows % args.micro_rows:
        parser.error("--batch-rows must be a multiple of --micro-rows")
    if args.worker:
        worker = {"prepare": prepare, "ours": run_ours, "hf": run_hf}[args.worker]
        print(json.dumps(worker(args)))
    else:
        compare(args)


# The comparison ---------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    """Run everything in child processes, print the table and the JSON line."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        facts = child(args, "prepare", folder)
        for repeat in range(args.repeats):
            for name in sorted(NAMES, reverse=repeat % 2 == 0):  # ours first, then theirs first
                print(f"repeat {repeat + 1}/{args.repeats}: {NAMES[name]} ...", file=sys.stderr)
                runs[name].append(child(args, name, folder))
    result = summary(args, facts, runs)
    print_table(args, result)
    print(json.dumps(result))


def child(args: argparse.Namespace, worker: str, folder: str) -> dict[str, Any]:
    """JSON from the last line of this script run as `worker`; its progress passes through to stderr."""
    command = [sys.executable, __file__, "--worker", worker, "--folder", folder]
    for key in ("steps", "row_len", "micro_rows", "batch_rows", "threads", "workers", "precision"):
        command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    command += ["--compile"] if args.compile else []
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": paths}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"the {worker} run failed (exit status {done.returncode}); its output is above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summary(
    args: argparse.Namespace, facts: Mapping[str, Any], runs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Medians over the repeats, and the figures that the two are compared by."""
    tokens = args.batch_rows * args.row_len
    result: dict[str, Any] = {"bench": "train", **facts, "steps": args.steps, "batch_tokens": tokens,
                              "threads": args.threads, "precision": args.precision,
                              "compile": args.compile}  # fmt: skip
    for name, repeats in runs.items():
        rates = [tokens / statistics.median(run["step_seconds"]) for run in repeats]
        last = repeats[-1]
        result[NAMES[name]] = {
            "tokens_per_s": statistics.median(rates),
            "tokens_per_s_repeats": [round(rate, 1) for rate in rates],
            "loss": statistics.median(run["losses"][-1] for run in repeats),
            "peak_rss_bytes": statistics.median(run["peak_rss_bytes"] for run in repeats),
            "rss_before_bytes": statistics.median(run["rss_before_bytes"] for run in repeats),
            **{key: last[key] for key in ("planned_bytes", "skipped", "version") if key in last},
        }
    ours, theirs = (runs[name][-1]["losses"] for name in NAMES)
    result["speedup"] = result["openglm"]["tokens_per_s"] / result["transformers"]["tokens_per_s"]
    result["memory_ratio"] = result["openglm"]["peak_rss_bytes"] / result["transformers"]["peak_rss_bytes"]
    result["loss_difference"] = ours[-1] - theirs[-1]
    result["loss_difference_first"] = ours[0] - theirs[0]
    result["loss_difference_worst"] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return result


def print_table(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    print(f"{result['parameters'] / 1e6:.1f}M parameters, {result['batch_tokens']} tokens a step in rows of "
          f"{args.row_len}, {result['steps']} steps, {result['threads']} threads, {args.precision}"
          f"{', compiled' if args.compile else ''}; medians of {args.repeats} runs")  # fmt: skip
    print(f"{'':14}{'tokens/s':>10}{'loss at end':>13}{'peak memory':>13}{'before step 1':>15}")
    for name in NAMES.values():
        row = result[name]
        print(f"{name:14}{row['tokens_per_s']:10,.0f}{row['loss']:13.4f}{row['peak_rss_bytes'] / 2**20:9,.0f} MiB"
              f"{row['rss_before_bytes'] / 2**20:11,.0f} MiB")  # fmt: skip
    print(f"speed {result['speedup']:.2f} times, peak memory {result['memory_ratio']:.2f} times, loss difference "
          f"{result['loss_difference']:+.4f} at the end, {result['loss_difference_first']:+.4f} at step 1, "
          f"{result['loss_difference_worst']:.4f} at most")  # fmt: skip
    ours = result["openglm"]
    if planned := ours.get("planned_bytes"):
        print(f"openglm planned {planned / 2**20:,.0f} MiB, measured {ours['peak_rss_bytes'] / planned:.3f} of it")


# What both start from ---------------------------------------------------------------------------------------------


def shape() -> GLMConfig:
    from openglm.config import from_dict

    return from_dict(SHAPE)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write rows.npy (steps * batch_rows, row_len) int64 and weights.safetensors under transformers' names."""
    import torch
    from safetensors.torch import save_file

    from openglm.model.cost import n_parameters
    from openglm.model.init import init_weights
    from openglm.model.transformer import Transformer
    from openglm.model.weights import FAMILIES, export_weights

    config = shape()
    np.save(args.folder / "rows.npy", synthetic_rows(args.steps * args.batch_rows, args.row_len, config.vocab_size))
    state = init_weights(Transformer(config), seed=1).state_dict()
    weights = export_weights(FAMILIES["hf-glm"], config, state)
    exported = {name: t.contiguous() for name, t in weights if isinstance(t, torch.Tensor)}
    save_file(exported, args.folder / "weights.safetensors")
    return {"parameters": n_parameters(config)}


def synthetic_rows(n_rows: int, row_len: int, vocab_size: int) -> np.ndarray:
    """Token rows with something to learn: Zipf-distributed tokens, each followed half of the time by its partner."""
    rng = np.random.default_rng(7)
    share = 1.0 / np.arange(1, vocab_size + 1)
    rows = rng.choice(vocab_size, size=(n_rows, row_len), p=share / share.sum())
    partner = rng.permutation(vocab_size)
    follow = rng.random((n_rows, row_len)) < 0.5
    for t in range(1, row_len):
        rows[:, t] = np.where(follow[:, t], partner[rows[:, t - 1]], rows[:, t])
    return rows.astype(np.int64)


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The run in our terms; transformers' arguments are derived from it."""
    from openglm.train.config import load_config

    return load_config(
        {
            "objective": "lm", "model": SHAPE, "run_dir": str(args.folder / "run"), "steps": args.steps,
            "row_len": args.row_len, "micro_batch_rows": args.micro_rows, "batch_rows": args.batch_rows,
            "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "grad_clip": 1.0},
            "schedule": {"warmup_steps": max(1, args.steps // 10)}, "precision": args.precision,
            "compile": args.compile, "threads": args.threads, "device": "cpu",
        }
    )  # fmt: skip


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Ours -------------------------------------------------------------------------------------------------------------


class RowsInOrder:
    """Stream over a fixed array of rows; the last token of a row has no target, as in transformers' own loss."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.cursor = rows, 0

    def next_rows(self, batch_size: int) -> Rows:
        from openglm.data.example import Example, collate
        from openglm.types import IGNORE

        examples = []
        for row in self.rows[self.cursor : self.cursor + batch_size].astype(np.int32):
            positions = np.broadcast_to(np.arange(len(row), dtype=np.int32), (2, len(row)))
            targets = np.append(row[1:], np.int32(IGNORE))
            examples.append([Example(row, targets, positions, np.zeros(len(row), np.bool_), "lm")])
        self.cursor += batch_size
        return collate(examples, self.rows.shape[1], pad_id=0)

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cursor = int(state["cursor"])


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from safetensors import safe_open

    import openglm
    from openglm.model.checkpoint import CheckpointMeta
    from openglm.model.transformer import Transformer
    from openglm.model.weights import FAMILIES, import_weights
    from openglm.train.memory import keep_freed_memory, measure_baseline, plan_memory
    from openglm.train.objectives import OBJECTIVES
    from openglm.train.progress import RunLog
    from openglm.train.state import CheckpointStore
    from openglm.train.trainer import Trainer

    torch.set_num_threads(args.threads)
    config = train_config(args)
    baseline = measure_baseline(config, shape(), OBJECTIVES["lm"].build_objective(), "cpu")
    model = Transformer(shape())
    with safe_open(args.folder / "weights.safetensors", "pt") as file:
        model.load_state_dict(dict(import_weights(FAMILIES["hf-glm"], model.config, file.get_tensor)))
    run_dir = Path(tempfile.mkdtemp(dir=args.folder))
    store = CheckpointStore(run_dir / "checkpoints", model.config, CheckpointMeta(), {}, keep=1)
    stream = RowsInOrder(np.load(args.folder / "rows.npy", mmap_mode="r"))
    objective = OBJECTIVES["lm"].build_objective()
    keep_freed_memory()
    n_targets = args.micro_rows * (args.row_len - 1)
    plan = plan_memory(config, model.config, objective, n_targets, "cpu", baseline)
    trainer = Trainer(config, model, objective, stream, None, store, {})
    before = peak_rss_bytes()
    log = RunLog(run_dir)
    trainer.train(log)
    log.close()
    events = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    ends = [event["time"] for event in steps]
    return {
        "version": openglm.__version__,
        "step_seconds": np.diff(ends)[WARM_UP_STEPS - 1 :].tolist(),
        "losses": [event["loss"] for event in steps],
        "skipped": sum(event["skipped"] for event in steps),
        "planned_bytes": plan.device_bytes + plan.host_bytes,
        "rss_before_bytes": before,
        "peak_rss_bytes": peak_rss_bytes(),
    }


# Theirs -----------------------------------------------------------------------------------------------------------


def run_hf(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' Trainer at its best: fused AdamW and attention, nothing logged but the loss, no saving."""
    import torch
    import transformers
    from safetensors.torch import load_file
    from transformers import GlmConfig, GlmForCausalLM, TrainerCallback, TrainingArguments

    from openglm.train.schedule import lr_factor

    torch.set_num_threads(args.threads)
    config, c = train_config(args), shape()
    hf_config = GlmConfig(  # type: ignore[call-arg]
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, attention_bias=c.qkv_bias, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta, "partial_rotary_factor": c.rope.fraction},
        attn_implementation="sdpa", dtype="float32", use_cache=False,
    )  # fmt: skip
    model = GlmForCausalLM(hf_config)
    model.load_state_dict(load_file(args.folder / "weights.safetensors"))
    rows = torch.from_numpy(np.load(args.folder / "rows.npy"))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.time())

    class Trainer(transformers.Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
            return self.lr_scheduler

    o = config.optimizer
    arguments = TrainingArguments(
        output_dir=str(args.folder / "hf"), max_steps=args.steps, per_device_train_batch_size=args.micro_rows,
        gradient_accumulation_steps=args.batch_rows // args.micro_rows, learning_rate=o.lr, adam_beta1=o.betas[0],
        adam_beta2=o.betas[1], adam_epsilon=o.eps, weight_decay=o.weight_decay, max_grad_norm=o.grad_clip,
        optim="adamw_torch_fused", bf16=args.precision == "bf16", use_cpu=True, torch_compile=args.compile,
        train_sampling_strategy="sequential", dataloader_num_workers=args.workers, dataloader_pin_memory=False,
        remove_unused_columns=False, logging_steps=1, logging_nan_inf_filter=False, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Clock()])
    trainer.remove_callback(transformers.PrinterCallback)
    before = peak_rss_bytes()
    trainer.train()
    return {
        "version": transformers.__version__,
        "step_seconds": np.diff(ends)[WARM_UP_STEPS - 1 :].tolist(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rss_before_bytes": before,
        "peak_rss_bytes": peak_rss_bytes(),
    }


if __name__ == "__main__":
    main()
