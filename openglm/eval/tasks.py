"""What `openglm eval` can measure: each task by its name, and what it makes of a model.

    TASKS["all-tools"].run(model, EvalOptions(out=Path("eval"), name="qwen-1.5b"))["accuracy_with_tools"]

A task keeps what it has in a folder of its own below `out`, and goes on from there when it is run again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openglm.types import ChatBackend

__all__ = ["TASKS", "EvalOptions", "EvalTask"]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """out: folder of all tasks. name: of the model. limit: number of items (None: all). n_parallel: items at once.

    max_new_tokens: of one answer (None: the task's own). guided: see openglm.agent.events.AgentConfig.
    """

    out: Path
    name: str
    limit: int | None = None
    n_parallel: int = 8
    max_new_tokens: int | None = None
    guided: bool | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, not {self.limit}")
        if self.n_parallel < 1:
            raise ValueError(f"--parallel must be at least 1, not {self.n_parallel}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")


@dataclass(frozen=True)
class EvalTask:
    """help: one line. check: ValueError if it cannot run here, before a model is loaded. run: its metrics by name.

    show: the metrics as lines for people.
    """

    help: str
    check: Callable[[], None]
    run: Callable[[ChatBackend, EvalOptions], dict[str, Any]]
    show: Callable[[dict[str, Any]], list[str]]


def _check_all_tools() -> None:
    from openglm.eval.all_tools.run import check

    check()


def _run_all_tools(model: ChatBackend, options: EvalOptions) -> dict[str, Any]:
    from openglm.eval.all_tools.run import evaluate

    return evaluate(
        model, options.out / "all-tools", options.name, options.limit, options.n_parallel, options.max_new_tokens,
        options.guided,
    )  # fmt: skip


def _show_all_tools(metrics: dict[str, Any]) -> list[str]:
    from openglm.eval.all_tools.metrics import lines

    return lines(metrics)


TASKS = {
    "all-tools": EvalTask(
        "an agent with Python, a browser and functions, and the same model without them", _check_all_tools,
        _run_all_tools, _show_all_tools,
    ),
}  # fmt: skip
