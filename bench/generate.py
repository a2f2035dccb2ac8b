"""Prefill and decoding of one stream: our engine and llama.cpp on the same GGUF file, in turn.

    python bench/generate.py model.gguf --peer-python PYTHON   # an interpreter that has llama-cpp-python

Each process loads the file, reads a prompt of 512 tokens and draws tokens greedily from it, three times; runs of the
two alternate, medians count. The read bandwidth is measured in between, by adding up a gibibyte with all threads.
Ours goes through `Engine.stream`, scheduling and drawing included; llama.cpp's time is that of `eval` alone.

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

OURS = """
import json, sys, time
import torch, openglm
from openglm.model.load import weight_bytes
from openglm.types import SamplingParams
n_prompt, n_new = int(sys.argv[2]), int(sys.argv[3])
model = openglm.load(sys.argv[1], device="cpu")
engine = model.engine
found = []
for run in range(3):
    ids = [(7 * i + 31 * run) % 1000 + 100 for i in range(n_prompt)]
    start = time.perf_counter()
    steps = engine.stream(ids, SamplingParams(max_new_tokens=n_new + 1, temperature=0.0))
    next(steps)
    first = time.perf_counter()
    n = sum(1 for _ in steps)
    found.append((n_prompt / (first - start), n / (time.perf_counter() - first)))
m = engine.model
table = 0 if engine.config.tie_embeddings else m.embed.matrix.data.nbytes + 2 * m.embed.matrix.scale.nbytes
data = torch.ones(1 << 27, dtype=torch.int64)
bandwidth = 0.0
for _ in range(5):
    start = time.perf_counter()
    data.sum()
    bandwidth = max(bandwidth, data.nbytes / (time.perf_counter() - start))
print(json.dumps({"prefill": [p for p, _ in found], "decode": [d for _, d in found],
                  "bytes": weight_bytes(m) - table, "bandwidth": bandwidth}))
"""
PEER = """
import json, sys, time
from llama_cpp import Llama
n_prompt, n_new, threads = map(int, sys.argv[2:5])
model = Llama(sys.argv[1], n_ctx=n_prompt + n_new + 8, n_batch=n_prompt, n_threads=threads, n_threads_batch=threads,
              verbose=False)
found = []
for run in range(3):
    model.reset()
    start = time.perf_counter()
    model.eval([(7 * i + 31 * run) % 1000 + 100 for i in range(n_prompt)])
    first = time.perf_counter()
    for i in range(n_new):
        model.eval([100 + i])
    found.append((n_prompt / (first - start), n_new / (time.perf_counter() - first)))
print(json.dumps({"prefill": [p for p, _ in found], "decode": [d for _, d in found]}))
"""


def run(python: str, code: str, *arguments: str) -> dict[str, Any]:
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise SystemExit(f"{python} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    value: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description="prefill and decoding speed beside llama.cpp")
    parser.add_argument("model", help="a .gguf file")
    parser.add_argument("--peer-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    o = parser.parse_args()
    import torch

    sizes = [o.model, str(o.prompt_tokens), str(o.new_tokens), str(torch.get_num_threads())]
    found: dict[str, list[dict[str, Any]]] = {"openglm": [], "llama.cpp": []}
    for _ in range(o.rounds):
        found["openglm"].append(run(sys.executable, OURS, *sizes))
        found["llama.cpp"].append(run(o.peer_python, PEER, *sizes))
    result: dict[str, Any] = {"model": Path(o.model).name, "threads": torch.get_num_threads()}
    print(f"{'':<12}{'prefill tok/s':>15}{'decode tok/s':>15}")
    for name, runs in found.items():
        speeds = {kind: statistics.median(x for r in runs for x in r[kind]) for kind in ("prefill", "decode")}
        result[name] = {f"{kind}_tok_s": round(speed, 1) for kind, speed in speeds.items()}
        print(f"{name:<12}{speeds['prefill']:>15.1f}{speeds['decode']:>15.1f}")
    bandwidth = statistics.median(r["bandwidth"] for r in found["openglm"])
    read = result["openglm"]["decode_tok_s"] * found["openglm"][0]["bytes"]
    result["bandwidth_gb_s"], result["bandwidth_fraction"] = round(bandwidth / 1e9, 1), round(read / bandwidth, 2)
    for kind in ("prefill", "decode"):
        result[f"{kind}_ratio"] = round(result["openglm"][f"{kind}_tok_s"] / result["llama.cpp"][f"{kind}_tok_s"], 2)
    print(f"ratio       {result['prefill_ratio']:>15}{result['decode_ratio']:>15}")
    share = result["bandwidth_fraction"]
    print(f"decoding reads {read / 1e9:.1f} GB/s of weights, {share:.0%} of {bandwidth / 1e9:.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
