"""What an agent is told to do and what it tells: its limits, its events as they happen, and what came of all.

async for event in agent.run(messages):
    match event:
        case Said(text): print(text, end="")
        case Observed(call_id, name, observation): ...
        case Finished(outcome): ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from openglm.types import Message, Observation, ToolCall, Usage

__all__ = [
    "AgentConfig", "AgentEvent", "Answered", "Asked", "CallRecord", "Called", "Finished", "Outcome", "Output",
    "Observed", "Planned", "Policy", "Said", "Status", "Stop", "Thought",
]  # fmt: skip

Policy = Literal["ask", "always", "never"]
POLICIES = get_args(Policy)


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Limits and habits of an agent.

    n_rounds: answers of the model at most, the last one included. max_tokens: that it may write in all of them.
    time_s: for everything; tool_time_s: for one call. observation_chars: of a result that the model is shown; the
    rest it may open. n_same: times that one call may give one and the same result before it is refused. plan: the
    model writes a plan first. approval: by a tool's name, or "*" for all others: "always" runs it, "ask" asks the
    user each time, "never" refuses. system: in front of a conversation that has no system message; None: a text about
    the tools in the language of the conversation, "" none. guided: before each answer the model names the tool that
    comes next, or the answer, held to these names, and sees that tool alone: for small models; None: where the backend
    says that it `wants_guide`. n_at_once: calls of one
    turn that run at the same time.
    """

    n_rounds: int = 10
    max_tokens: int = 16384
    time_s: float = 900.0
    tool_time_s: float = 120.0
    observation_chars: int = 8000
    n_same: int = 2
    plan: bool = False
    guided: bool | None = None
    approval: Mapping[str, Policy] | tuple[tuple[str, Policy], ...] = ()  # kept as sorted pairs
    system: str | None = None
    n_at_once: int = 4

    def __post_init__(self) -> None:
        given = self.approval
        pairs = tuple(given.items()) if isinstance(given, Mapping) else tuple((rule[0], rule[1]) for rule in given)
        object.__setattr__(self, "approval", tuple(sorted(pairs)))
        for name, policy in pairs:
            if policy not in POLICIES:
                raise ValueError(f"approval of {name!r} must be {', '.join(POLICIES)}, not {policy!r}")
        for name, least in (("n_rounds", 1), ("max_tokens", 1), ("observation_chars", 200), ("n_same", 1),
                            ("n_at_once", 1)):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("time_s", "tool_time_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, not {value!r}")

    def policy(self, tool: str) -> Policy:
        rules = dict(self.approval)
        return rules.get(tool, rules.get("*", "always"))


# done: it ran, and its result may tell of an error. refused: its arguments do not fit. denied: by the user or the
# policy. repeated: it was made before, with the same result. cut: it took too long, or the whole run did.
Status = Literal["done", "error", "refused", "denied", "repeated", "cut"]
# answer: the model answered without a call. calls: it called what the caller runs. length: an answer was cut off at
# its limit of tokens. rounds, tokens, time: the limit that was reached. repeats: it went round in circles.
Stop = Literal["answer", "calls", "length", "rounds", "tokens", "time", "repeats"]


@dataclass(frozen=True)
class CallRecord:
    """A call and what came of it."""

    call: ToolCall
    observation: Observation
    status: Status
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What came of a run. answer: the text of the last round. messages: the conversation, the given ones included.

    pending: calls of tools that the caller runs, to be answered by it in further messages.
    """

    answer: str
    stop: Stop
    messages: tuple[Message, ...]
    calls: tuple[CallRecord, ...] = ()
    pending: tuple[ToolCall, ...] = ()
    n_rounds: int = 0
    usage: Usage = Usage(0, 0)
    seconds: float = 0.0


@dataclass(frozen=True)
class Planned:
    """The plan, before the first round."""

    text: str


@dataclass(frozen=True)
class Thought:
    """A piece of what the model thinks."""

    text: str


@dataclass(frozen=True)
class Said:
    """A piece of what the model says to the user, in this round (from 1)."""

    text: str
    round: int


@dataclass(frozen=True)
class Called:
    """The model calls a tool. repaired: its arguments were drawn once more, held to the schema."""

    call: ToolCall
    round: int
    repaired: bool = False


@dataclass(frozen=True)
class Asked:
    """The user is being asked whether this call may run."""

    call_id: str
    name: str


@dataclass(frozen=True)
class Output:
    """A piece of what a running tool prints. stream: stdout, stderr or progress."""

    call_id: str
    stream: str
    text: str


@dataclass(frozen=True)
class Observed:
    """A call is over. full: the whole text of the result, where the model is shown only its beginning."""

    call_id: str
    name: str
    observation: Observation
    status: Status
    seconds: float
    full: str = ""


@dataclass(frozen=True)
class Finished:
    """The last event."""

    outcome: Outcome


@dataclass(frozen=True)
class Answered:
    """For traces alone: what the backend gave for one answer, before anything was made of it.

    pieces: ("text" or "reasoning", text) or ("call", name and arguments as JSON). whole: it came to its end.
    """

    pieces: tuple[tuple[str, str], ...]
    finish_reason: str | None
    usage: Usage
    whole: bool


AgentEvent = Planned | Thought | Said | Called | Asked | Output | Observed | Finished
