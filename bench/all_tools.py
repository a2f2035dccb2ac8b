"""The 40 maths tasks of the All Tools suite: our agent and smolagents, the same model behind the same server.

    python bench/all_tools.py model.gguf --peer-python PYTHON

PYTHON is an interpreter that has smolagents[openai], sympy and numpy. Ours has its Python tool alone, as the peer has,
and once all tools of the suite, guided as small models are by default; the peer is CodeAgent, which writes code in
every step, and ToolCallingAgent with the PythonInterpreterTool. Greedy, the same limits of tokens and rounds, the same
check of the final number. Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from openglm.agent.http_backend import HttpBackend
from openglm.eval.all_tools.check import judge
from openglm.eval.all_tools.runner import MODES, Mode, Result, RunConfig, run_suite
from openglm.eval.all_tools.suite import AllToolsTask, load_suite
from openglm.eval.all_tools.toolset import SuiteTools, cited_pages

PYTHON, ALL, ALONE = "OpenGLM, Python tool", "OpenGLM, 17 tools", "the model alone"
GROUPS = ("maths-words", "maths-large")
PEER = Path(__file__).with_name("all_tools_peer.py")


@contextmanager
def served(model: str, n_parallel: int) -> Iterator[str]:
    """Our server with the model; its URL."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    command = [sys.executable, "-m", "openglm", "serve", model, "--port", str(port), "--parallel", str(n_parallel),
               "--name", "model"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        while True:
            try:
                urllib.request.urlopen(f"{url}/models", timeout=30).read()
                break
            except OSError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def ours(url: str, tasks: Sequence[AllToolsTask], o: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Answers with Python, with all tools of the suite, and without any tool."""
    def said(result: Result) -> None:
        print(f"ours {result.id} {result.mode} {result.seconds:.0f} s", file=sys.stderr)

    async def run(folder: str, every: bool, modes: Sequence[Mode]) -> list[Result]:
        backend = HttpBackend(url, "model", "", timeout_s=1200.0)
        with SuiteTools() as suite:
            try:
                tools = (lambda _: suite.tools) if every else suite.of
                config = RunConfig(n_parallel=o.parallel, max_new_tokens=o.max_tokens, n_rounds=o.rounds, guided=True)
                return await run_suite(backend, tools, cited_pages, tasks, folder, config, "model", said, modes)
            finally:
                await suite.close()

    rows: dict[str, list[dict[str, Any]]] = {}
    for name, every, mode in ((PYTHON, False, MODES[0]), (ALL, True, MODES[0]), (ALONE, False, MODES[1])):
        with tempfile.TemporaryDirectory() as folder:
            found = asyncio.run(run(folder, every, [mode]))
        rows[name] = [{"id": r.id, "answer": r.answer, "steps": r.n_rounds, "seconds": r.seconds} for r in found]
    return rows


def peer(url: str, kind: str, tasks: Sequence[AllToolsTask], o: argparse.Namespace) -> list[dict[str, Any]]:
    command = [o.peer_python, str(PEER), url, "model", kind, str(o.parallel), str(o.max_tokens), str(o.rounds)]
    lines = "".join(json.dumps({"id": t.id, "question": t.question}) + "\n" for t in tasks)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(lines)
        process.stdin.close()
        rows = []
        for line in process.stdout:
            rows.append(json.loads(line))
            print(f"smolagents {kind} {rows[-1]['id']} {rows[-1]['seconds']:.0f} s", file=sys.stderr)
    assert process.returncode == 0, "the peer failed"
    return rows


def row(name: str, tasks: Sequence[AllToolsTask], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_id = {a["id"]: a for a in answers}
    right = {t.id: judge(t, by_id[t.id]["answer"], None).answered for t in tasks}
    value: dict[str, Any] = {"name": name, "n": len(tasks), "right": sum(right.values())}
    for group in GROUPS:
        for lang in ("en", "zh"):
            ids = [t.id for t in tasks if t.group == group and t.lang == lang]
            value[f"{group}-{lang}"] = [sum(right[i] for i in ids), len(ids)]
    value["rounds"] = mean(a["steps"] for a in answers)
    value["seconds"] = median(a["seconds"] for a in answers)
    value["answers"] = {a["id"]: a["answer"][-300:] for a in answers}
    return value


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--peer-python", help="interpreter of the peer; without it only ours is run")
    p.add_argument("--peer-only", action="store_true", help="leave ours out")
    p.add_argument("--each", type=int, help="tasks of each group and language (default: all, 10)")
    p.add_argument("--parallel", type=int, default=4, help="tasks at once")
    p.add_argument("--max-tokens", type=int, default=512, help="of one answer of the model")
    p.add_argument("--rounds", type=int, default=6, help="answers of the model for one task")
    o = p.parse_args()
    suite = load_suite()
    kinds = [[t for t in suite if t.group == g and t.lang == lang] for g in GROUPS for lang in ("en", "zh")]
    tasks = [t for kind in kinds for t in kind[: o.each]]
    table = []
    with served(o.model, o.parallel) as url:
        if not o.peer_only:
            table += [row(name, tasks, answers) for name, answers in ours(url, tasks, o).items()]
        for name, kind in (("smolagents CodeAgent", "code"), ("smolagents ToolCallingAgent", "tools")):
            if o.peer_python:
                table.append(row(name, tasks, peer(url, kind, tasks, o)))
    keys = [f"{group}-{lang}" for group in GROUPS for lang in ("en", "zh")]
    print(f"{'':28}{''.join(f'{key:>16}' for key in keys)}  rounds  seconds a task")
    for r in table:
        cells = "".join(f"{f'{r[key][0]} of {r[key][1]}':>16}" for key in keys)
        print(f"{r['name']:28}{cells}  {r['rounds']:6.1f}  {r['seconds']:.1f}")
    print(json.dumps(table, ensure_ascii=False))


if __name__ == "__main__":
    main()
