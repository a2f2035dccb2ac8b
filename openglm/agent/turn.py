"""One answer of the model: its events as they come, and then its message."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

from openglm.agent.events import AgentEvent, Said, Thought
from openglm.agent.salvage import CallFilter, final_program
from openglm.types import BUILTIN_TOOLS, Event, Message, ToolCall, ToolSpec

__all__ = ["Turn", "add_pieces"]


class Turn:
    """Collects what a backend streams. tools: those that may be called. emit: told what is said and thought.

    runs_code: a program in an answer without calls is a call of the tool `python`.
    """

    def __init__(
        self, number: int, tools: Sequence[ToolSpec], emit: Callable[[AgentEvent], None], runs_code: bool = False
    ) -> None:
        self.number, self._emit = number, emit
        self._filter = CallFilter(tools)
        self._runs_code = runs_code
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self.cut_off = False  # at the limit of tokens

    def feed(self, event: Event) -> None:
        self.cut_off = self.cut_off or event.finish_reason == "length"
        if event.reasoning:
            self._reasoning.append(event.reasoning)
            self._emit(Thought(event.reasoning))
        if event.tool_call is not None:
            self._calls.append(event.tool_call)
        self._say(self._filter.feed(event.text))

    def finish(self) -> None:
        """After the last event, or where the stream broke off."""
        self._say(self._filter.finish())
        self._calls += self._filter.calls
        if self._runs_code and not self._calls and (found := final_program("".join(self._text))) is not None:
            before, code = found  # what stands behind it is imagined, and would be believed later
            self._text = [before]
            self._calls.append(ToolCall("python", json.dumps({BUILTIN_TOOLS["python"]: code}, ensure_ascii=False)))
        # Ids are unique in the run, whatever the backend gave: a trace, a page and a history refer to calls by them.
        self._calls = [dataclasses.replace(call, id=f"call_{self.number}_{i}") for i, call in enumerate(self._calls, 1)]

    def _say(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._emit(Said(text, self.number))

    @property
    def message(self) -> Message:
        text = "".join(self._text)
        return Message(
            "assistant", text.rstrip() if self._calls else text, tuple(self._calls), reasoning="".join(self._reasoning)
        )


def add_pieces(pieces: list[tuple[str, str]], event: Event) -> None:
    """What an event holds, joined to the last piece where that is of the same kind."""
    for kind, text in (("reasoning", event.reasoning), ("text", event.text)):
        if text and pieces and pieces[-1][0] == kind:
            pieces[-1] = (kind, pieces[-1][1] + text)
        elif text:
            pieces.append((kind, text))
    if event.tool_call is not None:
        call = event.tool_call
        pieces.append(("call", json.dumps([call.name, call.arguments], ensure_ascii=False)))
