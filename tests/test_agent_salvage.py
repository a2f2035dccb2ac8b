"""Calls written otherwise than the format says: which are found, what stays text, and that the cut does not matter."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openglm.agent.salvage import CallFilter, asks_for_code, final_program, read_calls
from openglm.types import ToolSpec

TOOLS = [ToolSpec("python", "", {}, builtin=True), ToolSpec("search", "", {})]
CODE = '{"name": "python", "arguments": {"code": "print(1)\\nprint(2)"}}'
QUOTED = '{"name": "python", "arguments": {"code": """\n  print(1)\n  print(2)\n  """}}'
SEARCH = '{"name": "search", "arguments": {"query": "北京"}}'
# (answer, what is said, the calls: name and arguments)
CODE_CALL, SEARCH_CALL = ("python", {"code": "print(1)\nprint(2)"}), ("search", {"query": "北京"})
CASES = {
    "fence": (f"```json\n{CODE}\n```", "", [CODE_CALL]),
    "fence without a language": (f"```\n{CODE}\n```\n", "", [CODE_CALL]),
    "text around a fence": (f"I calculate.\n\n```json\n{CODE}\n```\nWait.", "I calculate.\n\nWait.", [CODE_CALL]),
    "two in a fence": (f"```json\n{CODE}\n{SEARCH}\n```", "", [CODE_CALL, SEARCH_CALL]),
    "a list": (f"```json\n[{CODE}, {SEARCH}]\n```", "", [CODE_CALL, SEARCH_CALL]),
    "two fences": (f"```json\n{CODE}\n```\n```json\n{SEARCH}\n```", "", [CODE_CALL, SEARCH_CALL]),
    "fence left open": (f"Now:\n```json\n{SEARCH}", "Now:\n", [SEARCH_CALL]),
    "bare": (f"  {SEARCH}\n", "", [SEARCH_CALL]),
    "bare list": (f"[{SEARCH}]", "", [SEARCH_CALL]),
    "tags not closed": (f"Yes. <tool_call>\n{SEARCH}\n<tool_call>", "Yes. ", [SEARCH_CALL]),
    "tags in a fence": (f"```\n<tool_call>{SEARCH}</tool_call>\n```", "", [SEARCH_CALL]),
    "line breaks inside a string": ('```json\n{"name": "python", "arguments": {"code": "a\nb"}}\n```', "",
                                    [("python", {"code": "a\nb"})]),
    "other names of the fields": ('{"tool": "search", "parameters": {"query": "x"}}', "", [("search", {"query": "x"})]),
    "OpenAI's shape": ('{"type": "function", "function": {"name": "search", "arguments": "{\\"query\\": 1}"}}', "",
                       [("search", {"query": 1})]),
    "a fence of another language": ("```python\nprint(1)\n```\nThat is it.", None, []),
    "JSON that is no call": ('```json\n{"name": "Ada", "age": 36}\n```', None, []),
    "a tool that is not there": ('```json\n{"name": "rm", "arguments": {}}\n```', None, []),
    "a call and more in the fence": (f"```json\n{CODE}\nand so on\n```", None, []),
    "an object in mid-text": (f"It is {SEARCH} here.", None, []),
    "broken JSON": ('{"name": "search", "arguments": {"query": ', None, []),
    "fences, code, text": ("Use `x`:\n\n```\ncode\n```\n\n- a\n- b\n\n```sh\nls\n```\n", None, []),
    "ticks at the end": ("a ``", None, []),
    "a text of Python in the JSON": (f"```json\n{QUOTED}\n```", "", [CODE_CALL]),
    "three quotes in a text": ('{"name": "python", "arguments": {"code": "\\"\\"\\"x"}}', "",
                               [("python", {"code": '"""x'})]),
    "three quotes and no JSON": ('```json\n{"name": "python", "arguments": {"code": """x"""\n```', None, []),
    "doubled braces": ("{" + SEARCH + "}", "", [SEARCH_CALL]),
    "a brace too many": (SEARCH + "}\n", "", [SEARCH_CALL]),
    "doubled braces and more": ("{" + CODE + "}\n\nThat is 1.", "", [CODE_CALL]),
    "a call and what it may give": (f"{SEARCH}\nIt is a city.", "", [SEARCH_CALL]),
    "a tool that is not there, with arguments": ('```json\n{"name": "get_mayor", "arguments": {"city": "x"}}\n```', "",
                                                 [("get_mayor", {"city": "x"})]),
    "a thing with a name and more": ('{"name": "get_mayor", "arguments": {"city": "x"}, "born": 1}', None, []),
    "a name that none can be": ('{"name": "Ada Lovelace", "arguments": {"for": "x"}}', None, []),
    "indented fence": (f"- so:\n  ```json\n  {SEARCH}\n  ```\n", "- so:\n", [SEARCH_CALL]),
    "nothing": ("", "", []),
    "arguments that are no object": ('{"name": "search", "arguments": [1]}', None, []),
}  # fmt: skip


