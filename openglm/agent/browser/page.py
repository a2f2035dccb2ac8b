"""A page as numbered lines with numbered links, from HTML, PDF or plain text.

    page = read_page(reply)            # page.lines, page.links, page.title, page.language, page.date

The main text is found by trafilatura after hidden parts are taken out; links of the rest of the page (menus) come after
it. A link stands in the text as [its text](its number).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from openglm.agent.browser.decode import charset_of, decode
from openglm.agent.browser.fetch import FetchError, Reply
from openglm.agent.browser.hidden import drop_hidden, visible_text
from openglm.agent.browser.wrap import columns, join, wrap

__all__ = ["Page", "read_page"]

HTML_TYPES = ("text/html", "application/xhtml+xml")
TEXT_TYPES = ("application/json", "application/xml", "application/javascript", "application/yaml")
MAX_TITLE = 120
MAX_LINK_TEXT = 100
N_OTHER_LINKS = 40  # of menus and the like
N_LINKS = 400
MIN_TEXT = 200  # characters below which a page with scripts is taken for one that they make
BLOCKS = frozenset(
    "address article aside blockquote body center dd details div dl dt fieldset figcaption figure footer form h1 h2 h3"
    " h4 h5 h6 header hgroup hr li main nav ol p pre section summary table tbody tfoot thead tr ul".split()
    + "p head list item quote table row code".split()  # of trafilatura's own tree
)


@dataclass(frozen=True)
class Page:
    """What was read at an address. lines: of at most about 160 columns; links: number n leads to links[n - 1].

    kind: "html", "pdf" or "text". note: what is missing of it, for the reader. needs_script: its text seems to be made
    by scripts that were not run.
    """

    url: str
    title: str
    lines: tuple[str, ...]
    links: tuple[str, ...] = ()
    language: str = ""
    date: str = ""
    kind: str = "html"
    note: str = ""
    needs_script: bool = False

    @property
    def text(self) -> str:
        """The whole text as one line, with the words of links but not their numbers."""
        return join(LINK.sub(r"\1", line) for line in self.lines)


LINK = re.compile(r"\[([^\[\]]*)\]\(\d+\)")
MARKDOWN_LINK = re.compile(r"(?<!!)\[([^\[\]\n]{1,200})\]\((?!\d+\))<?([^()\s<>]{1,500})>?(?: \"[^\"\n]*\")?\)")


def read_page(reply: Reply) -> Page:
    """The page of a reply. FetchError for errors of the server, and for what is no text."""
    if reply.status >= 400:
        reasons = {401: "it wants a login", 403: "access is denied", 404: "there is no such page", 410: "it is gone",
                   429: "too many requests; try later or use another source"}  # fmt: skip
        reason = reasons.get(reply.status, "the server failed" if reply.status >= 500 else "the server refused")
        raise FetchError(f"{reply.url} answered {reply.status}: {reason}.")
    kind = reply.content_type or _sniff(reply.body)
    if kind in HTML_TYPES or (kind == "text/plain" and _sniff(reply.body) == "text/html"):
        page = html_page(decode(reply.body, charset_of(reply.headers.get("content-type", ""))), reply.url)
        if not page.lines and not page.needs_script:
            page = replace(page, note="the page has no text")
    elif kind == "application/pdf" or reply.body[:5] == b"%PDF-":
        page = _pdf_page(reply)
    elif kind.startswith("text/") or kind in TEXT_TYPES or kind.endswith(("+xml", "+json")):
        page = text_page(decode(reply.body, charset_of(reply.headers.get("content-type", ""))), reply.url)
    else:
        size = f"{len(reply.body):,} bytes"
        raise FetchError(f"{reply.url} is no text: {kind or 'unknown type'}, {size}. Open another page.")
    if reply.truncated:
        page = replace(page, note=f"cut: only the first {len(reply.body) / 1e6:.1f} MB were read")
    return page


def _sniff(body: bytes) -> str:
    start = body[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"%PDF-"):
        return "application/pdf"
    if re.match(rb"<(?:!doctype html|html|head|body|title|meta|div|p|h1|!--)", start, re.IGNORECASE):
        return "text/html"
    return "text/plain" if b"\x00" not in start else "application/octet-stream"


def text_page(text: str, url: str, title: str = "") -> Page:
    """A page of plain text or Markdown: its own lines, long ones wrapped."""
    text = visible_text(text.replace("\r\n", "\n").replace("\r", "\n"))
    links = Links(url)
    if url.endswith((".md", ".markdown")):
        text = MARKDOWN_LINK.sub(lambda match: _numbered(match, links), text)
    lines = [piece for line in text.split("\n") for piece in wrap(line.expandtabs(4).rstrip())]
    heading = next((line.lstrip("# ").strip() for line in text.split("\n") if line.startswith("# ")), "")
    title = title or heading or unquote(PurePosixPath(urlsplit(url).path).name) or url
    return Page(url, _one_line(title, MAX_TITLE), tuple(_squeeze_blank(lines)), tuple(links.found),
                language_of(text), kind="text")  # fmt: skip


def _numbered(match: re.Match[str], links: Links) -> str:
    number = links.number(match.group(2))
    return f"[{match.group(1)}]({number})" if number else match.group(1)


def _pdf_page(reply: Reply) -> Page:
    from openglm.agent.browser.pdf import read_pdf

    if reply.truncated:
        raise FetchError(f"{reply.url} is a PDF of more than {len(reply.body) / 1e6:.0f} MB: too long to be read.")
    found = read_pdf(reply.body, reply.url)
    page = text_page(found.text, reply.url, found.title or unquote(PurePosixPath(urlsplit(reply.url).path).name))
    return replace(page, kind="pdf", date=found.date, note=found.note)


def html_page(html: str, url: str) -> Page:
    """A page of HTML. Its links are made absolute; those that are not of the web are left out."""
    from lxml import etree
    from lxml import html as lxml_html

    try:
        parser = lxml_html.HTMLParser(encoding="utf-8")
        root = lxml_html.document_fromstring(html.encode("utf-8", "replace") or b"<p></p>", parser=parser)
    except (etree.ParserError, ValueError):
        return Page(url, _one_line(url, MAX_TITLE), (), note="the page is empty")
    base = next((b.get("href") for b in root.iter("base") if b.get("href")), "")
    language = (root.get("lang") or root.get("{http://www.w3.org/XML/1998/namespace}lang") or "").strip()
    scripts = sum(1 for _ in root.iter("script"))
    date = _date(root, url)
    drop_hidden(root)
    links = Links(absolute(url, base) or url)
    for anchor in root.iter("a"):
        if anchor.get("href"):  # by us: extractors take a relative address for one below the root of the site
            anchor.set("href", absolute(links.base, anchor.get("href")))
    title = next((t.text_content() for t in root.iter("title")), "")
    other = [(a.text_content(), a.get("href") or "") for a in root.iter("a")]
    lines = _main_lines(root, url, links)
    title = _one_line(title or (lines[0].lstrip("# ") if lines else "") or url, MAX_TITLE)
    lines += _other_links(other, links)
    text = "\n".join(lines)
    return Page(
        url, title, tuple(lines), tuple(links.found), language[:5].lower() or language_of(text), date,
        needs_script=scripts > 0 and len(LINK.sub(r"\1", text)) < MIN_TEXT,
    )  # fmt: skip


def _main_lines(root: Any, url: str, links: Links) -> list[str]:
    """The main text by trafilatura; where it finds little, or less than half of a short page, all but menus."""
    import trafilatura

    body = next(root.iter("body"), root)
    n_all = columns(_words(body))
    if n_all > MIN_TEXT:
        try:
            found = trafilatura.bare_extraction(
                root, url=url, include_links=True, include_formatting=True, include_comments=False, favor_recall=True
            )
        except Exception:  # of an extractor of foreign pages: the rest serves as well
            found = None
        main = getattr(found, "body", None)
        n_main = columns(_words(main)) if main is not None else 0
        if main is not None and n_main >= MIN_TEXT and (n_all > 4000 or n_main > 0.5 * n_all):
            return _squeeze_blank(_lines(main, links))
    return _squeeze_blank(_lines(_without_menus(body), links))


def _without_menus(body: Any) -> Any:
    """The one element that says it is the main one; else the body without what says it is a menu."""
    for tag in ("main", "article"):
        found = list(body.iter(tag))
        if len(found) == 1 and _words(found[0]):
            return found[0]
    for element in list(body.iter("nav", "footer")):
        if element.getparent() is not None:
            element.drop_tree()
    return body


def _words(element: Any) -> str:
    return re.sub(r"\s+", " ", "".join(element.itertext())).strip()


def absolute(base: str, target: str) -> str:
    """An address as it stands in a page, made whole; nothing where it cannot be. local: joins as http: does."""
    try:
        if base.startswith("local://"):
            joined = urljoin("http" + base.removeprefix("local"), target.strip())
            inside = urlsplit(joined).scheme == "http" and not target.strip().startswith(("http:", "//"))
            return "local" + joined.removeprefix("http") if inside else joined
        return urljoin(base, target.strip())
    except ValueError:
        return ""


class Links:
    """Numbers the links of a page, each address once."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.found: list[str] = []
        self._number: dict[str, int] = {}

    def number(self, target: str) -> int | None:
        """None for what leads nowhere else on the web."""
        url, _, fragment = absolute(self.base, target).partition("#")
        if not url.startswith(("http://", "https://", "local://")) or (fragment and url == self.base.partition("#")[0]):
            return None
        if url not in self._number:
            if len(self.found) >= N_LINKS:
                return None
            self.found.append(url)
            self._number[url] = len(self.found)
        return self._number[url]


