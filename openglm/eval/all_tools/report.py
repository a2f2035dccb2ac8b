"""The traces of an All Tools run as one self-contained page: figures, a bar plot, every conversation, filters.

    write_report("out/report.html", "qwen-1.5b", tasks, results, "out/traces")

Everything a model or a tool wrote is escaped. The page loads nothing, and its policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openglm.eval.all_tools.metrics import Row, rows, summary
from openglm.eval.all_tools.runner import Result, write_whole
from openglm.eval.all_tools.suite import GROUPS, AllToolsTask
from openglm.eval.all_tools.transcript import transcript
from openglm.plot import STYLE

__all__ = ["write_report"]

TITLES = {
    "maths-words": "maths, word problems", "maths-large": "maths, large numbers", "search": "information seeking",
    "functions": "user functions", "mixed": "several tools", "none": "no tool needed", "all": "all",
}  # fmt: skip
LANGUAGE = {"en": "English", "zh": "中文"}
SCRIPT = """
const pick = [...document.querySelectorAll('#filters select')], search = document.querySelector('#filters input');
const tasks = [...document.querySelectorAll('article')], count = document.querySelector('#count');
function show() {
  const words = search.value.toLowerCase();
  let n = 0;
  for (const task of tasks) {
    const fits = pick.every(s => !s.value || task.dataset[s.name] === s.value)
      && task.textContent.toLowerCase().includes(words);
    task.hidden = !fits;
    n += fits;
  }
  count.textContent = n + ' of ' + tasks.length + ' runs';
}
for (const s of [...pick, search]) s.addEventListener('input', show);
document.querySelector('#open').addEventListener('click', () => {
  const shown = tasks.filter(t => !t.hidden).map(t => t.querySelector('details'));
  const open = !shown.every(d => d.open);
  for (const d of shown) d.open = open;
});
show();
"""
MORE_STYLE = """
:root{color-scheme:light dark;--good:#1a7f4b}@media(prefers-color-scheme:dark){:root{--good:#5fd096}}
table.figures th{width:auto}table.figures td,table.figures th{text-align:right}
table.figures td:first-child,table.figures th:first-child{text-align:left}
#filters{display:flex;flex-wrap:wrap;gap:.6rem;align-items:center;position:sticky;top:0;padding:.6rem 0;
background:var(--page);z-index:1}#filters select,#filters input,#filters button{font:inherit;padding:.25rem .5rem;
color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px}
article{border:1px solid var(--line);border-radius:8px;margin:.5rem 0;padding:0 .9rem}article[hidden]{display:none}
article details{margin:.6rem 0}summary .id{font-weight:400;color:var(--soft);font-size:.85rem;margin-left:.5rem}
summary .mark{stroke:none;font-weight:700;margin-right:.4rem}
.right .mark{color:var(--good)}.wrong .mark{color:var(--bad)}
.turn{border-left:3px solid var(--line);padding:.1rem 0 .1rem .8rem;margin:.6rem 0}.turn>b{font-size:.8rem;
color:var(--soft);font-weight:500}.turn.user{border-color:var(--c0)}.turn.call{border-color:var(--c1)}
.turn.result{border-color:var(--c2)}.turn.failed{border-color:var(--bad)}.turn p{color:inherit;white-space:pre-wrap;
overflow-wrap:anywhere;margin:.1rem 0}.turn pre{margin:.2rem 0;max-height:24rem;overflow:auto}
.turn img{max-width:100%;border:1px solid var(--line);border-radius:6px}
.bars{max-width:720px}.bars svg rect.c0{fill:var(--c0);stroke:none}.bars svg rect.c1{fill:var(--c1);stroke:none}
.bars svg text{fill:var(--ink)}.bars svg text.value{fill:var(--soft)}
"""


def write_report(
    path: str | Path, model: str, tasks: Sequence[AllToolsTask], results: Sequence[Result], traces: str | Path
) -> None:
    """Write the page; an existing one is replaced when the new one is complete. traces: the folder of trace files."""
    write_whole(Path(path), _page(model, tasks, results, Path(traces)))


def _page(model: str, tasks: Sequence[AllToolsTask], results: Sequence[Result], traces: Path) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    title = html.escape(f"All Tools: {model}")
    table = rows(tasks, results)
    by_key = {(r.id, r.mode): r for r in results}
    articles = "".join(
        _article(task, by_key[task.id, mode], traces / f"{task.id}.{mode}.jsonl")
        for task in tasks for mode in ("with", "without")
    )  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}{MORE_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{_figures(summary(tasks, results))}"
        f'<div class="bars">{_bars(table)}</div>{_table(table)}{_filters(tasks)}{articles}'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _figures(s: dict[str, Any]) -> str:
    texts = [
        f"{s['n_tasks']} tasks: {_share(s['accuracy_with_tools'])} done with tools, "
        f"{_share(s['accuracy_without_tools'])} without.",
        f"Choice of tools: precision {_share(s['tool_precision'])}, recall {_share(s['tool_recall'])}. "
        f"Answers right, whatever was called and cited: {_share(s['answered_with_tools'])}; sources right where one "
        f"was asked for: {_share(s['cited'])}.",
        f"A task with tools took {s['n_rounds']:.1f} rounds and {s['n_calls']:.1f} calls on average, and "
        f"{s['seconds']:.1f} s (median, others ran beside it); without tools {s['seconds_without_tools']:.1f} s.",
        f"{s['errors']} runs broke off." if s["errors"] else "",
    ]
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts if text)


def _table(table: Sequence[Row]) -> str:
    body = "".join(
        f"<tr><td>{TITLES[group]}, {LANGUAGE[lang]}</td><td>{n}</td><td>{_share(right)}</td><td>{_share(answered)}</td>"
        f"<td>{_share(without)}</td></tr>"
        for group, lang, n, right, answered, without in table
    )
    head = "<th>tasks</th><th>done with tools</th><th>answer right with tools</th><th>without tools</th>"
    return f'<table class="figures"><tr><th>group</th>{head}</tr>{body}</table>'


def _bars(table: Sequence[Row]) -> str:
    """A horizontal bar for each group and language with tools, and one without."""
    left, width, step = 230, 380, 34
    height = step * len(table) + 30
    parts = [f'<svg viewBox="0 0 720 {height}" role="img" aria-label="accuracy by group, with and without tools">']
    for i, (group, lang, _, right, _, without) in enumerate(table):
        y = i * step + 4
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{TITLES[group]}, {LANGUAGE[lang]}</text>')
        for k, (share, name) in enumerate(((right, "with"), (without, "without"))):
            top, long = y + 13 * k, max(1.0, share * width)
            parts.append(
                f'<rect class="c{k}" x="{left}" y="{top}" width="{long:.1f}" height="11" rx="2">'
                f"<title>{name} tools: {_share(share)}</title></rect>"
                f'<text class="value" x="{left + long + 6:.1f}" y="{top + 10}">{_share(share)}</text>'
            )
    legend = '<p class="legend"><span class="c0"><i></i>with tools</span><span class="c1"><i></i>without</span></p>'
    return "".join(parts) + f"</svg>{legend}"


def _filters(tasks: Sequence[AllToolsTask]) -> str:
    def select(name: str, first: str, options: Sequence[tuple[str, str]]) -> str:
        inner = "".join(f'<option value="{value}">{text}</option>' for value, text in [("", first), *options])
        return f'<select name="{name}" aria-label="{first}">{inner}</select>'

    present = {task.group for task in tasks}
    groups = [(group, TITLES[group]) for group in GROUPS if group in present]
    return (
        '<div id="filters">'
        + select("group", "all groups", groups)
        + select("lang", "both languages", [(k, v) for k, v in LANGUAGE.items()])
        + select("mode", "with and without tools", [("with", "with tools"), ("without", "without tools")])
        + select("right", "right and wrong", [("yes", "right"), ("no", "wrong")])
        + '<input type="search" placeholder="text" aria-label="text in the run">'
        + '<button id="open" type="button">open or close all</button><span id="count"></span></div>'
    )


def _article(task: AllToolsTask, result: Result, trace: Path) -> str:
    mark, kind = ("✓", "right") if result.correct else ("✗", "wrong")
    facts = [f"expected {_expected(task)}", f"stop: {result.stop}", f"{result.n_rounds} rounds"]
    facts += [f"{result.n_calls} calls, {result.n_failed} of them failed"] if result.n_calls else []
    facts += [f"{result.completion_tokens} tokens written", f"{result.seconds:.1f} s"]
    for name, value in (("answer", result.answered), ("calls", result.called), ("source", result.cited)):
        facts += [] if value is None else [f"{name} {'right' if value else 'wrong'}"]
    question = task.question.split("\n", 1)[0]
    return (
        f'<article class="{kind}" data-group="{task.group}" data-lang="{task.lang}" data-mode="{result.mode}" '
        f'data-right="{"yes" if result.correct else "no"}"><details><summary><span class="mark">{mark}</span>'
        f'{html.escape(question)}<span class="id">{html.escape(task.id)}, {result.mode} tools</span></summary>'
        f"<p>{html.escape(' · '.join(facts))}</p>{transcript(trace)}</details></article>\n"
    )


def _expected(task: AllToolsTask) -> str:
    if task.number is not None:
        return task.number
    words = " and ".join(" or ".join(alternatives) for alternatives in task.contains)
    return f"{words} ({', '.join(task.sources)})" if task.sources else words
