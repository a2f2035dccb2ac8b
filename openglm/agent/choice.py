"""What a guided agent asks a model before each answer: what is needed now, and which tool gives it, or the answer.

    messages = choice_messages(conversation, specs)
    text = ...                 # drawn under choice_grammar(specs): {"need": "age of Ruth Adams", "next": "search"}
    chosen(text, specs), needed(text)        # "search", "age of Ruth Adams"

Before anything was done it is asked for a name alone: asked what it needs, a small model finds a need in a question
whose answer it knows.

Small models know well which of a few names fits a request, and badly when to write a call and how. That one tool may
need what another one gives first they see only when they say what is needed. The question comes with examples made from
the tools that are there, with chains of calls of made-up tools, and with what was done so far.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from openglm.types import Grammar, Message, ToolCall, ToolSpec

__all__ = [
    "ANSWER", "SPEAKERS", "behind", "choice_grammar", "choice_messages", "chosen", "first_grammar", "first_messages",
    "last_user", "needed", "results_of",
]  # fmt: skip

ANSWER = "answer"
N_EXAMPLES = 24  # tools that get an example of their own
N_SHOWN = 4  # results that are shown, the last ones
RESULT_CHARS = 700
N_EARLIER, EARLIER_CHARS = 4, 300  # messages of earlier turns that are shown, the last ones
NEED_CHARS = 80
SYSTEM = """You decide what to do next for the user's request. Say in a few words which single piece of information is \
needed now, then name the tool that gives it. A tool can only be given what stands in the request or in a result: get \
first what is missing. Use python for calculations that no other tool does, once all numbers are known. If nothing is \
needed, the next is {answer}: for what everybody knows, translations, opinions, small talk and writing, and once the \
results hold all that was asked for.

Tools:
{tools}"""
FIRST = """You decide what to do next for the user's request. You can use one of these tools, or answer:
{tools}
- {answer}: reply at once. Right for what everybody knows, translations, opinions, small talk and writing, and once \
the results hold what was asked for.
If a tool needs something that the request does not say, such as where a person lives, get that first.
Reply with one name."""
PRACTICE = """The same with other tools, for practice:
- pupil_room: Room in which a pupil lives.
- key_code: Code of the key of a room.
- bed_plant: 花坛里种的植物。
- watering: 某种植物多久浇一次水。
- postage: Price of sending a letter.
- search: Search the web.
- python: Runs Python code.
- {answer}: reply to the user.