def _other_links(all_links: Sequence[tuple[str, str]], links: Links) -> list[str]:
    """Lines with the links that the main text has not."""
    known = len(links.found)
    lines: list[str] = []
    for text, target in all_links:
        before = len(links.found)
        number = links.number(target)
        if number is not None and len(links.found) > before and len(links.found) - known <= N_OTHER_LINKS:
            lines.append(f"- [{_link_text(text) or target[:MAX_LINK_TEXT]}]({number})")
    return ["", "Other links of the page:", *lines] if lines else []


def _link_text(text: str) -> str:
    return _one_line(text, MAX_LINK_TEXT).replace("[", "(").replace("]", ")")


def _one_line(text: str, limit: int) -> str:
    text = re.sub(r"\s+", " ", visible_text(text)).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _lines(root: Any, links: Links) -> list[str]:
    """The text below an element (of HTML, or of trafilatura's tree) as wrapped lines, one block at a time."""
    lines: list[str] = []
    for prefix, text, kept in _blocks(root, links):
        if kept:
            pieces = [piece for line in text.strip("\n").split("\n") for piece in wrap(line.expandtabs(4).rstrip())]
        else:
            pieces = wrap(re.sub(r"\s+", " ", text).strip())
        if any(pieces):
            lines += [*([""] if prefix.startswith("#") and lines else []), prefix + pieces[0], *pieces[1:]]
    return [visible_text(line) for line in lines]


