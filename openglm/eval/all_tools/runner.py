"""Runs the All Tools suite on a model, with its tools and without, and keeps every result as it comes.

    results = asyncio.run(run_suite(backend, suite.of, cited_pages, tasks, "out", RunConfig(), model="qwen-1.5b"))

The folder holds about.json (what was run), results.jsonl (a line for each task and mode) and traces/TASK.MODE.jsonl.
A run that was stopped goes on where it was: what has a line is not done again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from openglm.agent.agent import Agent
from openglm.agent.events import AgentConfig, Finished, Outcome
from openglm.agent.trace import TraceWriter
from openglm.eval.all_tools.check import judge
from openglm.eval.all_tools.suite import AllToolsTask, family, suite_version
from openglm.types import ChatBackend, Tool

__all__ = ["MODES", "Mode", "Result", "RunConfig", "read_results", "run_suite", "write_whole"]

Mode = Literal["with", "without"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """n_parallel: tasks at once. max_new_tokens: of one answer. n_rounds, time_s: answers and time for one task.

    guided: see AgentConfig.
    """

    n_parallel: int = 8
    max_new_tokens: int = 512
    n_rounds: int = 6
    time_s: float = 1200.0
    guided: bool = False

    def __post_init__(self) -> None:
        if self.n_parallel < 1:
            raise ValueError(f"--parallel must be at least 1, not {self.n_parallel}")
        self.agent()

    def agent(self) -> AgentConfig:
        return AgentConfig(
            n_rounds=self.n_rounds, time_s=self.time_s, tool_time_s=60.0, observation_chars=4000, guided=self.guided
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Result:
    """One task in one mode. tools: kinds of tools that it called, with or without success (see `family`).

    correct: `answered` and, where the task asks for them, `called` and `cited`. stop: why the run ended, or "error".
    seconds: from question to answer, while others ran beside it.
    """

    id: str
    mode: Mode
    correct: bool
    answered: bool
    called: bool | None
    cited: bool | None
    answer: str
    stop: str
    n_rounds: int
    n_calls: int
    n_failed: int
    tools: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    seconds: float


async def run_suite(
    backend: ChatBackend, tools: Callable[[str], Sequence[Tool]], cited: Callable[[Outcome], Sequence[str]],
    tasks: Sequence[AllToolsTask], folder: str | Path, config: RunConfig, model: str,
    progress: Callable[[Result], None] = lambda result: None, modes: Sequence[Mode] = MODES,
) -> list[Result]:  # fmt: skip
    """Results of all tasks in each mode, those of an earlier run of the folder included.

    tools: those that tasks of a group see. cited: paths of the pages that an answer cites. progress: told of each
    result, old ones included. ValueError for a folder that holds another run.
    """
    folder = Path(folder)
    results = _open(folder, config, model)
    wanted = {(task.id, mode) for task in tasks for mode in modes}
    for key in wanted & results.keys():
        progress(results[key])
    room = asyncio.Semaphore(config.n_parallel)

    async def one(task: AllToolsTask, mode: Mode) -> None:
        async with room:
            result = await _run(
                backend, tools(task.group) if mode == "with" else (), cited, task, mode, folder, config, model
            )
        results[task.id, mode] = result
        _append(folder / "results.jsonl", dataclasses.asdict(result))
        progress(result)

    async with asyncio.TaskGroup() as group:
        for mode in modes:
            for task in tasks:
                if (task.id, mode) not in results:
                    group.create_task(one(task, mode))
    return [results[task.id, mode] for task in tasks for mode in modes]


async def _run(
    backend: ChatBackend, tools: Sequence[Tool], cited: Callable[[Outcome], Sequence[str]], task: AllToolsTask,
    mode: Mode, folder: Path, config: RunConfig, model: str,
) -> Result:  # fmt: skip
    path = folder / "traces" / f"{task.id}.{mode}.jsonl"
    path.unlink(missing_ok=True)  # of a run that was stopped in the middle of this task
    agent = Agent(backend, tools, config.agent())
    conversation, outcome, failure = f"{task.id}.{mode}", None, ""
    try:
        with TraceWriter(path, model) as trace:
            events = agent.run(
                [{"role": "user", "content": task.question}], conversation, trace, temperature=0.0,
                max_new_tokens=config.max_new_tokens,
            )  # fmt: skip
            async for event in events:
                if isinstance(event, Finished):
                    outcome = event.outcome
    except ValueError as error:  # what the backend cannot be asked: a conversation that outgrew the context
        failure = str(error)
    finally:
        await agent.end(conversation)
    if outcome is None:
        outcome = Outcome(failure, "answer", ())
    return _result(task, mode, outcome, cited(outcome), "error" if failure else outcome.stop)


def _result(task: AllToolsTask, mode: Mode, outcome: Outcome, cited: Sequence[str], stop: str) -> Result:
    done = [(r.call.name, r.call.arguments) for r in outcome.calls if r.status == "done"]
    verdict = judge(task, outcome.answer, done if mode == "with" else None, cited)
    if task.group == "none" and mode == "with":  # an attempt is a mistake as well
        verdict = dataclasses.replace(verdict, called=not outcome.calls)
    return Result(
        id=task.id, mode=mode, correct=verdict.correct, answered=verdict.answered, called=verdict.called,
        cited=verdict.cited, answer=outcome.answer, stop=stop, n_rounds=outcome.n_rounds, n_calls=len(outcome.calls),
        n_failed=sum(r.status != "done" for r in outcome.calls),
        tools=tuple(sorted({family(r.call.name) for r in outcome.calls})),
        prompt_tokens=outcome.usage.prompt_tokens, completion_tokens=outcome.usage.completion_tokens,
        seconds=round(outcome.seconds, 3),
    )  # fmt: skip


# -------------------------------------------------------------------- the folder


def _open(folder: Path, config: RunConfig, model: str) -> dict[tuple[str, str], Result]:
    """What the folder holds already. Number of tasks at once and limits of time may change between runs."""
    about = {"task": "all-tools", "model": model, "suite": suite_version(), "max_new_tokens": config.max_new_tokens,
             "n_rounds": config.n_rounds, "guided": config.guided}  # fmt: skip
    path = folder / "about.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError:
            found = None
        if found != about:
            raise ValueError(f"{folder} holds results of another run (see about.json): give another --out")
    else:
        if any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files: give an empty or a new folder with --out")
        write_whole(path, json.dumps(about, ensure_ascii=False, indent=1))
    return {(r.id, r.mode): r for r in read_results(folder)}


def read_results(folder: str | Path) -> list[Result]:
    """Of a folder; a line that was not written whole is removed."""
    path = Path(folder) / "results.jsonl"
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    values: list[dict[str, Any]] = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    return [Result(**{**value, "tools": tuple(value["tools"])}) for value in values]


def _append(path: Path, value: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or as it was before."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
