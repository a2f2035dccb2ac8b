"""Bytes of a page to text, whatever the page says of its encoding."""

from __future__ import annotations

import codecs
import re

__all__ = ["decode"]

BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
META = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]{2,40})""", re.IGNORECASE)
XML = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]{2,40})""", re.IGNORECASE)
# What browsers read a label as: the older names are subsets of these.
WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "x-gbk": "gb18030", "iso8859-1": "cp1252", "ascii": "cp1252",
         "big5": "big5hkscs"}  # fmt: skip
WESTERN = ("cp1252", "iso8859-15", "latin-1")
HAN = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")


def decode(body: bytes, declared: str = "") -> str:
    """The text. declared: the charset of the Content-Type header, which is believed only where the bytes agree."""
    for mark, name in BOMS:
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    if b"\x00" in body[:64] and body[:64].count(0) >= 16:  # UTF-16 without its mark
        return body.decode("utf-16-le" if body[1:2] == b"\x00" else "utf-16-be", "replace")
    text = body.decode("utf-8", "replace")
    broken = text.count("\ufffd") - body.count(b"\xef\xbf\xbd")
    whole = sum(1 for c in text if c > "\x7f") - broken
    if broken <= 1 + whole // 10 and (broken <= 0 or whole):  # a damaged character makes no other encoding
        return text
    found = [m.group(1).decode("ascii") for m in (META.search(body[:4096]), XML.search(body[:400])) if m]
    names = list(dict.fromkeys(filter(None, map(_codec, [declared, *found]))))
    for name in names:
        if name != "utf-8" and (decoded := _strictly(body, name)) is not None:
            return _chinese(body) or decoded if name in WESTERN else decoded
    return _chinese(body) or _guess(body) or text


def charset_of(content_type: str) -> str:
    match = re.search(r"""charset\s*=\s*["']?([\w.:-]+)""", content_type, re.IGNORECASE)
    return match.group(1) if match else ""


def _codec(label: str) -> str:
    """Python's name of an encoding of text, or nothing."""
    try:
        name = codecs.lookup(label).name
        "".encode(name)
    except (LookupError, ValueError):
        return ""
    return WIDER.get(label.lower(), WIDER.get(name, name))


def _strictly(body: bytes, name: str) -> str | None:
    try:
        return body.decode(name)
    except (UnicodeDecodeError, LookupError):
        # The end may be cut in the middle of a character, and a few bytes may be damaged.
        text = body.decode(name, "replace")
        return text if text.count("\ufffd") <= 1 + len(text) // 500 else None


def _chinese(body: bytes) -> str | None:
    """The text in GB 18030 if that gives mostly Chinese characters outside of ASCII."""
    text = _strictly(body, "gb18030")
    if text is None:
        return None
    other = [c for c in text if c > "\x7f"]
    return text if other and sum(1 for c in other if HAN.match(c)) > 0.8 * len(other) else None


def _guess(body: bytes) -> str | None:
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return None
    best = from_bytes(body[:200_000]).best()
    return body.decode(best.encoding, "replace") if best is not None else None
