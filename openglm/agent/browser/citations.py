"""Citations: quotes are looked up in the pages they are said to be from, and marks in an answer become footnotes.

    found = footnotes(answer, sources)     # found.text: "... opened in 1911 [1]."; found.notes: [Source(3, url, title)]

The marks are those that GLM-4 writes, 【3†title】, and what models make of them: 【3】, [3†source], [3], [^3].
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openglm.agent.events import CallRecord

__all__ = [
    "Footnotes", "Source", "cited_by_overlap", "find_passage", "footnotes", "sources_in", "unverified_quotes",
]  # fmt: skip

# Corner marks always cite. Square brackets cite where their number is that of a source.
CORNER = re.compile(r"【\s*(\d{1,4})\s*(?:[†‡:：|]([^】]{0,200}))?】")
SQUARE = re.compile(
    r"(?<![\w\]\)`])[\[［]\s*(\^?)(\d{1,4}(?:\s*[,，]\s*\d{1,4})*)\s*(†[^\]］\n]{0,200})?[\]］](?![(:\[])"
)
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
QUOTES = re.compile(r"“([^”\n]{8,600})”|「([^」\n]{4,600})」|『([^』\n]{4,600})』|\"([^\"\n]{8,600})\"")
ELLIPSIS = re.compile(r"\s*(?:\[?(?:\.{3,}|…+)\]?)\s*")
UNKNOWN = "[?]"
LEAST_QUOTE = 4  # letters and digits; less stands in every page


@dataclass(frozen=True)
class Source:
    """A page that was found or read. number: by which the model knows it, through the whole conversation."""

    number: int
    url: str
    title: str

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Footnotes:
    """An answer with footnotes. notes: footnote n is notes[n - 1]. unknown: numbers that no source has, marked [?]."""

    text: str
    notes: tuple[Source, ...] = ()
    unknown: tuple[int, ...] = ()

    def as_data(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"[{n}] {note.title} {note.url}" for n, note in enumerate(self.notes, 1)]
        return "\n".join([self.text, "", *lines]) if lines else self.text


def sources_in(data: Iterable[Mapping[str, Any] | None]) -> dict[int, Source]:
    """The sources by number, from the `data` of the browser's observations, in the order in which they were made."""
    found: dict[int, Source] = {}
    for item in data:
        for entry in (item or {}).get("sources", ()):
            found[entry["number"]] = Source(entry["number"], entry["url"], entry["title"])
    return found


def footnotes(answer: str, sources: Mapping[int, Source] | Iterable[Source]) -> Footnotes:
    """Marks become [1], [2] ... in the order of their first use; the same page has one footnote. Code is left alone."""
    by_number = dict(sources) if isinstance(sources, Mapping) else {source.number: source for source in sources}
    notes: list[Source] = []
    unknown: list[int] = []

    def note(number: int) -> str:
        source = by_number.get(number)
        if source is None:
            if number not in unknown:
                unknown.append(number)
            return UNKNOWN
        at = next((n for n, known in enumerate(notes, 1) if known.url == source.url), 0)
        if not at:
            notes.append(source)
        return f"[{at or len(notes)}]"

    def square(match: re.Match[str]) -> str:
        numbers = [int(number) for number in re.findall(r"\d+", match.group(2))]
        if not match.group(3) and not all(number in by_number for number in numbers):
            return match.group(0)  # brackets of another kind
        return "".join(dict.fromkeys(map(note, numbers)))

    either = re.compile(f"{CORNER.pattern}|(?P<square>{SQUARE.pattern})")

    def replace(match: re.Match[str]) -> str:
        if match.group("square") is None:
            return note(int(match.group(1)))
        inner = SQUARE.match(answer_part, match.start())
        return square(inner) if inner is not None else match.group(0)

    parts = CODE.split(answer)
    for n in range(0, len(parts), 2):
        answer_part = parts[n]
        parts[n] = re.sub(r"(\[\d+\]|\[\?\])(?:\s*\1)+", r"\1", either.sub(replace, answer_part))
    return Footnotes("".join(parts), tuple(notes), tuple(unknown))


