"""Options about tools and agents, and what they mean: of `openglm chat`, `serve` and `tools`."""

from __future__ import annotations

import argparse
from typing import Any

from openglm.agent.events import AgentConfig
from openglm.cli_options import Parser
from openglm.cli_tools import toolbox_options

__all__ = ["agent_config", "agent_options", "wants_agent"]


def agent_options(p: Parser) -> None:
    """For `chat` and `serve`."""
    g = p.add_argument_group("tools")
    g.add_argument("--all-tools", action="store_true",
                   help="the model decides when to use Python, the web browser, pictures")  # fmt: skip
    toolbox_options(g)
    g.add_argument("--approval", action="append", default=[], metavar="TOOL=RULE",
                   help="ask, always or never; * for all others (python without a sandbox: ask)")  # fmt: skip
    g.add_argument("--rounds", type=int, metavar="N", help="answers of the model to one question, calls included")
    g.add_argument("--plan", action="store_true", help="let the model write a plan first")
    g.add_argument("--guided", action=argparse.BooleanOptionalAction,
                   help="the model names its next tool first, and sees that alone (default: small models)")  # fmt: skip
    g.add_argument("--trace", metavar="DIR", help="a JSONL file for each question (default: in the state folder; "
                   "'none' for none)")  # fmt: skip


def wants_agent(o: argparse.Namespace) -> bool:
    """Whether tools are asked for. ValueError for options that mean nothing without them."""
    on = bool(o.all_tools or o.tools or o.mcp)
    settings = {"--approval": o.approval, "--rounds": o.rounds, "--plan": o.plan,
                "--guided": o.guided is not None, "--trace": o.trace}  # fmt: skip
    for option, value in settings.items():
        if value and not on:
            raise ValueError(f"{option} goes with --all-tools, --tools or --mcp")
    builtin = {"--unsafe-python": o.unsafe_python, "--no-python": o.no_python,
               "--no-browser": o.no_browser, "--search-in": o.search_in,
               "--allow-address": o.allow_address}  # fmt: skip
    for option, value in builtin.items():
        if value and not o.all_tools:
            raise ValueError(f"{option} goes with --all-tools")
    return on


def agent_config(o: argparse.Namespace) -> AgentConfig:
    rules: dict[str, Any] = {"python": "ask"} if o.unsafe_python else {}
    for rule in o.approval:
        name, equals, policy = rule.rpartition("=")
        if not equals or not name:
            raise ValueError(f"--approval takes a tool and a rule, such as python=ask, not {rule!r}")
        rules[name] = policy
    given = {} if o.rounds is None else {"n_rounds": o.rounds}
    return AgentConfig(approval=rules, plan=o.plan, guided=o.guided, **given)