def _blocks(root: Any, links: Links) -> Iterator[tuple[str, str, bool]]:
    """(what stands before it, text, whether its line breaks count) for each block. Iterative: trees may be deep."""
    text: list[str] = []
    prefix, kept = "", False
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        element, leaving = stack.pop()
        tag = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
        block = tag in BLOCKS and not (
            tag == "code" and element.getparent() is not None and not _is_block_code(element)
        )
        if leaving:
            text += _closing(element, tag)
            if block:
                yield prefix, "".join(text), kept
                text, prefix, kept = [], "", False
            if element is not root:
                text.append(element.tail or "")
            continue
        if block:
            yield prefix, "".join(text), kept
            text, prefix, kept = [], _prefix(element, tag), tag in ("pre", "code")
        if tag in ("br", "lb"):
            yield prefix, "".join(text), kept
            text, prefix = [], ""
        elif tag in ("td", "th", "cell") and element.getprevious() is not None:
            text.append(" | ")
        elif tag in ("a", "ref") and (number := links.number(element.get("href") or element.get("target") or "")):
            label = _link_text("".join(element.itertext()))
            text += [f"[{label}]({number})" if label else "", element.tail or ""]
            continue
        if tag:
            text.append(element.text or "")
        stack.append((element, True))
        stack += [(child, False) for child in reversed(list(element))]
    yield prefix, "".join(text), kept


def _is_block_code(element: Any) -> bool:
    return "\n" in "".join(element.itertext())


def _closing(element: Any, tag: str) -> list[str]:
    return [" "] if tag in ("td", "th", "cell") else []


def _prefix(element: Any, tag: str) -> str:
    if tag in ("li", "item"):
        return "- "
    if tag == "head":
        level = re.sub(r"\D", "", element.get("rend") or "") or "2"
        return "#" * min(int(level), 6) + " "
    if re.fullmatch(r"h[1-6]", tag):
        return "#" * int(tag[1]) + " "
    return "> " if tag in ("blockquote", "quote") else ""


def _squeeze_blank(lines: Sequence[str]) -> list[str]:
    """At most one empty line in a row, none at the ends."""
    out: list[str] = []
    for line in lines:
        if line.strip() or (out and out[-1]):
            out.append(line if line.strip() else "")
    while out and not out[-1]:
        out.pop()
    return out


def language_of(text: str) -> str:
    """zh, ja, ko, ru or en by the letters of a text, or nothing."""
    sample = text[:4000]
    n_han = len(re.findall(r"[\u4e00-\u9fff]", sample))
    counts = {
        "ja": len(re.findall(r"[\u3040-\u30ff]", sample)) * 3, "ko": len(re.findall(r"[\uac00-\ud7af]", sample)),
        "ru": len(re.findall(r"[\u0400-\u04ff]", sample)) / 4, "zh": n_han,
        "en": len(re.findall(r"[A-Za-z]", sample)) / 4,
    }  # fmt: skip
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] >= 5 else ""


def _date(root: Any, url: str) -> str:
    """The day of publication as YYYY-MM-DD, or nothing; from the marks of the page, not guessed from its text."""
    from htmldate import find_date

    try:
        return find_date(root, url=url, extensive_search=False, original_date=True) or ""
    except Exception:  # a foreign page may break it; the date is a nicety
        return ""
