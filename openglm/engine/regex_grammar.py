"""Regular expressions as EBNF, in the notation of xgrammar: every construct is translated exactly or refused.

    python -m pytest -q tests/test_grammar.py

An expression describes the whole text, as `re.fullmatch`. \\d, \\w and \\s stand for ASCII, so that Python and
ECMAScript agree that the text matches; their negations leave out what either counts among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

__all__ = ["Ranges", "char_class", "literal", "regex_to_ebnf"]

Ranges = tuple[tuple[int, int], ...]  # code points, both ends included, upwards and apart

ALL: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))  # what UTF-8 can hold
_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
_LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
_CONTROL = {"n": 0x0A, "t": 0x09, "r": 0x0D, "f": 0x0C, "v": 0x0B, "0": 0x00}
_MAX_REPEAT = 10_000


def united(parts: Iterable[tuple[int, int]]) -> Ranges:
    out: list[tuple[int, int]] = []
    for low, high in sorted(parts):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


def without(ranges: Ranges, removed: Ranges) -> Ranges:
    out = list(ranges)
    for low, high in removed:
        out = [
            part
            for a, b in out
            for part in ((a, min(b, low - 1)), (max(a, high + 1), b))
            if part[0] <= part[1]
        ]  # fmt: skip
    return united(out)


@cache
def _outside(kind: str) -> Ranges:
    """Code points that neither Python nor ECMAScript counts among the digits, word characters or blanks."""
    belongs: Callable[[str], bool]
    belongs = {"D": str.isdecimal, "W": lambda c: c.isalnum() or c == "_", "S": str.isspace}[kind]
    inside = united((i, i) for low, high in ALL for i in range(low, high + 1) if belongs(chr(i)))
    return without(ALL, united([*inside, *([*_SPACE, (0xFEFF, 0xFEFF)] if kind == "S" else [])]))


def _escaped(code: int) -> str:
    char = chr(code)
    if char.isascii() and char.isalnum():
        return char
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def literal(text: str) -> str:
    """A text as an EBNF string. Raises ValueError for lone surrogates, which no UTF-8 text holds."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{text!r} holds half of a surrogate pair, which no text can spell")
    return '"' + "".join(_escaped(ord(c)) for c in text) + '"'


def char_class(ranges: Ranges) -> str:
    """One character of these ranges, as EBNF."""
    return "[" + "".join(_escaped(a) if a == b else f"{_escaped(a)}-{_escaped(b)}" for a, b in ranges) + "]"


def regex_to_ebnf(pattern: str, leaf: Callable[[Ranges], str] = char_class) -> str:
    """An EBNF expression of what matches. leaf: how one character of given ranges is spelled in the text.

    Raises ValueError naming the construct for what a grammar cannot say, and for a damaged expression.
    """
    return _Parser(pattern, leaf).parse()


