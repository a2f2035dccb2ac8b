"""Integers and decimals between bounds, as EBNF in the notation of xgrammar.

    python -m pytest -q tests/test_grammar.py

Bounds are compared digit by digit, as a reader of the text would: no rounding is involved.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

__all__ = ["INTEGER", "NUMBER", "Bound", "integer_between", "number_between"]

INTEGER = '"-"? ("0" | [1-9] [0-9]*)'
NUMBER = INTEGER + ' ("." [0-9]+)? ([eE] [+-]? [0-9]{1,2})?'
_MORE_DECIMALS = 6  # that a number between bounds may have beyond those of its bounds


@dataclass(frozen=True)
class Bound:
    value: Decimal
    strict: bool = False  # the value itself is out


def _either(branches: list[str]) -> str:
    return branches[0] if len(branches) == 1 else "(" + " | ".join(branches) + ")"


def _some_digits(least: int, most: int | None) -> str:
    if most == least:
        return "" if not least else "[0-9]" if least == 1 else f"[0-9]{{{least}}}"
    return f"[0-9]{{{least},{'' if most is None else most}}}"


def _digit(low: int, high: int) -> str:
    return f'"{low}"' if low == high else f"[{low}-{high}]"


def _natural(low: int, high: int | None) -> list[str]:
    """Branches of the integers low..high, of 0 or more; no leading zeros."""
    if high is not None and low > high:
        return []
    if low == 0:
        return ['"0"', *_natural(1, high)] if high != 0 else ['"0"']
    n = len(str(low))
    out = _equally_long(str(low), str(high) if high is not None and len(str(high)) == n else "9" * n)
    longest = None if high is None else len(str(high))
    if longest is None:
        out.append("[1-9] " + _some_digits(n, None))
    elif longest > n:
        if longest > n + 1:
            out.append("[1-9] " + _some_digits(n, longest - 2))
        out += _equally_long("1" + "0" * (longest - 1), str(high))
    return out


def _equally_long(low: str, high: str) -> list[str]:
    """Branches of the digit strings low..high of one length."""
    if not low:
        return [""]
    rest = len(low) - 1
    if low == "0" * len(low) and high == "9" * len(high):
        return [_some_digits(len(low), len(low))]
    a, b = int(low[0]), int(high[0])
    if a == b:
        return [f"{_digit(a, a)} {tail}".strip() for tail in _equally_long(low[1:], high[1:])]
    out = []
    if low[1:] != "0" * rest:
        out += [f"{_digit(a, a)} {tail}".strip() for tail in _equally_long(low[1:], "9" * rest)]
        a += 1
    top = [] if high[1:] == "9" * rest else [
        f"{_digit(b, b)} {tail}".strip() for tail in _equally_long("0" * rest, high[1:])
    ]  # fmt: skip
    b -= bool(top)
    if a <= b:
        out.append(f"{_digit(a, b)} {_some_digits(rest, rest)}".strip())
    return out + top


def integer_between(low: Bound | None, high: Bound | None) -> str:
    """EBNF of the integers within bounds; ValueError when there are none."""
    a = None if low is None else int(low.value.to_integral_value(ROUND_CEILING))
    b = None if high is None else int(high.value.to_integral_value(ROUND_FLOOR))
    a = a + 1 if low is not None and a is not None and low.strict and a == low.value else a
    b = b - 1 if high is not None and b is not None and high.strict and b == high.value else b
    branches = [] if b is not None and b < 0 else _natural(max(a or 0, 0), b)
    if a is None or a < 0:
        branches += [f'"-" {x}' for x in _natural(1 if b is None or b >= 0 else -b, None if a is None else -a)]
    if not branches:
        raise ValueError("no integer lies between minimum and maximum")
    return _either(branches)


def number_between(low: Bound | None, high: Bound | None) -> str:
    """EBNF of decimals within bounds, without exponents; ValueError when there are none."""
    branches = [] if high is not None and high.value < 0 else _decimals(low, high)
    if low is None or low.value < 0:
        mirrored = [None if x is None else Bound(-x.value, x.strict) for x in (high, low)]
        branches += [f'"-" {x}' for x in _decimals(*mirrored)]
    if not branches:
        raise ValueError("no number lies between minimum and maximum")
    return _either(branches)


def _split(value: Decimal) -> tuple[int, str]:
    """Integer part and decimals, without zeros at the end."""
    whole, _, decimals = f"{value:f}".partition(".")
    return int(whole), decimals.rstrip("0")


def _decimals(low: Bound | None, high: Bound | None) -> list[str]:
    """Branches of the decimals of 0 or more within bounds."""
    low = Bound(Decimal(0)) if low is None or low.value < 0 else low
    first, first_decimals = _split(low.value)
    last, last_decimals = (None, "") if high is None else _split(high.value)
    if high is not None and (low.value > high.value or (low.value == high.value and (low.strict or high.strict))):
        return []
    room = max(len(first_decimals), len(last_decimals)) + _MORE_DECIMALS
    above = _fraction_above(first_decimals, low.strict, room)
    if last is None:
        return [f'"{first}" {above}', *_with_decimals(_natural(first + 1, None), room)]
    assert high is not None
    below = _fraction_below(last_decimals, high.strict, room)
    if first == last:
        both = _fraction_within(first_decimals, low.strict, last_decimals, high.strict, room)
        return [f'"{first}" {x}'.strip() for x in both]
    out = [f'"{first}" {above}', *_with_decimals(_natural(first + 1, last - 1), room)]
    return out if below is None else [*out, f'"{last}" {below}'.strip()]


def _with_decimals(branches: list[str], room: int) -> list[str]:
    return [f'{x} ("." [0-9]{{1,{room}}})?' for x in branches]


def _fraction_above(bound: str, strict: bool, room: int) -> str:
    """What follows an integer so that the decimals are at least `bound` (or above it); nothing counts as zeros."""
    if not bound and not strict:
        return f'("." [0-9]{{1,{room}}})?'
    return f'"." {_either(_at_least(bound, strict, room))}'


def _fraction_below(bound: str, strict: bool, room: int) -> str | None:
    """What follows an integer so that the decimals are at most `bound` (or below it); None: nothing can."""
    if not bound:
        return None if strict else f'("." "0"{{1,{room}}})?'
    return f'("." {_either(_at_most(bound, strict, room))})?'


def _fraction_within(low: str, low_strict: bool, high: str, high_strict: bool, room: int) -> list[str]:
    """Both at once, of the same integer: digits that are equal first, then the place where the bounds part."""
    width = max(len(low), len(high))
    a, b = low.ljust(width, "0"), high.ljust(width, "0")
    same = next((i for i in range(width) if a[i] != b[i]), width)
    shared = " ".join(f'"{d}"' for d in a[:same])
    if same == width:  # one number only
        return [f'"." {shared} "0"{{0,{room - width}}}' if shared else f'("." "0"{{1,{room}}})?']
    x, y, rest = int(a[same]), int(b[same]), room - same - 1
    branches = []
    tail_low, tail_high = a[same + 1 :].rstrip("0"), b[same + 1 :].rstrip("0")
    branches += [f'"{x}" {t}' for t in _at_least(tail_low, low_strict, rest, may_be_empty=True)]
    if y - x > 1:
        branches.append(f"{_digit(x + 1, y - 1)} [0-9]{{0,{rest}}}")
    branches += [f'"{y}" {t}'.strip() for t in _at_most(tail_high, high_strict, rest, may_be_empty=True)]
    out = [f'"." {shared} {branch}' for branch in branches]
    if not a[same:].strip("0") and not low_strict:  # the lower bound itself ends before that place
        out += ([f'"." {shared}'] if shared else []) + ([] if a.strip("0") else [""])
    return out


def _at_least(bound: str, strict: bool, room: int, may_be_empty: bool = False) -> list[str]:
    """Digit strings d of at most `room` with 0.d at least 0.bound (or above)."""
    if not bound:
        if not strict:
            return [f"[0-9]{{{0 if may_be_empty else 1},{room}}}"]
        return [f'"0"{{0,{room - 1}}} [1-9] [0-9]{{0,{room - 1}}}']
    d = int(bound[0])
    out = [f'"{d}" {x}' for x in _at_least(bound[1:], strict, room - 1, may_be_empty=True)]
    return [*out, f"{_digit(d + 1, 9)} [0-9]{{0,{room - 1}}}"] if d < 9 else out


def _at_most(bound: str, strict: bool, room: int, may_be_empty: bool = False) -> list[str]:
    """Digit strings d of at most `room` with 0.d at most 0.bound (or below)."""
    if not bound:
        return [] if strict else [f'"0"{{{0 if may_be_empty else 1},{room}}}']
    d = int(bound[0])
    out = [f'"{d}" {x}' for x in _at_most(bound[1:], strict, room - 1, may_be_empty=True)]
    if d > 0:
        out.append(f"{_digit(0, d - 1)} [0-9]{{0,{room - 1}}}")
    return [*out, '""'] if may_be_empty else out
