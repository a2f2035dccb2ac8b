"""Running the All Tools suite with a scripted model: results, traces, resuming, figures, the report, the verb."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from openglm.agent.trace import read_trace
from openglm.cli import main
from openglm.eval.all_tools.metrics import lines, rows, summary, tool_choice
from openglm.eval.all_tools.report import write_report
from openglm.eval.all_tools.runner import Result, RunConfig, read_results, run_suite
from openglm.eval.all_tools.suite import AllToolsTask, load_suite
from openglm.eval.all_tools.toolset import SuiteTools, cited_pages
from openglm.types import Event, Message, ToolCall, ToolSpec, Usage

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TASKS = [task for task in load_suite(48) if task.group != "maths-large"][:20]
HOSTILE = "</p></details><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class KnowsAll:
    """A ChatBackend that does every task right, with the tools that the task expects; without tools it is at a loss.

    wrong: ids of tasks that it answers with something hostile instead.
    """

    def __init__(self, tasks: Sequence[AllToolsTask], wrong: Sequence[str] = ()) -> None:
        self.tasks = {task.question: task for task in tasks}
        self.wrong, self.n_asked, self.stop_after = wrong, 0, 10**9

    def stream(self, messages: Any, tools: Any = None, **sampling: Any) -> Any:
        raise AssertionError("asked through astream")

    async def astream(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[ToolSpec] | None = None, **sampling: Any
    ) -> AsyncGenerator[Event]:
        assert sampling["temperature"] == 0.0
        self.n_asked += 1
        if self.n_asked > self.stop_after:
            raise KeyboardInterrupt
        said = [m for m in messages if isinstance(m, Message)]
        task = self.tasks[next(m.content for m in said if m.role == "user")]
        results = [m for m in said if m.role == "tool"]
        if not tools:
            answer: str | ToolCall = "I cannot know that."
        elif task.id in self.wrong:
            answer = HOSTILE if results else ToolCall("python", json.dumps({"code": f"print({HOSTILE!r})"}))
        else:
            answer = self._next(task, results)
        if isinstance(answer, str):
            yield Event(answer, token_ids=(1, 2))
            yield Event(finish_reason="stop", usage=Usage(10, 2))
        else:
            yield Event(tool_call=answer, token_ids=(1, 2, 3))
            yield Event(finish_reason="tool_calls", usage=Usage(10, 3))

    def _next(self, task: AllToolsTask, results: Sequence[Message]) -> str | ToolCall:
        calls = [ToolCall(c.name, json.dumps({k: "x" if v is None else v for k, v in c.arguments.items()}))
                 for c in task.calls]  # fmt: skip
        if task.sources:
            calls = [ToolCall("search", json.dumps({"query": task.question}))]
        if len(results) < len(calls):
            return calls[len(results)]
        if task.number is not None:
            return f"Answer: {task.number}"
        words = " ".join(entry[0] for entry in task.contains)
        return f"{words} {results[0].content}" if task.sources else words


def run(backend: Any, folder: Path, tasks: Sequence[AllToolsTask], **config: Any) -> list[Result]:
    async def work() -> list[Result]:
        with SuiteTools() as suite:
            try:
                return await run_suite(backend, suite.of, cited_pages, tasks, folder, RunConfig(**config), "scripted")
            finally:
                await suite.close()

    with ThreadPoolExecutor(1) as own:  # a browser may hold an event loop of this thread
        return own.submit(asyncio.run, work()).result()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    folder = tmp_path_factory.mktemp("eval") / "all-tools"
    return folder, run(KnowsAll(TASKS, wrong=["none-en-01"]), folder, TASKS, n_parallel=3)


def test_a_whole_run(finished: tuple[Path, list[Result]]) -> None:
    folder, results = finished
    by_key = {(r.id, r.mode): r for r in results}
    assert [(r.id, r.mode) for r in results] == [(t.id, m) for t in TASKS for m in ("with", "without")]
    for task in TASKS:
        found, plain = by_key[task.id, "with"], by_key[task.id, "without"]
        if task.group == "search":  # its answer holds all that the search gave, its sources included
            assert found.answered and found.tools == ("browser",)
        elif task.id == "none-en-01":
            assert not found.correct and found.called is False and found.tools == ("python",)
        else:
            assert found.correct, task.id
        assert not plain.correct and plain.called is None and plain.n_calls == 0
        trace = read_trace(folder / "traces" / f"{task.id}.with.jsonl")
        assert trace.outcome is not None and trace.outcome.answer == found.answer and trace.model == "scripted"
    assert sorted(read_results(folder), key=str) == sorted(results, key=str)


def test_figures(finished: tuple[Path, list[Result]]) -> None:
    folder, results = finished
    found = summary(TASKS, results)
    right = sum(r.correct for r in results if r.mode == "with")
    assert found["accuracy_with_tools"] == right / len(TASKS) and found["accuracy_without_tools"] == 0.0
    assert found["n_tasks"] == len(TASKS) and found["errors"] == 0 and found["n_rounds"] > 1
    assert found["tool_precision"] < 1.0, "Python was called where nothing was needed"
    assert sum(g["n"] for g in found["groups"].values()) == 2 * len(TASKS), "each task in its group and in all"
    table = rows(TASKS, results)
    assert [r[:2] for r in table[-2:]] == [("all", "en"), ("all", "zh")]
    assert len(lines(found)) == len(table) + 3


def test_choice_of_tools() -> None:
    def result(task: AllToolsTask, *tools: str) -> Result:
        return Result(
            id=task.id, mode="with", correct=True, answered=True, called=None, cited=None, answer="", stop="answer",
            n_rounds=1, n_calls=len(tools), n_failed=0, tools=tools, prompt_tokens=1, completion_tokens=1, seconds=1.0,
        )  # fmt: skip

    words = AllToolsTask("a", "maths-words", "en", "?", (), ("python",), number="1")
    large = AllToolsTask("b", "maths-large", "en", "?", ("python",), number="1")
    plain = AllToolsTask("c", "none", "en", "?", number="1")
    tasks = [words, large, plain]
    assert tool_choice(tasks, [result(words, "python"), result(large, "python"), result(plain)]) == (1.0, 1.0)
    assert tool_choice(tasks, [result(words), result(large), result(plain)]) == (None, 0.0)
    found = tool_choice(tasks, [result(words, "search"), result(large, "python"), result(plain, "python")])
    assert found == (1 / 3, 1.0)
    assert tool_choice([plain], [result(plain)]) == (None, None)


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    tasks = [task for task in TASKS if task.group == "none"]
    model = KnowsAll(tasks)
    model.stop_after = 3
    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)):
        run(model, tmp_path, tasks, n_parallel=1)
    kept = read_results(tmp_path)
    assert len(kept) == 3
    with open(tmp_path / "results.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "none-')  # a line that was cut off
    again = KnowsAll(tasks)
    results = run(again, tmp_path, tasks)
    assert again.n_asked == 2 * len(tasks) - 3 and results[0] == kept[0]
    assert run(KnowsAll([]), tmp_path, tasks) == results, "nothing is left to be asked"
    with pytest.raises(ValueError, match="holds results of another run"):
        run(again, tmp_path, tasks, max_new_tokens=99)


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        run(KnowsAll([]), tmp_path, TASKS)


def test_a_conversation_that_cannot_go_on_is_a_wrong_answer(tmp_path: Path) -> None:
    class Full(KnowsAll):
        async def astream(self, *given: Any, **sampling: Any) -> AsyncGenerator[Event]:
            raise ValueError("the last message makes a prompt of 9999 tokens")
            yield Event()

    results = run(Full([]), tmp_path, TASKS[:1])
    assert [r.stop for r in results] == ["error", "error"] and not any(r.correct for r in results)
    assert summary(TASKS[:1], results)["errors"] == 2


def test_the_report_is_safe_and_can_be_filtered(
    finished: tuple[Path, list[Result]], browser: Browser, tmp_path: Path
) -> None:
    """What a model wrote is shown as text; the page asks for nothing and its filters work."""
    folder, results = finished
    path = tmp_path / "report.html"
    write_report(path, "<b>scripted</b>", TASKS, results, folder / "traces")
    assert not path.with_name(".report.html.tmp").exists()
    page = browser.new_page()
    asked: list[str] = []
    trouble: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(path.as_uri())
    assert page.title() == "All Tools: <b>scripted</b>" and page.locator("h1 b").count() == 0
    assert (
        page.locator("article").count() == 2 * len(TASKS) and page.locator("article script, article img").count() == 0
    )
    assert page.locator("#count").inner_text() == f"{2 * len(TASKS)} of {2 * len(TASKS)} runs"
    page.select_option("select[name=group]", "none")
    page.select_option("select[name=mode]", "with")
    page.select_option("select[name=right]", "no")
    shown = page.locator("article:visible")
    assert shown.count() == 1
    page.click("#open")
    text = shown.inner_text()
    assert HOSTILE in text and "calls python" in text, "the code and what was said can be read"
    page.select_option("select[name=lang]", "zh")
    assert page.locator("article:visible").count() == 0
    for name in ("group", "mode", "right", "lang"):
        page.select_option(f"select[name={name}]", "")
    page.fill("#filters input", "I CANNOT know")
    assert page.locator("article:visible").count() == len(TASKS)
    page.close()
    assert asked == [path.as_uri()] and trouble == []


def test_pictures_and_broken_traces_in_the_report(tmp_path: Path) -> None:
    task = AllToolsTask("x", "none", "en", "?", contains=(("a",),))
    result = Result(
        id="x", mode="with", correct=False, answered=False, called=True, cited=None, answer="", stop="answer",
        n_rounds=1, n_calls=0, n_failed=0, tools=(), prompt_tokens=1, completion_tokens=1, seconds=1.0,
    )  # fmt: skip
    both = [result, Result(**{**vars(result), "mode": "without"})]
    write_report(tmp_path / "a.html", "m", [task], both, tmp_path)
    assert (tmp_path / "a.html").read_text("utf-8").count("No trace: ") == 2


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Model(KnowsAll):
        def require_format(self) -> None:
            pass

    monkeypatch.setattr("openglm.cli_eval.load_model", lambda options: Model(load_suite()))
    argv = ["eval", "some/model.gguf", "all-tools", "--limit", "4", "--out", str(tmp_path), "--json"]
    assert main(argv) == 0
    out = capsys.readouterr()
    value = json.loads(out.out.splitlines()[-1])["all-tools"]
    assert value["accuracy_with_tools"] == 1.0 and value["accuracy_without_tools"] == 0.0 and value["n_tasks"] == 4
    assert (tmp_path / "all-tools" / "report.html").exists()
    assert json.loads((tmp_path / "all-tools" / "metrics.json").read_text("utf-8")) == value
    assert json.loads((tmp_path / "all-tools" / "about.json").read_text("utf-8"))["model"] == "model.gguf"
    assert main(["eval", "m", "all-tool"]) == 2
    assert "unknown task 'all-tool' (did you mean 'all-tools'?)" in capsys.readouterr().err
    for wrong in (["--limit", "0"], ["--parallel", "0"], ["--max-new-tokens", "0"]):
        assert main(["eval", "m", "all-tools", *wrong]) == 2
        assert f"{wrong[0]} must be at least 1" in capsys.readouterr().err
