"""`openglm replay`: what an agent did, done again without a model, and compared.

python -m openglm replay ~/.local/state/openglm/traces/*.jsonl
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openglm.agent.events import Called, Finished, Observed, Planned
from openglm.agent.examples import to_example
from openglm.agent.replay import replay as run_again
from openglm.agent.trace import read_trace
from openglm.cli_chat_view import shortened
from openglm.cli_options import Parser, common_options

__all__ = ["replay", "replay_options"]


def replay_options(p: Parser) -> None:
    p.add_argument("traces", nargs="+", metavar="TRACE", help="a JSONL file that an agent wrote")
    p.add_argument("--example", metavar="FILE", help="append the runs as rows of chat data for training")
    p.add_argument("--quiet", action="store_true", help="only whether they come out the same")
    common_options(p, json_output=False)


def replay(o: argparse.Namespace) -> int:
    """0 when all come out the same, 1 when one does not."""
    worst = 0
    for path in o.traces:
        trace = read_trace(path)
        if not o.quiet:
            _story(trace)
        differences = run_again(trace)
        worst = max(worst, bool(differences))
        print(f"{path}: {'DIFFERENT' if differences else 'the same'}")
        for line in differences:
            print(f"  {line}")
        if o.example:
            row = json.dumps(to_example(trace), ensure_ascii=False)
            with open(o.example, "a", encoding="utf-8") as file:
                file.write(row + "\n")
    return worst


def _story(trace: Any) -> None:
    """A run in lines that can be read."""
    for message in trace.messages:
        print(f"{message.role}: {shortened(message.content)}")
    for event, t in zip(trace.events, trace.times, strict=True):
        match event:
            case Planned(text):
                print(f"{t:8.2f} s  plan: {text}")
            case Called(call, number):
                print(f"{t:8.2f} s  round {number} calls {call.name} {call.arguments}")
            case Observed():
                print(f"{t:8.2f} s  {event.status}: {shortened(event.observation.content)}")
            case Finished(outcome):
                print(f"{t:8.2f} s  {outcome.stop} after {outcome.n_rounds} rounds: {outcome.answer}")
