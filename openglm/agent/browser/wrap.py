"""Breaks paragraphs into lines of a bearable width, at the ends of sentences where it can, for English and Chinese."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

__all__ = ["columns", "join", "wrap"]

WIDTH = 160  # columns; Chinese characters take two
SENTENCE = re.compile(r"(?<=[.!?;])[\"')\]]*\s+|(?<=[。！？；])[”’」』）]*")
WIDE = re.compile(r"[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\uffe0-\uffe6]")


def columns(text: str) -> int:
    return len(text) + len(WIDE.findall(text)) if not text.isascii() else len(text)


def wrap(text: str) -> list[str]:
    """Pieces of one line; [""] for an empty one. Spaces where it breaks are dropped."""
    if columns(text) <= WIDTH:
        return [text]
    lines: list[str] = []
    current = ""
    for piece in _pieces(text):
        if current and columns(current) + columns(piece) > WIDTH:
            lines.append(current.rstrip())
            current = ""
        current += piece if current else piece.lstrip()
    return [*lines, current.rstrip()] if current.strip() else lines


def _pieces(text: str) -> Iterable[str]:
    """Sentences; of long ones, words and Chinese characters; of long words, bits. Links stay whole where they fit."""
    ends = [0, *(match.end() for match in SENTENCE.finditer(text)), len(text)]
    for begin, end in zip(ends, ends[1:], strict=False):
        sentence = text[begin:end]
        if columns(sentence) <= WIDTH:
            yield sentence
            continue
        for word in re.findall(r"\[[^\[\]]{0,100}\]\(\d+\)\S?|[^\S\n]+|[^\s\u2e80-\uffef]+|[\u2e80-\uffef]", sentence):
            yield from (word[i : i + WIDTH // 2] for i in range(0, len(word), WIDTH // 2))


def join(lines: Iterable[str]) -> str:
    """Lines as one text again: with a space between them, but not between Chinese characters."""
    out = ""
    parts: list[str] = []
    for line in lines:
        line = line.strip()
        if not line:
            continue
        last = parts[-1][-1] if parts else ""
        parts.append(line if not parts or (_is_wide(last) and _is_wide(line[0])) else " " + line)
    out = "".join(parts)
    return out


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"
