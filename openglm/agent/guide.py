"""Guide: leads a small model through a run, one step after another, and shows it no more than the step needs.

    step = await guide.step(messages, specs, records)      # Step("get_order", ToolCall("get_order", '{"id": "K5"}'))

The model names what is needed and the tool that gives it (see choice.py), and its arguments are drawn. A call whose
arguments nobody said, or that was made before just so, is not made at once: the model is told what is missing, and
chooses among the other tools; only where it finds nothing better there is the call made all the same. Whatever it
writes beside a call is dropped: it would be believed over what the call gives.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence

from openglm.agent.asides import Asides
from openglm.agent.browser.citations import sources_in
from openglm.agent.choice import ANSWER, SPEAKERS, behind, last_user, results_of
from openglm.agent.events import CallRecord
from openglm.agent.grounding import made_up
from openglm.agent.prompts import (
    ANSWER_NOW,
    KNOWN,
    NOT_YET,
    PROGRAM_REQUEST,
    RESULTS,
    answer_text,
    language_of,
    system_text,
)
from openglm.types import BUILTIN_TOOLS, Message, ToolCall, ToolSpec

__all__ = ["Guide", "Step", "restated"]

ARGUMENTS_CHARS = 2000  # of a call that is restated


@dataclasses.dataclass(frozen=True)
class Step:
    """name: of the tool that comes next, or ANSWER. call: of it, where its arguments are drawn to its schema."""

    name: str
    call: ToolCall | None = None


class Guide:
    """bodies: names of the tools that are called with code or words, which the model writes in its own way.

    system: None, or the caller's text in front of conversations. builtin: tools that the model knows by name.
    """

    def __init__(
        self, asides: Asides, bodies: Collection[str], system: str | None = None, builtin: Collection[str] = ()
    ) -> None:
        self._asides, self._bodies, self._system, self._builtin = asides, set(bodies), system, set(builtin)
        self._sent_back: set[str] = set()  # tools of which a call was not made at once

    async def step(
        self, messages: Sequence[Message], specs: Sequence[ToolSpec], records: Sequence[CallRecord],
        waiting: frozenset[str] = frozenset(), notes: Sequence[tuple[str, str, str]] = (),
    ) -> Step | None:  # fmt: skip
        """What comes next; None where the backend has no grammars, or ignores them.

        waiting: tools that cannot be chosen. notes: calls that were not made: name, arguments, why.
        """
        open_ = [spec for spec in specs if spec.name not in waiting | _stuck(records)]
        choice = await self._asides.choice(messages, open_, notes)
        if choice is None:
            return None
        name, need = choice
        if name == ANSWER or name in self._bodies:
            return Step(name)
        spec = next(spec for spec in specs if spec.name == name)
        call = await self._asides.call(self.told(messages, [spec], records), spec, need)
        if call is None:
            return Step(name)
        return await self.instead(call, messages, specs, records, waiting, notes) or Step(name, call)

    async def instead(
        self, call: ToolCall, messages: Sequence[Message], specs: Sequence[ToolSpec], records: Sequence[CallRecord],
        waiting: frozenset[str] = frozenset(), notes: Sequence[tuple[str, str, str]] = (),
    ) -> Step | None:  # fmt: skip
        """A better step than this call; None where it is to be made."""
        waiting |= {call.name}
        made = next((r.status for r in reversed(records) if _key(r.call) == _key(call)), None)
        failed = made not in (None, "done")
        spec = next((spec for spec in specs if spec.name == call.name), None)
        if failed:
            why = NOT_YET["code"] if call.name in self._bodies else NOT_YET["failed"].format(names=_names(call))
        elif made:  # what takes no arguments, such as scrolling, may be done again
            why = NOT_YET["done"] if spec is not None and spec.parameters.get("required") else ""
        else:
            why = self._missing(call, messages)
        if not why or waiting >= {spec.name for spec in specs} or (call.name in self._sent_back and not failed):
            return None
        self._sent_back.add(call.name)
        step = await self.step(messages, specs, records, waiting, [*notes, (call.name, call.arguments, why)])
        if step is None or step.name == ANSWER:
            return Step(ANSWER) if made else None
        return step

    def _missing(self, call: ToolCall, messages: Sequence[Message]) -> str:
        """What the arguments hold that nobody said, in words; nothing where all was said."""
        last = last_user(messages)
        known = "\n".join(m.content for i, m in enumerate(messages) if i <= last or m.role == "tool")
        try:
            found = made_up(json.loads(call.arguments or "{}"), known, code=call.name in self._bodies)
        except (ValueError, AttributeError, RecursionError):
            return ""
        if not found:
            return ""
        if call.name in self._bodies:
            return NOT_YET["number"].format(value=", ".join(found.values()))
        return NOT_YET["argument"].format(names=", ".join(found))

    def writes_program(self, specs: Sequence[ToolSpec], messages: Sequence[Message]) -> bool:
        """Whether a program is asked for, in place of a call with one in it. Asked so in Chinese, a small model wrote
        worse ones, in words that are no names.
        """
        is_python = [spec.name for spec in specs] == ["python"] and "python" in self._bodies - self._builtin
        return is_python and language_of(messages) == "en"

    def told(
        self, messages: Sequence[Message], specs: Sequence[ToolSpec], records: Sequence[CallRecord]
    ) -> list[Message]:
        """The conversation for this step, with a text about it in front, unless the caller has put one there.

        specs: the tool of the step; none: the answer.
        """
        language = language_of(messages)
        shown = restated(messages, to_answer=not specs)
        if self.writes_program(specs, messages):
            shown = _in_one(shown)
            last = last_user(shown)
            request = PROGRAM_REQUEST.format(description=specs[0].description)
            shown[last] = dataclasses.replace(shown[last], content=f"{shown[last].content}\n\n{request}")
        if messages[0].role == "system" or self._system is not None:
            return shown
        system = "" if self.writes_program(specs, messages) else system_text(specs, language)
        if not specs and results_of(messages):
            system = answer_text(language, bool(sources_in(r.observation.data for r in records)))
        return [Message("system", system), *shown] if system else shown


def restated(messages: Sequence[Message], to_answer: bool = False) -> list[Message]:
    """The conversation with what tools gave since the user last spoke put behind the user's words.

    What the model wrote before its calls is left out, and it sees no call that it might repeat. to_answer: the
    results stand last: it would work out anew a question behind them.
    """
    lines = []
    for call, result in results_of(messages):
        given = _shown(call)
        lines.append(f"{call.name} {given}:\n{result}" if given else f"{call.name}:\n{result}")
    if not lines:
        return list(messages)
    last = last_user(messages)
    user = messages[last]
    language = language_of(messages)
    heading, close = (RESULTS, [ANSWER_NOW[language]]) if to_answer else (KNOWN, [])
    text = "\n\n".join([user.content, heading[language], *lines, *close])
    return [*messages[:last], dataclasses.replace(user, content=text)]


def _in_one(messages: Sequence[Message]) -> list[Message]:
    """What was said in earlier turns, with what tools gave in them, told in the user's message, without the calls: a
    small model writes a program that it sees again, whatever it is asked for now.
    """
    last = last_user(messages)
    speakers = {**SPEAKERS, "tool": "Result"}
    lines = [f"{speakers[m.role]}: {m.content}" for m in messages[:last] if m.role in speakers and m.content]
    user = dataclasses.replace(messages[last], content=behind(lines, messages[last].content))
    return [*(m for m in messages[:last] if m.role not in speakers), user, *messages[last + 1 :]]


def _shown(call: ToolCall) -> str:
    """The arguments of a call; of a program, its text alone, which says what its result is."""
    body = BUILTIN_TOOLS.get(call.name)
    try:
        value = json.loads(call.arguments)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and list(value) == [body] and isinstance(value[body], str):
        return f"\n{value[body]}\n"[:ARGUMENTS_CHARS]
    return call.arguments[:ARGUMENTS_CHARS]


def _stuck(records: Sequence[CallRecord]) -> frozenset[str]:
    """A tool that failed twice in a row waits a round."""
    names = {r.call.name for r in records[-2:]}
    failed = len(records) >= 2 and all(r.status != "done" for r in records[-2:])
    return frozenset(names if failed and len(names) == 1 else ())


def _names(call: ToolCall) -> str:
    """Of its arguments."""
    try:
        return ", ".join(json.loads(call.arguments)) or "call"
    except (ValueError, TypeError, RecursionError):
        return "call"


def _key(call: ToolCall) -> tuple[str, str]:
    try:
        return call.name, json.dumps(json.loads(call.arguments or "{}"), sort_keys=True)
    except (ValueError, RecursionError):
        return call.name, call.arguments
