"""The verb `openglm eval`: tasks that measure what a model can do.

python -m openglm eval model.gguf all-tools --limit 12
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

from openglm.cli_options import Parser, load_model, place_options
from openglm.config import nearest

__all__: list[str] = []


def eval_options(p: argparse.ArgumentParser) -> None:
    text = "checkpoint folder, .gguf file, or random:PRESET (default: the bundled model)"
    p.add_argument("model", nargs="?", help=text)
    p.add_argument("tasks", nargs="+", metavar="TASK", help="all-tools")
    p.add_argument("--adapter", metavar="DIR", help="a LoRA (PEFT) or P-Tuning v2 folder to put on top")
    p.add_argument("--limit", type=int, metavar="N", help="only N items of each task, of all kinds in turn")
    p.add_argument("--out", metavar="DIR", help="folder for results, where a stopped run goes on (default: eval/MODEL)")
    p.add_argument("--parallel", type=int, default=8, metavar="N", help="items at once (default: 8)")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="longest single answer (default: the task's)")
    p.add_argument("--guided", action=argparse.BooleanOptionalAction,
                   help="all-tools: the model names its next tool first, see chat (default: small models)")  # fmt: skip
    place_options(cast(Parser, p))


def eval_value(o: argparse.Namespace) -> dict[str, Any]:
    """What --json prints: for each task its metrics by name (`openglm.eval.all_tools.metrics.summary`)."""
    from openglm.eval.tasks import TASKS, EvalOptions

    for name in o.tasks:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}{nearest(name, list(TASKS))}: known are {', '.join(TASKS)}")
    name = Path(o.model).name if o.model else "the bundled model"
    name += f" with {Path(o.adapter).name}" if o.adapter else ""
    options = EvalOptions(
        out=Path(o.out) if o.out else Path("eval", name), name=name, limit=o.limit, n_parallel=o.parallel,
        max_new_tokens=o.max_new_tokens, guided=o.guided,
    )  # fmt: skip
    tasks = list(dict.fromkeys(o.tasks))
    for task in tasks:
        TASKS[task].check()
    model = load_model(o)
    model.require_format()
    values = {task: TASKS[task].run(model, options) for task in tasks}
    print(f"results: {options.out}", file=sys.stderr)
    return values


def eval_print(values: dict[str, Any]) -> None:
    from openglm.eval.tasks import TASKS

    for task, metrics in values.items():
        print("\n".join(TASKS[task].show(metrics)))
