"""Takes out of a page what a reader would not see: hidden elements, comments, scripts; and characters without a shape.

Styles are read where they stand in the page (style attributes, simple rules of <style>); those of other files are seen
only in a page that Chromium ran (render.py).
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

__all__ = ["drop_hidden", "visible_text"]

NEVER_SHOWN = (
    "script", "style", "template", "noscript", "iframe", "object", "embed", "applet", "canvas", "svg", "math", "audio",
    "video", "datalist", "select", "textarea", "input", "dialog",
)  # fmt: skip
KEPT_OF_NEVER = {"dialog": "open"}  # shown when they have this attribute
HIDES = re.compile(
    r"display:none|visibility:(?:hidden|collapse)|content-visibility:hidden|opacity:0*(?:\.0+)?(?:%|;|$)"
    r"|font-size:0*(?:\.\d+)?(?:px|em|rem|pt|%)?(?:;|$)|font-size:0*1(?:\.\d+)?px"
    r"|(?:text-indent|left|right|top):-\d{3,}(?:\.\d+)?(?:px|em|rem|pt|vw|%)|margin-(?:left|top):-\d{4,}px"
    r"|clip:rect\(0(?:px)?[, ]|clip-path:(?:inset\((?:50|100)%|circle\(0)|transform:scale[xy]?\(0\)"
    r"|(?:^|;)color:(?:transparent|rgba\(\d+,\d+,\d+,0(?:\.0+)?\))(?:;|$)"
)
NO_ROOM = re.compile(r"(?:^|;)(?:max-)?(?:width|height):[01](?:px)?(?:;|$)")
RULE = re.compile(r"([^{}]+)\{([^{}]*)\}")
SELECTOR = re.compile(r"([a-z][\w-]*)?(?:([.#])(-?[_a-zA-Z][\w-]*))?$")
NAMED = {"white": "ffffff", "black": "000000", "red": "ff0000", "yellow": "ffff00", "blue": "0000ff"}
WHITE = "ffffff"
# Shapeless or private characters; U+200C and U+200D stay: Persian and emoji are written with them.
SHAPELESS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
                       "\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\uffff"
                       "\ue000-\uf8ff\U000e0000-\U000e0fff\U000f0000-\U0010ffff]")  # fmt: skip


def visible_text(text: str) -> str:
    """The text in composed characters, without those that show nothing (some of which can hide whole sentences)."""
    return unicodedata.normalize("NFC", SHAPELESS.sub("", text))


def drop_hidden(root: Any) -> None:
    """Removes hidden elements from a tree of lxml.html, in place. Text behind a removed element stays."""
    from lxml import etree

    etree.strip_tags(root, etree.Comment, etree.ProcessingInstruction)
    styles = Styles(root)
    for element in list(root.iter()):
        if isinstance(element.tag, str) and element.tag not in ("html", "head", "body") and _is_hidden(element, styles):
            if element.getparent() is not None:
                element.drop_tree()


class Styles:
    """The declarations that a page itself holds. foreign: it has sheets in other files too."""

    def __init__(self, root: Any) -> None:
        # by (".", class), ("#", id) or ("", tag): declarations, each with the tag that it is limited to
        self.rules: dict[tuple[str, str], list[tuple[str, str]]] = {}
        self.foreign = any("stylesheet" in link.get("rel", "").lower() for link in root.iter("link"))
        for sheet in root.iter("style"):
            self._read(_squeeze((sheet.text or "")[:200_000]))

    def _read(self, css: str) -> None:
        css = re.sub(r"@[^{};]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}|@[^{};]*;", "", css)  # of paper, of other screens
        for selectors, body in RULE.findall(css):
            for selector in selectors.split(","):
                match = SELECTOR.match(selector.strip())
                if match and match.group(0):
                    tag, kind, name = (group or "" for group in match.groups())
                    self.rules.setdefault((kind, name) if kind else ("", tag), []).append((tag if kind else "", body))

    def of(self, element: Any) -> str:
        """The declarations for an element, squeezed; its own attribute last."""
        tag = element.tag.lower()
        found: list[str] = []
        if self.rules:
            classes = element.get("class", "").lower().split()
            names = [("", tag), *((".", name) for name in classes), ("#", element.get("id", "").lower())]
            found += [body for name in names for only, body in self.rules.get(name, ()) if only in ("", tag)]
        if element.get("color"):
            found.append(f"color:{element.get('color').lower()}")
        return ";".join([*found, _squeeze(element.get("style", ""))]).strip(";")


def _is_hidden(element: Any, styles: Styles) -> bool:
    tag = element.tag.lower()
    if tag in NEVER_SHOWN and not (tag in KEPT_OF_NEVER and KEPT_OF_NEVER[tag] in element.attrib):
        return True
    if "hidden" in element.attrib:
        return True
    style = styles.of(element)
    if not style:
        return False
    if HIDES.search(style) or (NO_ROOM.search(style) and "overflow:hidden" in style):
        return True
    return _same_colours(element, style, styles)


def _squeeze(css: str) -> str:
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL).lower().replace("!important", "")
    return re.sub(r"\s*([:;,(){}])\s*", r"\1", re.sub(r"\s+", " ", css)).strip()


def _style_rules(root: Any) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Declarations by (".", class), ("#", id) or ("", tag), each with the tag it is limited to; rules for paper and for
    other screens are left out."""
    rules: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for sheet in root.iter("style"):
        css = _squeeze((sheet.text or "")[:200_000])
        css = re.sub(r"@[^{};]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}|@[^{};]*;", "", css)
        for selectors, body in RULE.findall(css):
            for selector in selectors.split(","):
                match = SELECTOR.match(selector.strip())
                if match and match.group(0):
                    tag, kind, name = match.group(1) or "", match.group(2) or "", match.group(3) or ""
                    key = (kind, name) if kind else ("", tag)
                    rules.setdefault(key, []).append((tag if kind else "", body))
    # Names of classes and ids were put in small letters with the rest.
    return {(kind, name): value for (kind, name), value in rules.items()}