def normalised(text: str) -> str:
    """Letters and digits alone, in one form and in small letters: what counts of a quote."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if c.isalnum())


def find_passage(quote: str, page: str) -> bool:
    """Whether a quote stands in a page, but for spaces, punctuation, case. With dots in it, its parts in that order."""
    whole, at = normalised(page), 0
    parts = [part for part in map(normalised, ELLIPSIS.split(quote)) if part]
    if sum(map(len, parts)) < LEAST_QUOTE:
        return False
    for part in parts:
        found = whole.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def unverified_quotes(answer: str, pages: Mapping[int, str]) -> list[tuple[str, int]]:
    """Quotes of an answer with the source cited right behind them, where that page does not hold them.

    pages: the text of the pages that were read, by number of source; those that were not read verify nothing.
    """
    wrong: list[tuple[str, int]] = []
    for match in QUOTES.finditer(answer):
        cited = re.match(r"[\s.,;，。；）)]{0,3}", answer[match.end() :])
        rest = answer[match.end() + (cited.end() if cited else 0) :]
        mark = CORNER.match(rest) or SQUARE.match(rest)
        if mark is None:
            continue
        number = int(re.findall(r"\d+", mark.group(0))[0])
        quote = next(group for group in match.groups() if group)
        if not find_passage(quote, pages.get(number, "")):
            wrong.append((quote, number))
    return wrong


WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+")
NAME = re.compile(r"(?<=[\w,] )[A-Z][^\W\d_]{2,}")  # not where a sentence begins
CJK = re.compile(r"[\u3400-\u9fff]")
LEAST_OVERLAP = 0.6


def cited_by_overlap(answer: str, question: str, records: Iterable[CallRecord]) -> str:
    """The mark of the source that an answer without any mark is from, to be put behind it; nothing where none is.

    It is the page, or else the search result, that holds the most of what the answer says beyond the question, and at
    least 60 % of it: of its numbers, where it has any, else of its names, else of all its words. WebGLM (section 3.2)
    mended the citations of its training data by overlap too.
    """
    sources, shown = _shown(records)
    if not answer.strip() or not sources or CORNER.search(answer) or footnotes(answer, sources).notes:
        return ""
    known = _terms(question)
    new = _terms(answer) - known
    names = {name.casefold() for name in NAME.findall(answer)} - known
    new = {term for term in new if term[0].isdigit()} or names or new
    if not new:
        return ""
    best, number = 0.0, 0
    for n, (text, is_page) in shown.items():
        share = len(new & _terms(text)) / len(new)
        if (share, is_page) > (best, shown[number][1] if number else False):
            best, number = share, n
    return f"【{number}†{sources[number].title}】" if best >= LEAST_OVERLAP else ""


def _shown(records: Iterable[CallRecord]) -> tuple[dict[int, Source], dict[int, tuple[str, bool]]]:
    """The sources by number, and of each what the model saw: (text, whether it was opened)."""
    sources: dict[int, Source] = {}
    shown: dict[int, tuple[str, bool]] = {}
    for record in records:
        data = record.observation.data or {}
        found = sources_in([data])
        sources |= found
        for result in data.get("results", ()) if data.get("kind") == "search" else ():
            shown.setdefault(result["source"], (f"{result['title']} {result['snippet']}", False))
        if data.get("kind") != "search":
            for number in found:
                text = shown[number][0] if number in shown else ""
                shown[number] = (f"{text} {record.observation.content}", True)
    return sources, shown


def _terms(text: str) -> set[str]:
    """Numbers, words of three letters and more, and pairs of Chinese characters."""
    text = unicodedata.normalize("NFKC", text).casefold()
    terms: set[str] = set()
    for word in WORD.findall(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)):
        if CJK.search(word):
            terms |= {word[i : i + 2] for i in range(len(word) - 1)}
        elif word[0].isdigit() or len(word) > 2:
            terms.add(word)
    return terms
