"""The verbs that measure this machine: `openglm bench generate` and `openglm bench train`.

    python -m openglm bench generate "random:glm-edge-1.5b?quantize=int4" --batch 4
    python -m openglm bench train glm-nano row_len=256

Each verb has three parts: NAME_options adds its options, NAME_value computes what --json prints, NAME_print shows it.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, cast

from openglm.cli_options import Parser, load_model, model_option, place_options

if TYPE_CHECKING:
    from openglm.engine import Engine

__all__: list[str] = []

# -------------------------------------------------------------------- bench generate


def generate_options(p: argparse.ArgumentParser) -> None:
    model_option(cast(Parser, p))
    p.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="length of each prompt (default: 512)")
    p.add_argument("--new-tokens", type=int, default=128, metavar="N", help="length of each answer (default: 128)")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="requests side by side (default: 1)")
    p.add_argument("--repeats", type=int, default=3, metavar="N", help="runs whose medians count (default: 3)")
    place_options(cast(Parser, p))


def generate_value(o: argparse.Namespace) -> dict[str, Any]:
    """What --json prints.

    prefill_tok_s, decode_tok_s, ttft_s (`openglm.engine.measure.Run` defines them), each a median of `repeats` runs,
    which `runs` lists; peak_rss_bytes: of the process until then, loading included; weight_bytes; bytes_per_pass: of
    the weights that one pass of decoding reads; read_bandwidth_bytes_s: measured with the same threads;
    bandwidth_fraction: the share of it that decoding reaches by reading weights alone. model, batch, prompt_tokens,
    new_tokens, repeats, threads, device, runner ("native" or "torch"), isa (of the native library, or null).
    """
    from tqdm import tqdm

    from openglm.engine.measure import bytes_per_pass, measure_speed, read_bandwidth
    from openglm.model.load import weight_bytes
    from openglm.train.progress import peak_rss_bytes

    model = load_model(o)
    engine = _for_batch(model.engine, o.batch)
    total = max(0, o.repeats * o.batch * o.new_tokens)
    with tqdm(total=total, desc="bench", unit="token", leave=False) as bar:
        speed = measure_speed(engine, o.prompt_tokens, o.new_tokens, o.batch, o.repeats, bar.update)
    peak, read = peak_rss_bytes(), bytes_per_pass(engine)
    bandwidth = read_bandwidth(engine.device)
    decode = speed.median("decode_tok_s")
    return {
        "model": o.model or "the bundled model", "batch": o.batch, "prompt_tokens": o.prompt_tokens,
        "new_tokens": o.new_tokens, "repeats": o.repeats, **_machine(engine),
        "prefill_tok_s": speed.median("prefill_tok_s"), "decode_tok_s": decode, "ttft_s": speed.median("ttft_s"),
        "peak_rss_bytes": peak, "weight_bytes": weight_bytes(engine.model), "bytes_per_pass": read,
        "read_bandwidth_bytes_s": bandwidth, "bandwidth_fraction": decode / o.batch * read / bandwidth,
        "runs": [vars(run) for run in speed.runs],
    }  # fmt: skip


def _for_batch(engine: Engine, batch: int) -> Engine:
    """The engine itself, or one that runs more requests at once where `batch` asks for it."""
    from openglm.engine import Engine, EngineOptions

    options = engine.options
    if batch <= options.n_parallel:
        return engine
    wide = EngineOptions(n_parallel=batch, step_tokens=max(options.step_tokens, batch))
    return Engine(engine.model, engine.special_ids, engine.vocab_size, wide)


def _machine(engine: Engine) -> dict[str, Any]:
    import torch

    from openglm.engine.native_runner import NativeRunner
    from openglm.ops.native import describe

    native = isinstance(engine.runner, NativeRunner)
    return {
        "threads": torch.get_num_threads(), "device": str(engine.device), "runner": "native" if native else "torch",
        "isa": describe()["isa"] if native else None,
    }  # fmt: skip


def _print_rows(rows: list[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"  {name:<12} {text}")


def generate_print(value: dict[str, Any]) -> None:
    kernels = f"native kernels ({value['isa']})" if value["runner"] == "native" else "PyTorch's operators"
    requests = "1 request" if value["batch"] == 1 else f"{value['batch']} requests side by side"
    print(f"{value['model']} on {value['device']}, {value['threads']} threads, {kernels}: {requests} of "
          f"{value['prompt_tokens']} + {value['new_tokens']} tokens, medians of {value['repeats']}")  # fmt: skip
    read = f"{value['bandwidth_fraction']:.0%} of {value['read_bandwidth_bytes_s'] / 1e9:.1f} GB/s"
    rows = [
        ("prefill", f"{value['prefill_tok_s']:,.1f} tokens/s"),
        ("decode", f"{value['decode_tok_s']:,.1f} tokens/s"),
        ("first token", f"{value['ttft_s']:.3f} s"),
        ("weights", f"{value['weight_bytes'] / 1e6:,.1f} MB, {value['bytes_per_pass'] / 1e6:,.1f} read in a pass"),
        ("bandwidth", f"decoding reads weights at {read} measured"),
        ("memory", f"{value['peak_rss_bytes'] / 1e6:,.1f} MB at most"),
    ]
    _print_rows(rows)


# -------------------------------------------------------------------- bench train


def train_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", metavar="RUN.yaml|PRESET", help="a run config with its data, or a shape on random tokens")
    p.add_argument("overrides", nargs="*", metavar="a.b=c", help="change single keys, such as micro_batch_rows=2")
    p.add_argument("--steps", type=int, default=5, metavar="N", help="steps whose medians count (default: 5)")


def train_value(o: argparse.Namespace) -> dict[str, Any]:
    """What --json prints: config, what `openglm.train.measure.measure_training` gives, peak_rss_bytes, and on a GPU
    device_peak_bytes. Nothing is written to the run's folder."""
    from tqdm import tqdm

    from openglm.presets import PRESETS
    from openglm.train.config import load_config
    from openglm.train.measure import WARM_UP_STEPS, build_random, build_run, measure_training
    from openglm.train.progress import peak_rss_bytes

    if o.config in PRESETS:
        shape = {"objective": "lm", "model": {"preset": o.config}, "run_dir": "bench", "steps": 1000}
        trainer = build_random(load_config(shape, o.overrides))
    else:
        trainer = build_run(load_config(o.config, o.overrides))
    with tqdm(total=WARM_UP_STEPS + max(0, o.steps), desc="bench", unit="step", leave=False) as bar:
        value = {"config": o.config, **measure_training(trainer, o.steps, bar.update)}
    value["peak_rss_bytes"] = peak_rss_bytes()
    if trainer.device.type == "cuda":
        import torch

        value["device_peak_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
    return value


def train_print(value: dict[str, Any]) -> None:
    machine = f"{value['device']}, {value['threads']} threads, {value['precision']}"
    print(f"{value['config']}: {value['parameters']:,} parameters on {machine}, "
          f"{value['batch_tokens']:,} tokens a step, medians of {value['steps']} steps")  # fmt: skip
    reached = f"{value['flop_s'] / 1e9:,.1f} GFLOP/s, {value['mfu']:.0%} of the {value['matmul_flop_s'] / 1e9:,.1f}"
    rows = [
        ("speed", f"{value['tokens_per_s']:,.1f} tokens/s, {value['step_s']:.3f} s a step"),
        ("arithmetic", f"{reached} of a large matrix product"),
        ("memory", f"{value['peak_rss_bytes'] / 1e6:,.1f} MB at most"),
        ("loss", f"{value['loss']:.4f} after the last step; {value['skipped']} of {value['steps']} steps skipped"),
    ]
    if "device_peak_bytes" in value:
        rows.insert(3, ("on the GPU", f"{value['device_peak_bytes'] / 1e6:,.1f} MB at most"))
    _print_rows(rows)