def _colour(value: str) -> str:
    """Six hex digits of a colour, or nothing."""
    value = value.strip()
    if value in NAMED:
        return NAMED[value]
    if re.fullmatch(r"#[0-9a-f]{3}", value):
        return "".join(c * 2 for c in value[1:])
    if re.fullmatch(r"#[0-9a-f]{6}", value):
        return value[1:]
    numbers = re.fullmatch(r"rgba?\((\d{1,3}),(\d{1,3}),(\d{1,3})(?:,1(?:\.0+)?)?\)", value)
    return "".join(f"{min(int(n), 255):02x}" for n in numbers.groups()) if numbers else ""


def _declared(style: str, names: tuple[str, ...]) -> str | None:
    """The last value of one of these properties; None where there is none."""
    found = [value for name, _, value in (part.partition(":") for part in style.split(";")) if name in names]
    return found[-1] if found else None


def _same_colours(element: Any, style: str, styles: Styles) -> bool:
    """Whether text is written in the colour of its ground: that of the nearest element that declares one, else white.

    Where sheets of other files may colour the ground, only what the page itself declares counts.
    """
    written = _colour(_declared(style, ("color",)) or "")
    at: Any = element
    while written and at is not None:
        ground = _declared(styles.of(at), ("background", "background-color")) or (at.get("bgcolor") or "").lower()
        if ground:
            return _near(written, _colour(ground if "(" in ground else ground.split(" ")[0]))
        at = at.getparent()
    return not styles.foreign and _near(written, WHITE)


def _near(one: str, other: str) -> bool:
    """Whether two colours can hardly be told apart."""
    if not one or not other:
        return False
    return all(abs(int(one[i : i + 2], 16) - int(other[i : i + 2], 16)) <= 12 for i in (0, 2, 4))
