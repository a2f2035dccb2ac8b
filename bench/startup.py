"""How long `openglm serve` takes from its launch to its first answer, and the page's files beside it.

    python bench/startup.py [MODEL] [--runs 5]

Each run is a process of its own. Measured from the outside: until the page's HTML is there, until /health says "ready",
and until an answer of one token is there. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from typing import Any


def fetched(url: str, body: dict[str, Any] | None = None) -> bytes | None:
    """None while nothing answers, or not with 200."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
            return content
    except OSError:
        return None


def until(url: str, process: subprocess.Popen[bytes], start: float) -> float:
    """Seconds from the start until the address answers with 200."""
    while fetched(url) is None:
        assert process.poll() is None, "the server ended"
        time.sleep(0.005)
    return time.perf_counter() - start


def run_once(model: list[str]) -> dict[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, start = f"http://127.0.0.1:{port}", time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "openglm", "serve", *model, "--port", str(port)])
    try:
        found = {"page_s": until(f"{url}/", process, start), "ready_s": until(f"{url}/health", process, start)}
        ask = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        assert fetched(f"{url}/v1/chat/completions", ask) is not None
        return found | {"answer_s": time.perf_counter() - start}
    finally:
        process.terminate()
        process.wait(60)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", help="a checkpoint (default: the bundled model)")
    p.add_argument("--runs", type=int, default=5)
    o = p.parse_args()
    runs = [run_once([o.model] if o.model else []) for _ in range(o.runs)]
    table: dict[str, Any] = {"runs": o.runs}
    for name, words in (("page_s", "the page"), ("ready_s", "the model loaded"), ("answer_s", "the first answer")):
        values = [run[name] for run in runs]
        table[name] = statistics.median(values)
        print(f"{words}: median {table[name]:.2f} s ({min(values):.2f} to {max(values):.2f})")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