"""
AGAIN = "Now again with these tools:\n{tools}\n\n"
SPEAKERS = {"user": "User", "assistant": "You"}
SEARCHES = ("search", "simple_browser")
OPENERS = ("open_page", "simple_browser")
BROWSING = (*SEARCHES, *OPENERS, "click", "find", "scroll", "back", "quote")
# (request, what it needs, tools of which the first that is there is right; none: the answer)
COMMON: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("What is the capital of Italy?", "", ()),
    ("Who is the head teacher of Wexley School?", "head teacher of Wexley School", SEARCHES),
    ("把“再见”翻译成日文。", "", ()),
    ("云岭动物园的门票多少钱？", "云岭动物园门票价格", SEARCHES),
    ("What is 8236 * 99127?", "8236 * 99127", ("python",)),
    ("Who wrote the novel Moby Dick?", "", ()),
    ("How long is the Marrow Tunnel?", "length of the Marrow Tunnel", SEARCHES),
    ("一周有几天？", "", ()),
    ("青石镇中学是哪一年建校的？", "青石镇中学建校年份", SEARCHES),
)
# The same behind a call: (request, tools of which one was called, arguments, result, what it needs, tools right next)
LATER: tuple[tuple[str, tuple[str, ...], str, str, str, tuple[str, ...]], ...] = (
    ("What is 8236 * 99127?", ("python",), '{"code": "print(8236 * 99127)"}', "816409972", "", ()),
    ("Who is the head teacher of Wexley School?", SEARCHES, '{"query": "Wexley School head teacher"}',
     "1 results. Open one by its number.\n# 【1†Wexley School†wexley.example】\nA school with 300 pupils.",
     "what page 1 says of the head teacher", OPENERS),
    ("Who is the head teacher of Wexley School?", OPENERS, '{"page": "1"}',
     "【1†Wexley School】\nL3: The head teacher is Ruth Adams.", "", ()),
    ("How many years before 2024 was the Marrow Tunnel opened?", OPENERS, '{"page": "1"}',
     "【1†Marrow Tunnel】\nL2: The tunnel was opened on 3 May 1956.", "2024 - 1956", ("python",)),
    ("云岭动物园的门票多少钱？", OPENERS, '{"page": "2"}', "【2†云岭动物园】\nL5: 成人票60元，儿童票30元。", "", ()),
)  # fmt: skip
ROOM = ("pupil_room", '{"pupil": "Juno Hartley"}', '{"room": "4-12"}')
CODE = ("key_code", '{"room": "4-12"}', '{"code": "Q77"}')
PLANT = ("bed_plant", '{"bed": 3}', '{"plant": "月季"}')
ATLAS = ("search", '{"query": "Dorn Atlas"}', "1 results.\n# 【1†Dorn Atlas†dorn.example】\nA book of maps, 640 grams.")
TUNNEL = ("search", '{"query": "Marrow Tunnel"}',
          "1 results.\n# 【1†Marrow Tunnel†marrow.example】\nA road tunnel of 2310 metres.")  # fmt: skip
# Chains, with the tools of PRACTICE: (request, what was done: name, arguments, result; what it needs; the tool, if any)
CHAINS: tuple[tuple[str, tuple[tuple[str, str, str], ...], str, str], ...] = (
    ("What is the key code of Juno Hartley's room?", (), "room of Juno Hartley", "pupil_room"),
    ("What is the key code of Juno Hartley's room?", (ROOM,), "key code of room 4-12", "key_code"),
    ("What is the key code of Juno Hartley's room?", (ROOM, CODE), "", ""),
    ("三号花坛的植物多久浇一次水？", (), "三号花坛种的植物", "bed_plant"),
    ("三号花坛的植物多久浇一次水？", (PLANT,), "月季的浇水间隔", "watering"),
    ("Find the weight of the Dorn Atlas and tell me the postage for it.", (), "weight of the Dorn Atlas", "search"),
    ("Find the weight of the Dorn Atlas and tell me the postage for it.", (ATLAS,), "postage for 640 grams", "postage"),
    ("Look up how long the Marrow Tunnel is. How many steps of 0.7 metres is that?", (), "length of the Marrow Tunnel",
     "search"),
    ("Look up how long the Marrow Tunnel is. How many steps of 0.7 metres is that?", (TUNNEL,), "2310 / 0.7", "python"),
    ("查一下云岭动物园有多少只猴子，用Python算出每只每天吃1.3千克时一年吃多少。", (), "云岭动物园的猴子数量",
     "search"),
    ("把“再见”翻译成日文。", (), "", ""),
)  # fmt: skip


def choice_messages(
    conversation: Sequence[Message], tools: Sequence[ToolSpec], notes: Sequence[tuple[str, str, str]] = ()
) -> list[Message]:
    """The prompt for a choice among the tools and the answer, behind what was done since the user last spoke.

    notes: calls that were thought of and not made: name, arguments, why.
    """
    answer = _answer_name(tools)
    lines = [f"- {tool.name}: {_first_sentence(tool.description)}" for tool in tools]
    listed = "\n".join([*lines, f"- {answer}: reply to the user."])
    messages = [Message("system", SYSTEM.format(tools=listed, answer=answer))]

    def add(request: str, need: str, name: str) -> None:
        text = json.dumps({"need": need, "next": name or answer}, ensure_ascii=False)
        messages.extend([Message("user", request), Message("assistant", text)])

    for example in _examples(tools):
        add(*example)
    for i, (request, calls, need, name) in enumerate(CHAINS):
        add(("" if i else PRACTICE.format(answer=answer)) + _request(request, calls), need, name)
    done = [(call.name, call.arguments, result) for call, result in results_of(conversation)[-N_SHOWN:]]
    request = _request(_asked(conversation), [*done, *notes])
    return [*messages, Message("user", AGAIN.format(tools=listed) + request)]


def first_messages(conversation: Sequence[Message], tools: Sequence[ToolSpec]) -> list[Message]:
    """The prompt for a name alone, of a tool or the answer, before anything was done."""
    answer = _answer_name(tools)
    lines = "\n".join(f"- {tool.name}: {_first_sentence(tool.description)}" for tool in tools)
    messages = [Message("system", FIRST.format(tools=lines, answer=answer))]
    for request, _, name in _examples(tools):
        messages += [Message("user", request), Message("assistant", json.dumps({"next": name or answer}))]
    return [*messages, Message("user", _asked(conversation))]


def results_of(conversation: Sequence[Message]) -> list[tuple[ToolCall, str]]:
    """What tools gave since the user last spoke, each with its call."""
    turn = conversation[last_user(conversation) + 1 :]
    calls = {call.id: call for m in turn for call in m.tool_calls}
    tools = [m for m in turn if m.role == "tool"]
    return [(calls.get(m.tool_call_id) or ToolCall(m.name or "", ""), m.content) for m in tools]


def last_user(conversation: Sequence[Message]) -> int:
    """The place of what the user said last."""
    return max((i for i, m in enumerate(conversation) if m.role == "user"), default=len(conversation) - 1)


def _asked(conversation: Sequence[Message]) -> str:
    """What the user said last, with the end of what was said before, which it may speak of."""
    last = last_user(conversation)
    said = [m for m in conversation[:last] if m.role in SPEAKERS and m.content.strip()][-N_EARLIER:]
    lines = [f"{SPEAKERS[m.role]}: {_cut(m.content.strip(), EARLIER_CHARS)}" for m in said]
    return behind(lines, conversation[last].content)


def behind(said: Sequence[str], request: str) -> str:
    """A request with the lines that were said before it in front; alone where nothing was."""
    return "\n".join(["Said before:", *said, "", f"Request: {request}"]) if said else request


def first_grammar(tools: Sequence[ToolSpec]) -> Grammar:
    return _object({"next": _names(tools, True)})


def choice_grammar(tools: Sequence[ToolSpec], may_answer: bool = True) -> Grammar:
    """may_answer: False where it was said already that a tool is needed."""
    return _object({"need": {"type": "string", "maxLength": NEED_CHARS}, "next": _names(tools, may_answer)})


def _names(tools: Sequence[ToolSpec], may_answer: bool) -> dict[str, Any]:
    return {"enum": [tool.name for tool in tools] + ([_answer_name(tools)] if may_answer else [])}


def _object(properties: dict[str, dict[str, Any]]) -> Grammar:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return Grammar("json_schema", json.dumps(schema))


def chosen(text: str, tools: Sequence[ToolSpec]) -> str | None:
    """The name in what the model wrote: a tool's, ANSWER, or None where it names neither."""
    known = {**{tool.name: tool.name for tool in tools}, _answer_name(tools): ANSWER}
    try:
        value = json.loads(text)["next"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return known.get(value) if isinstance(value, str) else None


def needed(text: str) -> str:
    """What is needed, in what the model wrote; may be nothing."""
    try:
        return str(json.loads(text)["need"]).strip()
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""


def _answer_name(tools: Sequence[ToolSpec]) -> str:
    """By which the model calls the answer: no tool's name."""
    return ANSWER if all(tool.name != ANSWER for tool in tools) else "reply_to_user"


def _examples(tools: Sequence[ToolSpec]) -> list[tuple[str, str, str]]:
    """(request, what it needs, right name or ""): one for each function from its description, among those for the
    common tools.
    """
    names = [tool.name for tool in tools]

    def there(wanted: Sequence[str]) -> str:
        return next((name for name in wanted if name in names), "")

    own = [t for t in tools if not t.builtin and t.name not in (*BROWSING, "python") and t.description][:N_EXAMPLES]
    texts = [_first_sentence(t.description).rstrip(".。") for t in own]
    functions = [(f"{text}.", text[:1].lower() + text[1:], t.name) for t, text in zip(own, texts, strict=True)]
    common = [(request, need, there(right)) for request, need, right in COMMON if not right or there(right)]
    out: list[tuple[str, str, str]] = []
    while functions or common:  # in turns, the common ones last
        if functions:
            out.append(functions.pop(0))
        if common and len(common) >= len(functions):
            out.append(common.pop(0))
    for request, called, arguments, result, need, right in LATER:
        if there(called) and (not right or there(right)):
            out.append((_request(request, [(there(called), arguments, result)]), need, there(right)))
    return out


def _request(question: str, done: Sequence[tuple[str, str, str]]) -> str:
    if not done:
        return question
    lines = [f"{name} {arguments[:300]} gave:\n{_cut(result)}" for name, arguments, result in done]
    return "\n\n".join([question, "Done so far:", *lines])


def _cut(text: str, n_chars: int = RESULT_CHARS) -> str:
    return text if len(text) <= n_chars else f"{text[:n_chars]} ..."


def _first_sentence(description: str) -> str:
    return re.split(r"(?<=[.。;；])\s|\n", description.strip(), maxsplit=1)[0][:160]
