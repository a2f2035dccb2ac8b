"""The tasks of the All Tools suite, as they lie in openglm/assets/all_tools/tasks.jsonl.

    from openglm.eval.all_tools.suite import load_suite
    load_suite()[0].question

A task is right or wrong by what is written in it: a number, words that the answer must hold, calls that must be made,
a page that must be cited. `program` is Python that gives the number; the tests run it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

__all__ = ["BROWSER", "GROUPS", "AllToolsTask", "ExpectedCall", "family", "load_suite", "suite_version"]

Language = Literal["en", "zh"]
GROUPS = ("maths-words", "maths-large", "search", "functions", "mixed", "none")
BROWSER = "browser"  # in `tools`: any tool of the browser
BROWSER_TOOLS = frozenset(("search", "open_page", "click", "find", "scroll", "back", "quote", "simple_browser"))


@dataclass(frozen=True)
class ExpectedCall:
    """A call that must be made. An argument that is None may have any value but an empty one."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class AllToolsTask:
    """One task. tools: those it needs (BROWSER for any of the browser's). tools_ok: those that do no harm.

    number: the final number of the answer, in digits. contains: each entry lists alternatives of which one must stand
    in the answer. calls: that must be made. sources: paths of pages one of which must be cited. origin: of a question.
    """

    id: str
    group: str
    lang: Language
    question: str
    tools: tuple[str, ...] = ()
    tools_ok: tuple[str, ...] = ()
    number: str | None = None
    contains: tuple[tuple[str, ...], ...] = ()
    calls: tuple[ExpectedCall, ...] = ()
    sources: tuple[str, ...] = ()
    program: str | None = None
    origin: str = "written for this suite"

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> AllToolsTask:
        fields = dict(value)
        fields["calls"] = tuple(ExpectedCall(c["name"], c["arguments"]) for c in value.get("calls", ()))
        fields["contains"] = tuple(tuple(alternatives) for alternatives in value.get("contains", ()))
        for name in ("tools", "tools_ok", "sources"):
            fields[name] = tuple(value.get(name, ()))
        task = cls(**fields)
        assert task.group in GROUPS and task.lang in ("en", "zh"), task.id
        assert (task.number is None) != (not task.contains), f"{task.id} needs a number or words, and not both"
        return task


def _text() -> str:
    return resources.files("openglm").joinpath("assets/all_tools/tasks.jsonl").read_text("utf-8")


def suite_version() -> str:
    """A short hash of the tasks: results of another one do not mix with these."""
    return hashlib.sha256(_text().encode()).hexdigest()[:12]


def load_suite(limit: int | None = None) -> list[AllToolsTask]:
    """All tasks, or the first `limit` of an order that takes groups and languages in turn."""
    tasks = [AllToolsTask.from_dict(json.loads(line)) for line in _text().splitlines()]
    if limit is None:
        return tasks
    if limit < 1:
        raise ValueError(f"--limit must be at least 1, not {limit}")
    return _in_turn(tasks)[:limit]


def _in_turn(tasks: Sequence[AllToolsTask]) -> list[AllToolsTask]:
    kinds = [(group, lang) for group in GROUPS for lang in ("en", "zh")]
    piles = [[t for t in tasks if (t.group, t.lang) == kind] for kind in kinds]
    return [pile[i] for i in range(max(map(len, piles))) for pile in piles if i < len(pile)]


def family(tool: str) -> str:
    """What a tool's name counts as: BROWSER for those of the browser, else the name."""
    return BROWSER if tool in BROWSER_TOOLS else tool
