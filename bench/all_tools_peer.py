"""smolagents on tasks from standard input, through an OpenAI-compatible server; bench/all_tools.py starts it.

    PYTHON bench/all_tools_peer.py URL MODEL code|tools N_PARALLEL MAX_TOKENS MAX_STEPS < tasks.jsonl

Runs in an interpreter that has `smolagents[openai]` and nothing of this project. A line of JSON for each task as it
ends: id, answer, steps, seconds.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

IMPORTS = ["sympy", "numpy", "functools"]


def answer(task: dict[str, Any], o: list[str]) -> dict[str, Any]:
    from smolagents import CodeAgent, LogLevel, OpenAIServerModel, PythonInterpreterTool, ToolCallingAgent

    url, name, kind, _, max_tokens, max_steps = o
    model = OpenAIServerModel(
        name, api_base=url, api_key="none", temperature=0.0, max_tokens=int(max_tokens),
        client_kwargs={"timeout": 1200.0, "max_retries": 0},
    )  # fmt: skip
    common: dict[str, Any] = {"model": model, "max_steps": int(max_steps), "verbosity_level": LogLevel.OFF}
    if kind == "code":
        agent: Any = CodeAgent(tools=[], additional_authorized_imports=IMPORTS, **common)
    else:
        agent = ToolCallingAgent(tools=[PythonInterpreterTool(authorized_imports=IMPORTS)], **common)
    started = time.monotonic()
    try:
        found = str(agent.run(task["question"]))
    except Exception as error:
        found = f"[{type(error).__name__}: {str(error)[:300]}]"
    seconds = time.monotonic() - started
    return {"id": task["id"], "answer": found, "steps": len(agent.memory.steps) - 1, "seconds": seconds}


def main() -> None:
    tasks = [json.loads(line) for line in sys.stdin]
    with ThreadPoolExecutor(int(sys.argv[4])) as pool:
        for result in pool.map(lambda task: answer(task, sys.argv[1:]), tasks):
            print(json.dumps(result, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
