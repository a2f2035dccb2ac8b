"""What an agent asks the model beside the conversation: a plan, which tool is next, the arguments of a call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence

from openglm.agent.choice import (
    ANSWER,
    choice_grammar,
    choice_messages,
    chosen,
    first_grammar,
    first_messages,
    needed,
    results_of,
)
from openglm.agent.dispatch import argument_error
from openglm.agent.prompts import CALL_REQUEST, NEEDED, PLAN_REQUEST, REPAIR_REQUEST, language_of
from openglm.types import Grammar, Message, ToolCall, ToolSpec

__all__ = ["Asides"]


class Asides:
    """ask(messages, **sampling): the text of an answer that is no part of the conversation; ValueError for what the
    backend cannot be asked. Where it has no grammars there is None instead of what a grammar would hold.
    """

    def __init__(self, ask: Callable[..., Awaitable[str]]) -> None:
        self._ask = ask

    async def plan(self, messages: Sequence[Message], names: Sequence[str]) -> str:
        """A plan for the task, or nothing."""
        request = PLAN_REQUEST[language_of(messages)].format(tools=", ".join(names))
        return (await self._ask([*messages, Message("user", request)])).strip()

    async def choice(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], notes: Sequence[tuple[str, str, str]] = ()
    ) -> tuple[str, str] | None:
        """The tool that is to be called next, or ANSWER, and what is needed from it, in words; None where that is not
        known. notes: see choice_messages.
        """
        if not tools:
            return ANSWER, ""
        try:
            begins = not results_of(messages) and not notes
            if begins:
                first = await self._ask(first_messages(messages, tools), grammar=first_grammar(tools), temperature=0.0)
                name = chosen(first, tools)
                if name in (None, ANSWER):
                    return None if name is None else (name, "")
            grammar = choice_grammar(tools, may_answer=not begins)
            text = await self._ask(choice_messages(messages, tools, notes), grammar=grammar, temperature=0.0)
        except ValueError:
            return None
        name = chosen(text, tools)
        return None if name is None else (name, needed(text))

    async def call(self, messages: Sequence[Message], tool: ToolSpec, need: str = "") -> ToolCall | None:
        """A call of the tool, with arguments that fit its schema. need: what it is to give, in the model's words."""
        schema = json.dumps(dict(tool.parameters), ensure_ascii=False)
        language = language_of(messages)
        request = CALL_REQUEST[language].format(
            name=tool.name, description=tool.description, schema=schema,
            need=NEEDED[language].format(need=need) if need else "",
        )  # fmt: skip
        return await self._drawn(messages, request, ToolCall(tool.name, "{}"), tool)

    async def repaired(
        self, messages: Sequence[Message], call: ToolCall, tool: ToolSpec, problem: str
    ) -> ToolCall | None:
        """The call with arguments that the schema's grammar lets through."""
        schema = json.dumps(dict(tool.parameters), ensure_ascii=False)
        request = REPAIR_REQUEST[language_of(messages)].format(
            name=call.name, arguments=call.arguments[:2000], problem=problem, schema=schema
        )
        return await self._drawn(messages, request, call, tool)

    async def _drawn(
        self, messages: Sequence[Message], request: str, call: ToolCall, tool: ToolSpec
    ) -> ToolCall | None:
        grammar = Grammar("json_schema", json.dumps(dict(tool.parameters), ensure_ascii=False))
        try:
            text = await self._ask([*messages, Message("user", request)], grammar=grammar)
        except ValueError:  # no grammars, or not for this schema
            return None
        better = dataclasses.replace(call, arguments=text.strip())
        return None if argument_error(better, tool) else better
