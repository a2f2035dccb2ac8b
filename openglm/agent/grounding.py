"""Whether what a tool is given was said by anybody: numbers, codes and addresses that stand in no text are made up.

    made_up({"amount": 1047.0, "target": "USD"}, "What does order A1047 cost in dollars?")    # {'amount': '1047.0'}
    made_up({"code": "print(164 / 0.3048)"}, "It is 164 metres long.", code=True)             # {'code': '0.3048'}

Only what a text can be searched for is judged: a name may be translated, a date written otherwise. A number counts as
said where its digits were, whatever its decimal point (58.4 million, 3.7 %) and whether 1 was added to it or it was
taken from 1 (a price after a discount).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

__all__ = ["made_up"]

SMALL = 20  # whole numbers up to here may be words, or places in a list
# Of calendars, clocks, percentages and powers of ten: they need not be said.
USUAL = frozenset((*range(SMALL + 1), 24, 28, 29, 30, 31, 52, 60, 90, 180, 360, 365, 366, 3600, 86400))
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?(?![A-Za-z0-9_])|(?<![\w.])\.\d+(?!\w)")
SEPARATOR = re.compile(r"(?<=\d)[,，'](?=\d{3}(?!\d))")
TIME = re.compile(r"[\d\s:/.,TZ+-]*")  # dates, times and the like, which a text may say in other words
TEXTS = re.compile(r"\"\"\".*?\"\"\"|'''.*?'''|\"[^\"\n]*\"|'[^'\n]*'|#[^\n]*", re.DOTALL)  # of a program


def made_up(arguments: Mapping[str, Any], known: str, code: bool = False) -> dict[str, str]:
    """The arguments that hold what `known` does not, each with what that is.

    code: the texts among them are programs: numbers are looked for that stand outside of their texts and comments.
    """
    text = _plain(known)
    said = {_digits(n) for n in NUMBER.findall(text)}
    found: dict[str, str] = {}
    for name, value in _leaves(arguments):
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int | float):
            wrong = [str(value)] if not _said(str(value), said, abs(value) <= SMALL and value == int(value)) else []
        elif code:
            numbers = NUMBER.findall(TEXTS.sub(" ", value))
            wrong = [n for n in numbers if not _said(n, said, _is_usual(n))]
        else:
            wrong = [value] if _is_code(value) and _squeezed(value) not in _squeezed(text) else []
        if wrong:
            found[name] = wrong[0]
    return found


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, name)
    else:
        yield name, value


def _said(number: str, said: set[str], is_usual: bool) -> bool:
    if is_usual or _digits(number) in said:
        return True
    try:
        value = Decimal(number.replace("_", ""))
    except InvalidOperation:
        return True
    return 0 < value < 2 and _digits(format(abs(1 - value), "f")) in said


def _is_usual(number: str) -> bool:
    value = float(number.replace("_", ""))
    return value in USUAL or _digits(number) in ("", "1") or number in ("0.5", ".5")


def _digits(number: str) -> str:
    """Of a number, without what a power of ten changes."""
    try:
        digits = "".join(map(str, Decimal(number.replace("_", "")).as_tuple().digits))
    except InvalidOperation:
        return number
    return digits.strip("0")


def _is_code(text: str) -> bool:
    """Whether a text is a code or an address, which nobody writes in another way: one word with a digit or an @."""
    word = text.strip()
    return bool(re.search(r"\d|@", word)) and not re.search(r"\s", word) and TIME.fullmatch(word) is None and (
        word.isascii() and len(word) <= 100
    )  # fmt: skip


def _plain(text: str) -> str:
    return SEPARATOR.sub("", unicodedata.normalize("NFKC", text))


def _squeezed(text: str) -> str:
    return re.sub(r"[\s_-]", "", text).lower()
