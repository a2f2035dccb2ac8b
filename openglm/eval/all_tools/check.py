"""Whether a task was done: the final number, the words of the answer, the calls that were made, the page cited.

final_number("So it is 1,234 in all.\\nAnswer: 1,234")      # '1234'
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from openglm.eval.all_tools.functions import canonical
from openglm.eval.all_tools.suite import AllToolsTask, ExpectedCall

__all__ = ["Verdict", "call_matches", "final_number", "judge", "says"]

EFFECTS = ("book_table", "set_reminder")  # functions that do something: a wrong call is not mended by a right one
LONG = 5  # digits of a number that does not stand in an answer by chance
MARK = re.compile(r"answer\s*(?:is|:)|答案(?:是|为|:)|####|\\boxed\{", re.I)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.I)
SEPARATOR = re.compile(r"(?<=\d)(?:,|_|\\,|\{,\}|[ '](?=\d{3}(?:[ '.]|\D|$)))(?=\d{3}(?!\d))")


@dataclass(frozen=True)
class Verdict:
    """answered: the answer itself is right. called, cited: of tasks that ask for calls or a source, else None."""

    answered: bool
    called: bool | None = None
    cited: bool | None = None

    @property
    def correct(self) -> bool:
        return self.answered and self.called is not False and self.cited is not False


def judge(
    task: AllToolsTask, answer: str, calls: Sequence[tuple[str, str]] | None, cited: Sequence[str] = ()
) -> Verdict:
    """calls: (name, arguments as JSON) of all that ran without an error; None where no tools were given, and then the
    answer alone counts. cited: paths of the pages that the answer cites.
    """
    answered = _right_number(answer, task.number) if task.number is not None else says(answer, task.contains)
    if calls is None:
        return Verdict(answered)
    called = None
    if task.group == "none":
        called = not calls
    elif task.calls:
        called = _all_made(task.calls, calls)
    return Verdict(answered, called, any(path in task.sources for path in cited) if task.sources else None)


# -------------------------------------------------------------------- text


def _plain(text: str) -> str:
    """Full-width forms, case and separators of thousands do not count."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("\u2009", " ").lower()
    return SEPARATOR.sub("", text)


def says(answer: str, contains: Sequence[Sequence[str]]) -> bool:
    """Whether one alternative of each entry stands in the answer, whatever its spaces, with no digits beside it."""
    text = _plain(answer)
    return all(any(_stands(text, _plain(word)) for word in entry) for entry in contains)


def _stands(text: str, word: str) -> bool:
    pattern = r"\s*".join(map(re.escape, re.sub(r"\s", "", word)))
    before = r"(?<!\d)(?<!\d\.)" if word[:1].isdigit() else ""
    after = r"(?!\d|\.\d*[1-9])" if word[-1:].isdigit() else ""
    return re.search(before + pattern + after, text) is not None


def final_number(answer: str) -> str | None:
    """The number after the last "Answer:", "答案：", #### or \\boxed{ in its line (behind an equals sign, if there is
    one), else the last one of all.
    """
    text = _plain(answer).replace("**", "").replace("$", "")
    for mark in reversed(list(MARK.finditer(text))):
        line = text[mark.end() :].lstrip().split("\n", 1)[0]
        if found := NUMBER.search(line.rpartition("=")[2]) or NUMBER.search(line):
            return found.group()
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _right_number(answer: str, number: str) -> bool:
    """A long number is right wherever it stands, a short one only as the result."""
    return says(answer, [[number]]) if len(number) >= LONG and number.isdigit() else says_number(answer, number)


def says_number(answer: str, number: str) -> bool:
    """Exact for whole numbers; to half of the last decimal that the reference has for others."""
    found = final_number(answer)
    if found is None:
        return False
    expected, got = Decimal(number), Decimal(found)
    exponent = expected.as_tuple().exponent
    assert isinstance(exponent, int)
    return abs(got - expected) <= (Decimal(5).scaleb(exponent - 1) if exponent < 0 else 0)


# -------------------------------------------------------------------- calls


def _all_made(expected: Sequence[ExpectedCall], calls: Sequence[tuple[str, str]]) -> bool:
    """Each expected call was made, and none with an effect beside them."""
    made = [(name, json.loads(arguments or "{}")) for name, arguments in calls]
    wrong = [
        name for name, arguments in made
        if name in EFFECTS and not any(call_matches(e, name, arguments) for e in expected)
    ]  # fmt: skip
    return not wrong and all(any(call_matches(e, *call) for call in made) for e in expected)


def call_matches(expected: ExpectedCall, name: str, arguments: Mapping[str, Any]) -> bool:
    if name != expected.name or set(arguments) != set(expected.arguments):
        return False
    return all(_same(value, arguments[key]) for key, value in expected.arguments.items())


def _same(expected: Any, given: Any) -> bool:
    if expected is None:
        return bool(given)
    if isinstance(expected, int | float):
        return isinstance(given, int | float) and abs(given - expected) <= 1e-6 * max(1.0, abs(expected))
    return isinstance(given, str) and canonical(given) == canonical(str(expected))
