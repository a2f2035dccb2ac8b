"""What a model is shown: results of a search, a window of a page, places where words stand. Foreign text is framed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from openglm.agent.browser.citations import normalised
from openglm.agent.browser.frame import END, NOTICE, frame, neutral
from openglm.agent.browser.page import LINK, Page
from openglm.agent.browser.search import Found
from openglm.agent.browser.session import Session, View, host_of
from openglm.types import Observation

__all__ = ["closest_line", "matches", "show_page", "show_results"]

MAX_SNIPPET = 300
N_MATCHES = 8
LEAST_LIKENESS = 0.5


def show_results(session: Session, found: Found, query: str) -> Observation:
    """Numbered results, in the form that GLM-4 knows: # 【3†title†host】 and a snippet."""
    results: list[dict[str, Any]] = []
    lines: list[str] = []
    for number, hit in zip(session.results, found.hits, strict=True):
        source = session.sources[number]
        snippet = neutral(hit.snippet)[:MAX_SNIPPET]
        date = f" ({hit.date})" if hit.date else ""
        lines += [f"# 【{number}†{source.title}†{neutral(host_of(hit.url))}】{date}", *([snippet] if snippet else [])]
        results.append({"source": number, "url": hit.url, "title": source.title, "snippet": snippet, "date": hit.date})
    data = {
        "kind": "search", "query": query, "backend": found.backend, "failed": dict(found.failed), "results": results,
        "partial": found.partial, "sources": [session.sources[number].as_data() for number in session.results],
    }  # fmt: skip
    if not results:
        failed = "".join(f" ({reason})" for reason in found.failed.values())
        return Observation(f"Nothing was found for {query[:200]!r}. Try other or fewer words.{failed}", data=data)
    head = f"{len(results)} results."
    if found.partial:
        head = f"Nothing was found for all of {query[:200]!r}; these pages have a part of it."
    text = "\n".join([f"{head} Open one by its number.", NOTICE, *lines, END])
    return Observation(text, data=data)


def show_page(session: Session, view: View, room: int) -> Observation:
    """Lines from view.first on, as many as fit; sets view.last."""
    assert view.source is not None, "only a page can be shown"
    page, source = session.pages[view.source], session.sources[view.source]
    view.last = _last(page.lines, view.first, room)
    head = [f"【{source.number}†{source.title}】 {neutral(page.url)}"]
    total = len(page.lines)
    facts = [f"lines {view.first}-{view.last} of {total}"] if total else ["no text"]
    facts += [f"{name} {value}" for name, value in (("dated", page.date), ("language", page.language)) if value]
    head.append(", ".join(facts) + (f". Note: {neutral(page.note)}" if page.note else ""))
    body = frame(page.lines[view.first - 1 : view.last], view.first)
    more = [f"{total - view.last} more lines: scroll, or find words in the page."] if view.last < total else []
    data = {
        "kind": "page", "source": source.number, "url": page.url, "title": source.title, "language": page.language,
        "date": page.date, "type": page.kind, "note": page.note, "first": view.first, "last": view.last,
        "n_lines": total, "sources": [source.as_data()],
    }  # fmt: skip
    return Observation("\n".join([*head, body, *more]), data=data)


def _last(lines: Iterable[str], first: int, room: int) -> int:
    """The last line that fits, the first one in any case."""
    size, last = 0, 0
    for number, line in enumerate(lines, 1):
        last = number
        if number < first:
            continue
        size += len(line) + 6
        if size > room and number > first:
            return number - 1
    return last


def matches(session: Session, view: View, page: Page, text: str, room: int) -> Observation:
    """The places where words stand; if they do not stand together, lines that hold all of them."""
    wanted = normalised(text)
    plain = [normalised(LINK.sub(r"\1", line)) for line in page.lines]
    found = [n for n, line in enumerate(plain, 1) if wanted and wanted in line]
    found = found or [n for n in range(1, len(plain)) if wanted and wanted in plain[n - 1] + plain[n]]
    words = [normalised(word) for word in text.split()]
    if not found and len(words) > 1:
        found = [n for n, line in enumerate(plain, 1) if all(word in line for word in words)]
    assert view.source is not None, "only in a page"
    source = session.sources[view.source]
    data = {"kind": "find", "source": source.number, "url": page.url, "title": source.title, "text": text,
            "lines": found, "sources": [source.as_data()]}  # fmt: skip
    if not found:
        return Observation(f"{text[:200]!r} does not stand in this page. Try one word of it, or others.", data=data)
    shown: list[str] = []
    for n in found[:N_MATCHES]:
        lines = [f"L{i}: {neutral(page.lines[i - 1])}" for i in range(max(n - 1, 1), min(n + 1, len(plain)) + 1)]
        if sum(map(len, shown)) + sum(map(len, lines)) > room and shown:
            break
        shown += [*lines, "--"]
    view.first, view.last = found[0], found[0] - 1  # from there scrolling goes on
    head = f"{len(found)} {'place' if len(found) == 1 else 'places'} in 【{source.number}†{source.title}】"
    return Observation("\n".join([head, NOTICE, *shown[:-1], END]), data=data)


def closest_line(page: Page, text: str) -> str:
    """The line most like a text, framed; nothing if none is like it."""
    wanted = normalised(text)
    best, likeness = "", LEAST_LIKENESS
    for number, line in enumerate(page.lines, 1):
        matcher = difflib.SequenceMatcher(None, wanted[:400], normalised(line)[:400], autojunk=False)
        if matcher.real_quick_ratio() > likeness and matcher.quick_ratio() > likeness and matcher.ratio() > likeness:
            best, likeness = f"L{number}: {neutral(line)}", matcher.ratio()
    return f"\n{NOTICE}\n{best}\n{END}" if best else ""
