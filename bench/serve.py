"""A server under load: ours and llama.cpp's on the same GGUF file, 64 clients that stream at once.

    python bench/serve.py model.gguf --peer-python PYTHON      # an interpreter that has llama-cpp-python[server]

Each server runs alone, with the same prompts, lengths and clients; every answer under load is compared with the same
question asked alone before. Memory is the server's resident size over the run. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from openglm.server.load_test import run_load


def rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def measure(name: str, command: list[str], port: int, o: argparse.Namespace) -> dict[str, Any]:
    """Start a server, load it, and stop it."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        while True:
            try:
                urllib.request.urlopen(f"{url}/models", timeout=30).read()
                break
            except OSError:
                assert process.poll() is None, f"{name} did not start"
                time.sleep(0.02)
        ready = time.perf_counter() - start
        sizes: list[int] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(1.0):
                sizes.append(rss(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        load = asyncio.run(run_load(url, o.clients, o.seconds, o.max_tokens, o.model_name))
        done.set()
        watcher.join()
        half = sizes[len(sizes) // 2 :]
        memory = {"rss_bytes": half[0], "rss_growth_bytes": half[-1] - half[0]}
        return {"name": name, "ready_s": ready, **load.summary(), **memory}
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--peer-python", help="interpreter of the peer; without it only ours is run")
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--seconds", type=float, default=120.0)
    p.add_argument("--max-tokens", type=int, default=32)
    p.add_argument("--parallel", type=int, default=64, help="answers that our server writes at once")
    p.add_argument("--pool-tokens", type=int, default=16384, help="of our server's keys and values")
    p.add_argument("--only-peer", action="store_true", help="leave ours out")
    p.set_defaults(model_name=None)
    o = p.parse_args()
    port = free_port()
    ours = [sys.executable, "-m", "openglm", "serve", o.model, "--port", str(port), "--parallel", str(o.parallel),
            "--pool-tokens", str(o.pool_tokens)]  # fmt: skip
    rows = [] if o.only_peer else [measure("OpenGLM", ours, port, o)]
    if o.peer_python:
        port = free_port()
        peer = [o.peer_python, "-m", "llama_cpp.server", "--model", o.model, "--port", str(port), "--n_ctx", "2048",
                "--n_threads", "2", "--n_threads_batch", "2", "--interrupt_requests", "False"]  # fmt: skip
        rows.append(measure("llama.cpp (llama-cpp-python's server)", peer, port, o))
    for row in rows:
        print(
            f"{row['name']}: {row['requests']} requests, {row['requests_per_s']:.2f}/s, {row['tokens_per_s']:.1f} "
            f"pieces/s; errors {row['errors']}, different {row['different']}"
        )
        for kind in ("ttft", "itl"):
            cells = ", ".join(f"{q} {row[f'{kind}_{q}_s']:.3f}" for q in ("p50", "p95", "p99"))
            print(f"  {kind}: {cells} s")
        growth, size = row["rss_growth_bytes"] / 2**20, row["rss_bytes"] / 2**20
        print(f"  ready after {row['ready_s']:.2f} s; memory {size:.0f} MiB, grown by {growth:.1f} MiB in the 2nd half")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
