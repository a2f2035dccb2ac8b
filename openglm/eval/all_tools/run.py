"""The task `all-tools` of `openglm eval`: the whole suite with its tools, a progress bar, the report.

evaluate(openglm.load("model"), Path("eval/all-tools"), "model")["accuracy_with_tools"]
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from openglm.eval.all_tools.metrics import summary
from openglm.eval.all_tools.report import write_report
from openglm.eval.all_tools.runner import MODES, Result, RunConfig, run_suite, write_whole
from openglm.eval.all_tools.suite import load_suite
from openglm.eval.all_tools.toolset import SuiteTools, cited_pages, why_not
from openglm.types import ChatBackend

__all__ = ["check", "evaluate"]


def check() -> None:
    """ValueError where the tools of the suite cannot run."""
    if reason := why_not():
        raise ValueError(f"all-tools needs its tools: {reason}")


def evaluate(
    backend: ChatBackend, folder: Path, name: str, limit: int | None = None, n_parallel: int = 8,
    max_new_tokens: int | None = None, guided: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics (see `summary`); results, traces and report.html are left in the folder, where a stopped run goes on."""
    from tqdm import tqdm

    check()
    tasks = load_suite(limit)
    guided = bool(getattr(backend, "wants_guide", False)) if guided is None else guided
    longest = {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
    config = RunConfig(n_parallel=n_parallel, guided=guided, **longest)
    done = {mode: [0, 0] for mode in MODES}  # right, all
    with tqdm(total=2 * len(tasks), desc="all-tools", unit="run") as bar:

        def progress(result: Result) -> None:
            counts = done[result.mode]
            counts[0], counts[1] = counts[0] + result.correct, counts[1] + 1
            bar.set_postfix_str(", ".join(f"{right}/{n} {mode} tools" for mode, (right, n) in done.items() if n))
            bar.update()

        async def work() -> list[Result]:
            with SuiteTools() as suite:
                try:
                    return await run_suite(backend, suite.of, cited_pages, tasks, folder, config, name, progress)
                finally:
                    await suite.close()

        results = asyncio.run(work())
    metrics = summary(tasks, results)
    write_whole(folder / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=1) + "\n")
    write_report(folder / "report.html", name, tasks, results, folder / "traces")
    return metrics
