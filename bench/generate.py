"""Prefill and decoding on a CPU: our engine beside llama.cpp and transformers, every process with the same threads.

    python bench/generate.py model.gguf --peer-python PYTHON   # an interpreter that has llama-cpp-python
    python bench/generate.py --transformers                    # random:glm-edge-1.5b, our INT4 and their bfloat16
    python bench/generate.py --table                           # ours in INT4, INT8, bfloat16 at batch 1 to 8

Parts can be asked for together. Sides take turns, each run in a process of its own; medians count. Ours goes through
the engine, scheduling and drawing included (`openglm bench generate`), and measures the read bandwidth in the same
process; llama.cpp's time is that of `eval` alone, transformers' that of the model's forward pass and an argmax.

llama.cpp runs the file itself and a Q4_0 that it makes of the file (kept in the temporary folder), which it repacks for
the CPU, both with and without flash attention: its best figure of the four is what ours is compared with.
Prints tables, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("prefill", "decode")
FORMS = {"int4": "?quantize=int4", "int8": "?quantize=int8", "bf16": ""}
BATCHES = (1, 2, 4, 8)
TABLE_PROMPT, TABLE_NEW = 32, 16
LLAMA_Q4_0 = 2  # LLAMA_FTYPE_MOSTLY_Q4_0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=".gguf files to run beside llama.cpp")
    parser.add_argument("--peer-python", metavar="PYTHON", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--transformers", action="store_true", help="our INT4 beside transformers in bfloat16")
    parser.add_argument("--table", action="store_true", help="our INT4, INT8 and bfloat16 at several batch sizes")
    parser.add_argument("--preset", default="glm-edge-1.5b", help="shape of both (default: glm-edge-1.5b)")
    parser.add_argument("--form", default="quantize=int4", help="ours beside transformers (default: quantize=int4)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, which take turns")
    parser.add_argument("--repeats", type=int, default=2, help="runs in each process")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--flash", action="store_true", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        print(json.dumps(WORKERS[o.worker](o)))
        return
    if not (o.models or o.transformers or o.table):
        parser.error("nothing to do: give .gguf files, --transformers or --table")
    if o.models and not o.peer_python:
        parser.error("--peer-python: which interpreter has llama-cpp-python?")
    result: dict[str, Any] = {"bench": "generate", "threads": o.threads}
    if o.models:
        result["gguf"] = [beside_llama(o, model) for model in o.models]
    if o.transformers:
        result["transformers"] = beside_transformers(o)
    if o.table:
        result["table"] = table(o)
    print(json.dumps(result))


# Processes --------------------------------------------------------------------------------------------------------


def child(command: Sequence[str], threads: int) -> dict[str, Any]:
    """JSON from the last line that a command prints."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def worker(o: argparse.Namespace, name: str, model: str, *options: str, python: str = sys.executable) -> dict[str, Any]:
    """One of WORKERS in a process of its own."""
    command = [python, __file__, model, "--worker", name, "--preset", o.preset, *options]
    for key in ("prompt_tokens", "new_tokens", "repeats", "threads"):
        command += [f"--{key.replace('_', '-')}", str(getattr(o, key))]
    return child(command, o.threads)


def ours(o: argparse.Namespace, model: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "openglm", "bench", "generate", model, "--device", "cpu", "--json"]
    for key in ("prompt_tokens", "new_tokens", "repeats", "threads"):
        command += [f"--{key.replace('_', '-')}", str(getattr(o, key))]
    found = child(command, o.threads)
    return found | {kind: [run[f"{kind}_tok_s"] for run in found["runs"]] for kind in KINDS}


