"""Figures of a run of the All Tools suite: accuracy with and without tools, choice of tools, rounds, time.

summary(tasks, results)["accuracy_with_tools"]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from openglm.eval.all_tools.runner import Result
from openglm.eval.all_tools.suite import GROUPS, AllToolsTask

__all__ = ["LANGUAGES", "Row", "lines", "rows", "summary"]

LANGUAGES = ("en", "zh")
Row = tuple[str, str, int, float, float, float]  # group, language, tasks, shares right with, answered with, without


def summary(tasks: Sequence[AllToolsTask], results: Sequence[Result]) -> dict[str, Any]:
    """What --json prints for the task `all-tools`.

    accuracy_with_tools, accuracy_without_tools: shares of tasks done; without tools the answer alone counts.
    answered_with_tools: share with the right answer, whatever was called and cited. cited: share of right sources where
    one is asked for. tool_precision: of the kinds of tools that were called, the share that the tasks needed (tools
    that do no harm are left out); tool_recall: of the kinds they needed, the share that was called. n_rounds: mean,
    seconds: median of a task with tools. errors: runs that broke off. groups: accuracies by group and language.
    """
    by_key = {(r.id, r.mode): r for r in results}
    used = [by_key[task.id, "with"] for task in tasks]
    plain = [by_key[task.id, "without"] for task in tasks]
    precision, recall = tool_choice(tasks, used)
    sources = [r.cited for r in used if r.cited is not None]
    return {
        "accuracy_with_tools": mean(r.correct for r in used),
        "accuracy_without_tools": mean(r.correct for r in plain),
        "answered_with_tools": mean(r.answered for r in used), "cited": mean(sources) if sources else None,
        "tool_precision": precision, "tool_recall": recall, "n_tasks": len(tasks),
        "n_rounds": mean(r.n_rounds for r in used), "n_calls": mean(r.n_calls for r in used),
        "seconds": median(r.seconds for r in used), "seconds_without_tools": median(r.seconds for r in plain),
        "errors": sum(r.stop == "error" for r in (*used, *plain)),
        "groups": {
            f"{group} {lang}": {"n": n, "with_tools": right, "answered_with_tools": answered, "without_tools": without}
            for group, lang, n, right, answered, without in rows(tasks, results)
        },
    }  # fmt: skip


def tool_choice(tasks: Sequence[AllToolsTask], results: Sequence[Result]) -> tuple[float | None, float | None]:
    """(precision, recall) over all tasks together; None where nothing was called, or nothing was needed."""
    hits = called = needed = 0
    for task, result in zip(tasks, results, strict=True):
        used = set(result.tools) - (set(task.tools_ok) - set(task.tools))
        hits += len(used & set(task.tools))
        called += len(used)
        needed += len(set(task.tools))
    return hits / called if called else None, hits / needed if needed else None


def rows(tasks: Sequence[AllToolsTask], results: Sequence[Result]) -> list[Row]:
    """For each group and language that there is, then "all" by language."""
    by_key = {(r.id, r.mode): r for r in results}

    def row(group: str, lang: str, chosen: Callable[[AllToolsTask], bool]) -> list[Row]:
        ids = [task.id for task in tasks if chosen(task) and task.lang == lang]
        if not ids:
            return []
        used, plain = [by_key[i, "with"] for i in ids], [by_key[i, "without"] for i in ids]
        shares = mean(r.correct for r in used), mean(r.answered for r in used), mean(r.correct for r in plain)
        return [(group, lang, len(ids), *shares)]

    out: list[Row] = []
    for group in GROUPS:
        for lang in LANGUAGES:
            out += row(group, lang, lambda task, group=group: task.group == group)  # type: ignore[misc]
    return out + [r for lang in LANGUAGES for r in row("all", lang, lambda task: True)]


def lines(metrics: Mapping[str, Any]) -> list[str]:
    """A summary as a table for a terminal."""
    out = [f"{'':18}{'tasks':>6}{'with tools':>12}{'answered':>10}{'without':>9}"]
    for name, g in metrics["groups"].items():
        shares = (g["with_tools"], g["answered_with_tools"], g["without_tools"])
        cells = [f"{100 * share:.0f} %" for share in shares]
        out.append(f"{name:18}{g['n']:6}{cells[0]:>12}{cells[1]:>10}{cells[2]:>9}")

    def shown(key: str) -> str:
        return "none" if metrics[key] is None else f"{metrics[key]:.2f}"

    out.append(f"choice of tools: precision {shown('tool_precision')}, recall {shown('tool_recall')}; sources right "
               f"{shown('cited')}")  # fmt: skip
    out.append(f"{metrics['n_rounds']:.1f} rounds, {metrics['n_calls']:.1f} calls, {metrics['seconds']:.1f} s a task "
               f"with tools; {metrics['seconds_without_tools']:.1f} s without")  # fmt: skip
    return out