class _Parser:
    """Recursive descent: alternatives > sequence > repeated atom."""

    def __init__(self, pattern: str, leaf: Callable[[Ranges], str]) -> None:
        self.pattern, self.leaf, self.at, self.depth = pattern, leaf, 0, 0

    def parse(self) -> str:
        out = self._alternatives()
        if self.at < len(self.pattern):
            raise self._error("an unmatched )")
        return out

    def _error(self, what: str) -> ValueError:
        return ValueError(f"regular expression {self.pattern!r}: {what} at position {self.at} is not supported")

    def _peek(self, n: int = 1) -> str:
        return self.pattern[self.at : self.at + n]

    def _take(self) -> str:
        if self.at >= len(self.pattern):
            raise ValueError(f"regular expression {self.pattern!r} ends too early")
        self.at += 1
        return self.pattern[self.at - 1]

    def _alternatives(self) -> str:
        branches = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else "(" + " | ".join(branches) + ")"

    def _sequence(self) -> str:
        """Anchors are taken where they say nothing new: at the ends of a branch that is not in a group."""
        parts: list[str] = []
        while self._peek() == "^" and not self.depth and not parts:
            self.at += 1
        while (char := self._peek()) and char not in "|)":
            if char == "$" and not self.depth and self.pattern[self.at + 1 : self.at + 2] in ("", "|", "$"):
                self.at += 1
            elif char in "^$":
                raise self._error(f"{char} in the middle")
            else:
                parts.append(self._repeated())
        return " ".join(parts) or '""'

    def _repeated(self) -> str:
        atom = self._atom()
        char = self._peek()
        counted = self._count() if char == "{" else None
        if counted is not None:
            out = f"({atom}){counted}"
        elif char and char in "*+?":
            self.at += 1
            out = f"({atom}){char}"
        else:
            return atom
        if self._peek() == "?":  # lazy: the same texts
            self.at += 1
        if self._peek() and self._peek() in "*+?":
            raise self._error("a repeated repetition")
        return out

    def _count(self) -> str | None:
        """{m}, {m,} or {m,n}; None where the brace is an ordinary character."""
        end = self.pattern.find("}", self.at)
        low, comma, high = self.pattern[self.at + 1 : max(end, 0)].partition(",")
        if not low.isdecimal() or (high and not high.isdecimal()):
            return None
        if (high and int(high) < int(low)) or max(int(low), int(high or 0)) > _MAX_REPEAT:
            raise self._error(f"the count {{{low}{comma}{high}}}")
        self.at = end + 1
        return f"{{{int(low)}{comma}{int(high) if high else ''}}}"

    def _atom(self) -> str:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return self._leaf(self._set())
        if char == ".":
            return self.leaf(without(ALL, _LINE_ENDS))
        if char == "\\":
            return self._leaf(self._escape(in_set=False))
        if char in "*+?":
            self.at -= 1
            raise self._error(f"{char} without anything to repeat")
        return self._leaf(((ord(char), ord(char)),))

    def _leaf(self, ranges: Ranges) -> str:
        ranges = without(ranges, ((0xD800, 0xDFFF),))
        if not ranges:
            raise self._error("a set without characters")
        return self.leaf(ranges)

    def _group(self) -> str:
        if self._peek() == "?":
            self.at += 1
            if self._peek() == ":":
                self.at += 1
            elif self._peek(2) == "P<" or (self._peek() == "<" and self._peek(2) not in ("<=", "<!")):
                end = self.pattern.find(">", self.at)
                if end < 0:
                    raise self._error("a group name without an end")
                self.at = end + 1
            else:
                looks = self._peek() in ("=", "!") or self._peek(2) in ("<=", "<!")
                raise self._error("looking ahead or behind" if looks else f"(?{self._peek()}")
        self.depth += 1
        inner = self._alternatives()
        self.depth -= 1
        if self._take() != ")":
            raise self._error("a group without an end")
        return f"({inner})"

    def _set(self) -> Ranges:
        negated = self._peek() == "^"
        self.at += negated
        parts: list[tuple[int, int]] = []
        first = True
        while (char := self._take()) != "]" or first:
            first = False
            low = self._escape(in_set=True) if char == "\\" else ((ord(char), ord(char)),)
            if self._peek() == "-" and self._peek(2) not in ("-", "-]"):
                self.at += 1
                char = self._take()
                high = self._escape(in_set=True) if char == "\\" else ((ord(char), ord(char)),)
                if not len(low) == len(high) == 1 or not low[0][0] == low[0][1] <= high[0][0] == high[0][1]:
                    raise self._error("a range between these ends")
                low = ((low[0][0], high[0][0]),)
            parts += low
        return without(ALL, united(parts)) if negated else united(parts)

    def _escape(self, in_set: bool) -> Ranges:
        char = self._take()
        if char in "dws":
            return {"d": _DIGIT, "w": _WORD, "s": _SPACE}[char]
        if char in "DWS":
            return _outside(char)
        if char in "xu":
            n = 2 if char == "x" else 4
            digits = self._peek(n)
            if len(digits) < n or not all(c in "0123456789abcdefABCDEF" for c in digits):
                raise self._error(f"\\{char} without {n} hexadecimal digits")
            self.at += n
            return ((int(digits, 16), int(digits, 16)),)
        if char == "b" and in_set:
            return ((0x08, 0x08),)
        if char in _CONTROL and not (char == "0" and self._peek().isdecimal()):
            return ((_CONTROL[char], _CONTROL[char]),)
        if char.isalnum():
            raise self._error(f"\\{char}")
        return ((ord(char), ord(char)),)
