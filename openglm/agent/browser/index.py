"""The local index: BM25 over passages of the documents in some folders, in English and Chinese, without any network.

    index = LocalIndex((Folder(Path("docs")),), max_bytes=8 << 20)
    hits, page = index.search("sandbox limits", 5), index.page("local://docs/TOOLS.md")

English words are taken in small letters without plural endings; Chinese, Japanese and Korean in overlapping pairs of
characters. Documents are read when the first search comes, and again when they change.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from openglm.agent.browser.config import INSTALL, Folder
from openglm.agent.browser.fetch import FetchError, Reply
from openglm.agent.browser.page import LINK, Page, read_page

__all__ = ["LocalHit", "LocalIndex", "own_docs", "tokens"]

TYPES = {".html": "text/html", ".htm": "text/html", ".pdf": "application/pdf", ".md": "text/plain",
         ".txt": "text/plain"}  # fmt: skip
PASSAGE_CHARS = 600
MAX_FILES = 20_000
COVERAGE = 0.5  # share of a query that the best hit must have
LIKE_THE_BEST = 0.6  # of that share, what each other one must have
WORDS = re.compile(r"[a-z0-9]+(?:[.'_-][a-z0-9]+)*|[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+")
STOP = frozenset(
    "a an and are as at be been but by can could did do does for from had has have how i if in into is it its me my of"
    " on or our please she he so tell than that the their them then there these they this to was we were what when"
    " where which who whom whose why will with would you your about any much many".split()
)
# Words of questions: they say nothing of what is asked for.
ASKING = re.compile(
    "请问|告诉我|什么时候|什么|多少|多久|哪里|哪个|哪些|哪一?[年天位种]|怎么|怎样|如何|为何|是谁|几点|是多|[吗呢的了是]"
)


def own_docs() -> tuple[Folder, ...]:
    """The documents of OpenGLM itself, where this copy of it has them."""
    folder = Path(__file__).parents[3] / "docs"
    return (Folder(folder),) if (folder / "ARCHITECTURE.md").is_file() else ()


def tokens(text: str) -> list[str]:
    """What a text is found by."""
    out: list[str] = []
    for word in WORDS.findall(text.lower()):
        if word[0] > "\x7f":
            out += pairs(word)
        elif word not in STOP:
            out += [_stem(part) for part in re.split(r"[.'_-]", word) if part and part not in STOP]
    return out


def pairs(word: str) -> list[str]:
    return [word[i : i + 2] for i in range(len(word) - 1)] or [word]


def query_parts(query: str) -> list[list[str]]:
    """A query as words; of Chinese, runs between the words of the question; each as the tokens it is found by."""
    plain = ASKING.sub(" ", query.lower())
    return [found for word in dict.fromkeys(WORDS.findall(plain)) if (found := tokens(word))]


def coverage(parts: Sequence[Sequence[str]], has: frozenset[str] | set[str]) -> float:
    """Share of a query that a text has: a word counts as two, of Chinese each character that stands in a pair found."""
    total = found = 0
    for part in parts:
        if part[0][0] <= "\x7f":
            total += 2 * len(part)
            found += 2 * sum(token in has for token in part)
        else:
            n_characters = len(part) + len(part[0]) - 1
            seen = {i + j for i, pair in enumerate(part) if pair in has for j in range(len(pair))}
            total += n_characters
            found += len(seen)
    return found / total if total else 0.0


def _stem(word: str) -> str:
    """Without the ending of a plural, a past or a going on: enough for both forms to meet."""
    for ending, least in (("ies", 5), ("ing", 6), ("ed", 5), ("es", 5), ("s", 4)):
        if word.endswith(ending) and len(word) >= least and not word.endswith("ss"):
            word = word[: -len(ending)] + ("y" if ending == "ies" else "")
            break
    return word.removesuffix("e") if len(word) > 4 else word


@dataclass(frozen=True)
class LocalHit:
    """A document that fits, with lines of its best passage."""

    url: str
    title: str
    snippet: str
    date: str


@dataclass(frozen=True)
class _Document:
    stamp: tuple[int, int]
    page: Page
    live: bool


class LocalIndex:
    """Searches folders. Documents above max_bytes, links out of a folder, and files that cannot be read are left out:
    `skipped` says which, and why. May be used from several threads.
    """

    def __init__(self, folders: Sequence[Folder], max_bytes: int) -> None:
        self.folders, self.max_bytes = tuple(folders), max_bytes
        self.skipped: dict[str, str] = {}
        self._documents: dict[str, _Document] = {}
        self._passages: list[tuple[str, str]] = []  # (url, text)
        self._engine: Any = None
        self._tokens: list[frozenset[str]] = []  # of each passage, and its title
        self._known: set[str] = set()
        self._lock = threading.Lock()

    @staticmethod
    def why_not() -> str:
        try:
            import bm25s  # noqa: F401
        except ImportError:
            return f"needs bm25s: {INSTALL}"
        return ""

    def page(self, url: str) -> Page | None:
        """A document of the folders by its address; None for others, and for those to be opened on the web."""
        with self._lock:
            if not self._documents:
                self._refresh()
            found = self._documents.get(url)
        return found.page if found is not None and not found.live else None

    def search(self, query: str, n_results: int) -> list[LocalHit]:
        """The best documents, each by its best passage; none where none has enough of the query's words."""
        with self._lock:
            self._refresh()
            parts = query_parts(query)
            asked = {token for part in parts for token in part}
            known = list(dict.fromkeys(token for part in parts for token in part if token in self._known))
            if self._engine is None or not known:
                return []
            scores = self._engine.get_scores(known)
            hits: dict[str, LocalHit] = {}
            best = 0.0
            for at in sorted(range(len(scores)), key=lambda n: -scores[n])[: 20 * n_results]:
                url, text = self._passages[at]
                if scores[at] <= 0 or url in hits:
                    continue
                document = self._documents[url]
                title = set(tokens(document.page.title))
                # A query that holds the whole title of a document is about it, whatever else it asks for.
                share = 1.0 if title and title <= asked else coverage(parts, set(tokens(text)) | title)
                best = max(best, share)
                if share >= LIKE_THE_BEST * max(best, COVERAGE):
                    snippet = _snippet(text, document.page.title, known)
                    hits[url] = LocalHit(url, document.page.title, snippet, document.page.date)
                if len(hits) == n_results:
                    break
            return list(hits.values()) if best >= COVERAGE else []

    def closest(self, query: str, n_results: int) -> list[LocalHit]:
        """Where `search` finds nothing: the documents that have the rarest of the query's words that any has."""
        with self._lock:
            self._refresh()
            known = {token for part in query_parts(query) for token in part} & self._known
            if self._engine is None or not known:
                return []
            having = {token: [n for n, words in enumerate(self._tokens) if token in words] for token in sorted(known)}
            rarest = min(having.values(), key=len)
            scores = self._engine.get_scores(sorted(known))
            hits: dict[str, LocalHit] = {}
            for at in sorted(rarest, key=lambda n: -scores[n]):
                url, text = self._passages[at]
                page = self._documents[url].page
                hits.setdefault(url, LocalHit(url, page.title, _snippet(text, page.title, sorted(known)), page.date))
            return list(hits.values())[:n_results]

    def _refresh(self) -> None:
        """Reads what is new or changed; builds the index again if anything is."""
        seen: dict[str, _Document] = {}
        changed = False
        for url, file, folder in self._files():
            try:
                status = file.stat()
            except OSError:
                continue
            stamp = (status.st_mtime_ns, status.st_size)
            known = self._documents.get(url)
            if known is not None and known.stamp == stamp:
                seen[url] = known
                continue
            page = self._read(url, file, status.st_size)
            changed = True
            seen[url] = _Document(stamp, page, folder.live)
        if changed or len(seen) != len(self._documents):
            self._documents = seen
            self._build()

    def _files(self) -> Iterator[tuple[str, Path, Folder]]:
        count = 0
        for folder in self.folders:
            root = folder.path.resolve()
            base = folder.url or f"local://{quote(root.name)}/"
            for file in sorted(root.rglob("*")):
                relative = file.relative_to(root)
                if file.suffix.lower() not in TYPES or any(part.startswith(".") for part in relative.parts):
                    continue
                if not file.is_file() or not file.resolve().is_relative_to(root):
                    continue
                count += 1
                if count > MAX_FILES:
                    self.skipped[str(folder.path)] = f"more than {MAX_FILES} files"
                    return
                yield base + quote(relative.as_posix()), file, folder

    def _read(self, url: str, file: Path, size: int) -> Page:
        name = file.name
        try:
            if size > self.max_bytes:
                raise FetchError(f"{size:,} bytes, more than {self.max_bytes:,}")
            reply = Reply(url, 200, file.read_bytes(), {"content-type": TYPES[file.suffix.lower()]})
            self.skipped.pop(str(file), None)
            return read_page(reply)
        except (OSError, FetchError) as error:
            self.skipped[str(file)] = str(error)
            return Page(url, name, (), note=f"cannot be read: {error}")

    def _build(self) -> None:
        import bm25s

        self._passages = [(url, text) for url, document in self._documents.items() for text in passages(document.page)]
        found = [tokens(f"{self._documents[url].page.title}\n{text}") for url, text in self._passages]
        self._tokens = [frozenset(words) for words in found]
        self._known = {token for words in found for token in words}
        self._engine = None
        if self._known:
            self._engine = bm25s.BM25()
            self._engine.index(found, show_progress=False)