def in_turns(o: argparse.Namespace, what: str, sides: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What each side's function gave in each round; the order turns round from round to round.

    A setting of a peer that fails is left out and named on stderr; SystemExit when ours does, or all of them.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(o.rounds):
        for name in list(found)[:: -1 if number % 2 else 1]:
            print(f"{what}, round {number + 1}/{o.rounds}: {name}", file=sys.stderr)
            try:
                found[name].append(sides[name]())
            except SystemExit as error:
                if name == "openglm" or len(found) == 2:
                    raise
                print(f"left out: {error}", file=sys.stderr)
                del found[name]
    return found


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {f"{kind}_tok_s": round(statistics.median(x for r in runs for x in r[kind]), 2) for kind in KINDS}


def compared(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of every side, ours first, the best of the others, the ratios, and how far from the limit ours is."""
    result: dict[str, Any] = {name: medians(runs) for name, runs in found.items()}
    mine, theirs = result["openglm"], [side for name, side in result.items() if name != "openglm"]
    best = {f"{kind}_tok_s": max(side[f"{kind}_tok_s"] for side in theirs) for kind in KINDS}
    runs = found["openglm"]
    bandwidth = statistics.median(run["read_bandwidth_bytes_s"] for run in runs)
    read = mine["decode_tok_s"] * runs[0]["bytes_per_pass"]
    ratios = {f"{kind}_ratio": round(mine[f"{kind}_tok_s"] / best[f"{kind}_tok_s"], 2) for kind in KINDS}
    return result | {
        "peer_best": best, **ratios,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1), "bandwidth_fraction": round(read / bandwidth, 3),
    }  # fmt: skip


def show(title: str, names: Sequence[str], result: dict[str, Any]) -> None:
    print(f"{title:<28}{'prefill tok/s':>15}{'decode tok/s':>15}")
    for name in names:
        print(f"{name:<28}" + "".join(f"{result[name][f'{kind}_tok_s']:>15.1f}" for kind in KINDS))
    print(f"{'ours / their best':<28}" + "".join(f"{result[f'{kind}_ratio']:>15.2f}" for kind in KINDS))
    gb_s, share = result["bandwidth_gb_s"], result["bandwidth_fraction"]
    print(f"decoding reads {share * gb_s:.1f} GB/s of weights, {share:.0%} of {gb_s:.1f}\n", flush=True)


# llama.cpp --------------------------------------------------------------------------------------------------------


def beside_llama(o: argparse.Namespace, model: str) -> dict[str, Any]:
    name = Path(model).stem
    q4_0 = str(worker(o, "llama-quantize", model, python=o.peer_python)["path"])
    sides: dict[str, Any] = {"openglm": partial(ours, o, model)}
    for kind, path in (("file", model), ("Q4_0", q4_0)):
        sides[f"llama.cpp {kind}"] = partial(worker, o, "llama", path, python=o.peer_python)
        sides[f"llama.cpp {kind}, flash"] = partial(worker, o, "llama", path, "--flash", python=o.peer_python)
    found = in_turns(o, name, sides)
    result = compared(found)
    show(name, list(found), result)
    return {"model": Path(model).name, **result}


def llama_quantize(o: argparse.Namespace) -> dict[str, Any]:
    """Q4_0 of the same weights by llama.cpp's own recipe, made once."""
    import llama_cpp

    source = Path(o.models[0]).resolve()
    folder = Path(tempfile.gettempdir()) / "openglm-bench"
    folder.mkdir(exist_ok=True)
    target = folder / f"{source.stem}-{source.stat().st_size}-q4_0.gguf"
    if not target.is_file():
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize, parameters.nthread = LLAMA_Q4_0, True, o.threads
        if llama_cpp.llama_model_quantize(str(source).encode(), str(temporary).encode(), parameters):
            temporary.unlink(missing_ok=True)
            raise SystemExit(f"llama.cpp could not make Q4_0 of {source}")
        temporary.replace(target)
    return {"path": str(target)}


def llama(o: argparse.Namespace) -> dict[str, Any]:
    from llama_cpp import Llama

    n_prompt, n_new = o.prompt_tokens, o.new_tokens
    model = Llama(o.models[0], n_ctx=n_prompt + n_new + 8, n_batch=n_prompt, n_ubatch=n_prompt, n_threads=o.threads,
                  n_threads_batch=o.threads, flash_attn=o.flash, verbose=False)  # fmt: skip
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for run in range(-1, o.repeats):
        ids = [(7 * i + 31 * run) % 1000 + 100 for i in range(n_prompt if run >= 0 else 32)]
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        first = time.perf_counter()
        for i in range(n_new if run >= 0 else 2):
            model.eval([100 + i])
        if run >= 0:  # the first one, short, warmed up
            found["prefill"].append(n_prompt / (first - start))
            found["decode"].append(n_new / (time.perf_counter() - first))
    return found


# transformers -----------------------------------------------------------------------------------------------------


def beside_transformers(o: argparse.Namespace) -> dict[str, Any]:
    """Both have random weights of one shape: speed does not depend on their values."""
    reference = f"random:{o.preset}?{o.form}"
    sides = {
        "openglm": partial(ours, o, reference),
        "transformers bf16": partial(worker, o, "transformers", reference),
    }
    result = compared(in_turns(o, o.preset, sides))
    show(reference, list(sides), result)
    return {"model": reference, **result}


def transformers_bf16(o: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, GlmConfig

    from openglm.presets import preset

    torch.set_num_threads(o.threads)
    c = preset(o.preset)
    config = GlmConfig(  # type: ignore[call-arg]
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, attention_bias=c.qkv_bias, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta, "partial_rotary_factor": c.rope.fraction},
        tie_word_embeddings=c.tie_embeddings, attn_implementation="sdpa",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with torch.inference_mode():
        for run in range(-1, o.repeats):
            n_prompt, n_new = (o.prompt_tokens, o.new_tokens) if run >= 0 else (32, 2)
            ids = torch.tensor([[(7 * i + 31 * run) % 1000 + 100 for i in range(n_prompt)]])
            cache = DynamicCache(config=config)
            start = first = time.perf_counter()
            for i in range(n_new + 1):
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1:].argmax(-1)
                if i == 0:
                    first = time.perf_counter()
            if run >= 0:
                found["prefill"].append(n_prompt / (first - start))
                found["decode"].append(n_new / (time.perf_counter() - first))
    return found


# The table --------------------------------------------------------------------------------------------------------


def table(o: argparse.Namespace) -> dict[str, Any]:
    """Decoded tokens per second, all requests together, of each form at each batch size."""
    title = f"{o.preset}, decode tok/s"
    print(f"{title:<28}" + "".join(f"{f'batch {n}':>12}" for n in BATCHES))
    found: dict[str, Any] = {}
    for form in FORMS:
        print(f"{o.preset}: {form}", file=sys.stderr)
        found[form] = worker(o, "forms", form)
        print(f"{form:<28}" + "".join(f"{found[form][str(n)]:>12.1f}" for n in BATCHES), flush=True)
    faster = [
        all(found[a][str(n)] > found[b][str(n)] for n in BATCHES) for a, b in (("int4", "int8"), ("int8", "bf16"))
    ]
    print(f"INT4 above INT8 at every batch: {faster[0]}; INT8 above bfloat16: {faster[1]}\n")
    return {"model": o.preset, **found, "int4_above_int8": faster[0], "int8_above_bf16": faster[1]}


def forms(o: argparse.Namespace) -> dict[str, Any]:
    import torch

    import openglm
    from openglm.engine.measure import measure_speed
    from openglm.ops.native import set_threads

    torch.set_num_threads(o.threads)
    set_threads(o.threads)
    form = o.models[0]
    dtype = "bfloat16" if form == "bf16" else None
    engine = openglm.load(f"random:{o.preset}{FORMS[form]}", device="cpu", dtype=dtype).engine
    speeds = {n: measure_speed(engine, TABLE_PROMPT, TABLE_NEW, n, o.repeats + 1) for n in BATCHES}
    return {str(n): round(speed.median("decode_tok_s"), 2) for n, speed in speeds.items()}


WORKERS = {"llama": llama, "llama-quantize": llama_quantize, "transformers": transformers_bf16, "forms": forms}

if __name__ == "__main__":
    main()
