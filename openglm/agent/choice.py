"""What a guided agent asks a model before each answer: which tool comes next, or the answer.

    messages = choice_messages(question, specs, records)
    text = ...                                   # drawn under choice_grammar(specs): {"next": "search"}
    chosen(text, specs)                          # "search"

Small models know well which of a few names fits a request, and badly when to write a call and how. The question comes
with examples of its own, made from the tools that are there, and what was done so far.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from openglm.agent.events import CallRecord
from openglm.types import Grammar, Message, ToolSpec

__all__ = ["ANSWER", "choice_grammar", "choice_messages", "chosen"]

ANSWER = "answer"
N_EXAMPLES = 24  # tools that get an example of their own
N_SHOWN = 4  # results that are shown, the last ones
RESULT_CHARS = 700
SYSTEM = """You decide what to do next for the user's request. You can use one of these tools, or answer:
{tools}
- answer: reply at once. Right for what everybody knows, translations, opinions, small talk and writing, and once the \
results hold what was asked for.
If a tool needs something that the request does not say, such as where a person lives, get that first.
Reply with one name."""
SEARCHES = ("search", "simple_browser")
OPENERS = ("open_page", "simple_browser")
BROWSING = (*SEARCHES, *OPENERS, "click", "find", "scroll", "back", "quote")
# (request, tools of which the first that is there is right; none: the answer)
COMMON: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What is the capital of Italy?", ()),
    ("Who is the head teacher of Wexley School?", SEARCHES),
    ("把“再见”翻译成日文。", ()),
    ("云岭动物园的门票多少钱？", SEARCHES),
    ("What is 8236 * 99127?", ("python",)),
    ("Who wrote the novel Moby Dick?", ()),
    ("How long is the Marrow Tunnel?", SEARCHES),
    ("一周有几天？", ()),
    ("青石镇中学是哪一年建校的？", SEARCHES),
)
# The same behind a call: (request, tools of which one was called, arguments, result, tools that are right next)
LATER: tuple[tuple[str, tuple[str, ...], str, str, tuple[str, ...]], ...] = (
    ("What is 8236 * 99127?", ("python",), '{"code": "print(8236 * 99127)"}', "816409972", ()),
    ("Who is the head teacher of Wexley School?", SEARCHES, '{"query": "Wexley School head teacher"}',
     "1 results. Open one by its number.\n# 【1†Wexley School†wexley.example】\nA school with 300 pupils.", OPENERS),
    ("Who is the head teacher of Wexley School?", OPENERS, '{"page": "1"}',
     "【1†Wexley School】\nL3: The head teacher is Ruth Adams.", ()),
    ("How many years before 2024 was the Marrow Tunnel opened?", OPENERS, '{"page": "1"}',
     "【1†Marrow Tunnel】\nL2: The tunnel was opened on 3 May 1956.", ("python",)),
    ("云岭动物园的门票多少钱？", OPENERS, '{"page": "2"}', "【2†云岭动物园】\nL5: 成人票60元，儿童票30元。", ()),
)  # fmt: skip


def choice_messages(question: str, tools: Sequence[ToolSpec], records: Sequence[CallRecord]) -> list[Message]:
    """The prompt for a choice among the tools and the answer. records: the calls made so far."""
    answer = _answer_name(tools)
    lines = "\n".join(f"- {tool.name}: {_first_sentence(tool.description)}" for tool in tools)
    messages = [Message("system", SYSTEM.format(tools=lines).replace("- answer:", f"- {answer}:"))]
    for request, name in _examples(tools):
        messages += [Message("user", request), Message("assistant", json.dumps({"next": name or answer}))]
    done = [(r.call.name, r.call.arguments, r.observation.content) for r in records[-N_SHOWN:]]
    return [*messages, Message("user", _request(question, done))]


def choice_grammar(tools: Sequence[ToolSpec]) -> Grammar:
    names = {"enum": [*(tool.name for tool in tools), _answer_name(tools)]}
    schema = {"type": "object", "properties": {"next": names}, "required": ["next"], "additionalProperties": False}
    return Grammar("json_schema", json.dumps(schema))


def chosen(text: str, tools: Sequence[ToolSpec]) -> str | None:
    """The name in what the model wrote: a tool's, ANSWER, or None where it names neither."""
    known = {**{tool.name: tool.name for tool in tools}, _answer_name(tools): ANSWER}
    try:
        value = json.loads(text)["next"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return known.get(value) if isinstance(value, str) else None


def _answer_name(tools: Sequence[ToolSpec]) -> str:
    """By which the model calls the answer: no tool's name."""
    return ANSWER if all(tool.name != ANSWER for tool in tools) else "reply_to_user"


def _examples(tools: Sequence[ToolSpec]) -> list[tuple[str, str]]:
    """(request, right name or ""): one for each function from its description, among those for the common tools."""
    names = [tool.name for tool in tools]

    def there(wanted: Sequence[str]) -> str:
        return next((name for name in wanted if name in names), "")

    own = [t for t in tools if not t.builtin and t.name not in (*BROWSING, "python")][:N_EXAMPLES]
    functions = [(f"{_first_sentence(t.description).rstrip('.。')}.", t.name) for t in own if t.description]
    if functions and "python" in names:
        functions.append((f"{functions[-1][0]} Then calculate with it in Python.", functions[-1][1]))
    common = [(request, there(right)) for request, right in COMMON if not right or there(right)]
    out: list[tuple[str, str]] = []
    while functions or common:  # in turns, the common ones last
        if functions:
            out.append(functions.pop(0))
        if common and len(common) >= len(functions):
            out.append(common.pop(0))
    for request, called, arguments, result, right in LATER:
        if there(called) and (not right or there(right)):
            out.append((_request(request, [(there(called), arguments, result)]), there(right)))
    return out


def _request(question: str, done: Sequence[tuple[str, str, str]]) -> str:
    if not done:
        return question
    lines = [f"{name} {arguments[:300]} gave:\n{_cut(result)}" for name, arguments, result in done]
    return "\n\n".join([question, "Done so far:", *lines])


def _cut(result: str) -> str:
    return result if len(result) <= RESULT_CHARS else f"{result[:RESULT_CHARS]} ..."


def _first_sentence(description: str) -> str:
    return re.split(r"(?<=[.。;；])\s|\n", description.strip(), maxsplit=1)[0][:160]
