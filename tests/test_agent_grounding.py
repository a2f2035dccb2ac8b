"""What a tool is given must have been said: numbers, codes and addresses that stand nowhere are found."""

from __future__ import annotations

from typing import Any

import pytest

from openglm.agent.grounding import made_up


@pytest.mark.parametrize(
    ("arguments", "known", "found"),
    [
        ({"amount": 1047, "to": "USD"}, "What does order A1047 cost?", {"amount": "1047"}),  # a part of a code is none
        ({"amount": 1047.0}, "I have 1,047 dollars.", {}),
        ({"amount": 58_400_000}, "58.4 million crowns", {}),  # the point does not count
        ({"rate": 0.037}, "3.7 % a year", {}),
        ({"n": 3, "page": "2", "deep": {"list": [7, 7301]}}, "three pages", {"deep.list": "7301"}),
        ({"id": "A1047"}, "order A1047", {}),
        ({"id": "a-1047"}, "order A1047", {}),
        ({"id": "B77"}, "order A1047", {"id": "B77"}),
        ({"to": "ana@example.com"}, "write to Ana", {"to": "ana@example.com"}),
        ({"to": "ana@example.com"}, '{"email":"ana@example.com"}', {}),
        ({"date": "2026-03-09", "at": "18:00"}, "on the ninth of March at six in the evening", {}),  # in other words
        ({"city": "Lisbon", "on": True, "none": None, "text": "Table 12, please"}, "里斯本", {}),
        ({"n": 1200}, "１２００元", {}),  # full-width digits
    ],
)
def test_arguments(arguments: dict[str, Any], known: str, found: dict[str, str]) -> None:
    assert made_up(arguments, known) == found


@pytest.mark.parametrize(
    ("code", "known", "found"),
    [
        ("feet = 164 / 0.3048", "164 metres", "0.3048"),
        ("feet = round(164 * 1000 / 60, 2)", "164 metres", ""),  # what clocks and decimals are made of
        ("price = 80 * 1.045 ** 30 * 0.875", "80 euros, 4.5 % more for 30 years, then 12.5 % less", ""),
        ("x1 = 5 # 1999\nprint('room 777', x1)", "5 rooms", ""),  # names, comments and texts are no numbers
        ('text = """\n444 pages\n"""\nprint(len(text))', "", ""),
        ("print(2288 * 2)", "order B2288", "2288"),
        ("import datetime\nd = datetime.date(1956, 5, 3)", "opened on 3 May 1956", ""),
        ("d = datetime.date(1987, 5, 3)", "opened on 3 May 1956", "1987"),
        ("big = 58_400_000 + 1e6", "58.4 million", ""),
    ],
)
def test_programs(code: str, known: str, found: str) -> None:
    assert made_up({"code": code}, known, code=True) == ({"code": found} if found else {})