def through(pieces: list[str], tools: list[ToolSpec]) -> tuple[str, list[tuple[str, object]]]:
    found = CallFilter(tools)
    text = "".join(found.feed(piece) for piece in pieces) + found.finish()
    return text, [(c.name, json.loads(c.arguments)) for c in found.calls]


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    answer, text, calls = CASES[name]
    assert through([answer], TOOLS) == (answer if text is None else text, calls)
    assert through(list(answer), TOOLS) == (answer if text is None else text, calls)
    assert through([answer], []) == (answer, []), "without tools nothing is a call"


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(1, 30), max_size=40))
def test_every_cut_gives_the_same(name: str, sizes: list[int]) -> None:
    answer, text, calls = CASES[name]
    pieces, at = [], 0
    for size in sizes:
        pieces.append(answer[at : at + size])
        at += size
    assert through([*pieces, answer[at:]], TOOLS) == (answer if text is None else text, calls)


@given(st.text(alphabet='`{}[]"\n <tol_ca>json:x', max_size=60), st.integers(1, 7))
def test_text_is_never_lost(answer: str, size: int) -> None:
    """What names no tool comes out as it went in."""
    assert through([answer[i : i + size] for i in range(0, len(answer), size)], TOOLS) == (answer, [])


def test_plain_text_is_shown_at_once() -> None:
    found = CallFilter(TOOLS)
    assert found.feed("Hello, `you`") == "Hello, `you`"
    assert found.feed(" there\nand") == " there\nand"
    assert found.feed("\n```py") == "\n"
    assert found.feed("thon\nx") == "```python\nx", "no call begins like this"


def test_deeply_nested_json_is_text() -> None:
    assert read_calls("[" * 100_000, TOOLS) == []


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("I compute:\n```python\nx = 2\nprint(x)\n```\n", "x = 2\nprint(x)"),
        ("```py\nprint(1)\n```", "print(1)"),
        ("```sh\nls\n```\n```Python\nprint(1)\n```", "print(1)"),
        ("```python\nprint(1)\n```\nIt prints 1.", "print(1)"),
        ("```python\nprint(1)\n```\nor\n```python\nprint(2)\n```", "print(2)"),
        ("```python\nprint(1)\n```\nor\n```python\nprint(2)\n```\nYou choose.", None),
        ("```python\nx = 2\n```", None),
        ("```python\nprint(1)", None),
        ("```sh\nprint(1)\n```", None),
        ("print(1)", None),
    ],
)
def test_a_program_at_the_end(answer: str, code: str | None) -> None:
    found = final_program(answer)
    assert (found and found[1]) == code and (found is None or answer.startswith(found[0] + "```"))


def test_a_question_for_code_is_known_by_its_words() -> None:
    assert asks_for_code("Write a function that adds") and asks_for_code("How do I read a file?")
    assert asks_for_code("写一段代码") and asks_for_code("怎么读文件？")
    assert not asks_for_code("What is 7 times 8?") and not asks_for_code("7乘以8等于多少？")