def passages(page: Page) -> Iterator[str]:
    """The text of a page in pieces that begin where lines do; of links, the words."""
    piece: list[str] = []
    size = 0
    for line in page.lines:
        if line == "Other links of the page:":
            break
        heading = line.startswith("#") and size > PASSAGE_CHARS // 3
        if piece and (heading or size + len(line) > PASSAGE_CHARS):
            yield "\n".join(piece)
            piece, size = [], 0
        piece.append(LINK.sub(r"\1", line))
        size += len(line)
    if size:
        yield "\n".join(piece)


def _snippet(text: str, title: str, words: Sequence[str], limit: int = 240) -> str:
    """The lines of a passage that have most of the words, in their order; the title is not said again."""
    lines = [line for line in text.split("\n") if line.strip() and line.strip("# ") != title]
    wanted = set(words)
    order = sorted(range(len(lines)), key=lambda n: (-len(wanted & set(tokens(lines[n]))), n))
    chosen: set[int] = set()
    size = 0
    for n in order:
        if chosen and size + len(lines[n]) > limit:
            break
        chosen.add(n)
        size += len(lines[n])
    out = " ".join(lines[n].lstrip("#> -").strip() for n in sorted(chosen))
    return out if len(out) <= limit + 60 else out[: limit + 59] + "…"
