"""Time to the first token from a cold start: a fresh process of ours and of llama.cpp on the same GGUF file.

    python bench/load.py model.gguf --peer-python PYTHON   # an interpreter that has llama-cpp-python

Each process imports what it needs, opens the file, reads a prompt and draws one token, greedily. The parts are timed
inside it; ours starts as the command `openglm generate` does, PyTorch first. Runs alternate; medians. The file is in
the page cache for both (the first, uncounted run puts it there, and Python's compiled modules).

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "The capital of France is"
OURS = """
import gc, json, resource, sys, time
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.perf_counter()
gc.disable()
import torch
imported, before = time.perf_counter(), peak()
import openglm.chat
gc.freeze()
gc.enable()
model = openglm.load(sys.argv[1], device="cpu")
loaded = time.perf_counter()
out = model.generate(sys.argv[2], max_new_tokens=1, temperature=0.0)
done = time.perf_counter()
from openglm.model.load import weight_bytes
print(json.dumps({"import_s": imported - start, "load_s": loaded - imported, "first_token_s": done - loaded,
                  "peak_rss_bytes": peak(), "rss_before_bytes": before, "token": out.token_ids[0],
                  "weight_bytes": weight_bytes(model.engine.runner.model)}))
"""
PEER = """
import json, sys, time
start = time.perf_counter()
from llama_cpp import Llama
imported = time.perf_counter()
model = Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[3]), verbose=False)
loaded = time.perf_counter()
ids = model.tokenize(sys.argv[2].encode(), add_bos=False)
model.eval(ids)
token = model.sample(temp=0.0)
done = time.perf_counter()
import resource
print(json.dumps({"import_s": imported - start, "load_s": loaded - imported, "first_token_s": done - loaded,
                  "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "token": token}))
"""


def run(python: str, code: str, *arguments: str) -> dict[str, float]:
    start = time.perf_counter()
    root = str(Path(__file__).resolve().parents[1])
    # Compiled modules are kept, as an installation has them.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, cwd=root, env=env)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{python} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    value: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return value | {"process_s": seconds, "total_s": value["import_s"] + value["load_s"] + value["first_token_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    sides = {
        "OpenGLM": (sys.executable, OURS, args.model, PROMPT),
        "llama.cpp": (args.peer_python, PEER, args.model, PROMPT, str(args.threads)),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for i in range(args.runs + 1):
        for name, command in sides.items():
            result = run(*command)
            if i:
                found[name].append(result)
    parts = ("import_s", "load_s", "first_token_s", "total_s", "peak_rss_bytes")
    medians = {name: {part: statistics.median(r[part] for r in rows) for part in parts} for name, rows in found.items()}
    print(f"{Path(args.model).name}, {args.runs} runs\n")
    print("| | import | load | first token | together, s | peak memory, MiB |\n|---|---|---|---|---|---|")
    for name, m in medians.items():
        cells = [f"{m[part]:.2f}" for part in parts[:-1]]
        print(f"| {name} | {' | '.join(cells)} | {m['peak_rss_bytes'] / 2**20:,.0f} |")
    extra = medians["OpenGLM"]["total_s"] - medians["llama.cpp"]["total_s"]
    print(f"\n{extra:.2f} s more, of which importing PyTorch is {medians['OpenGLM']['import_s']:.2f} s.")
    own = found["OpenGLM"][0]
    pytorch, weights = own["rss_before_bytes"], own["weight_bytes"]
    rest = medians["OpenGLM"]["peak_rss_bytes"] - pytorch - weights
    sizes = [f"{n / 2**20:,.0f} MiB" for n in (pytorch, weights, rest)]
    print("Peak memory of ours: PyTorch {}, weights {}, the rest {}.".format(*sizes))
    tokens = {name: rows[0]["token"] for name, rows in found.items()}
    summary = {"model": Path(args.model).name, "medians": medians, "more_s": extra, "tokens": tokens}
    print(json.dumps({**summary, **{key: own[key] for key in ("rss_before_bytes", "weight_bytes")}}))


if __name__ == "__main__":
    main()
