"""The byte alphabet of byte-level BPE files: each of the 256 bytes is written as one printable character.

Printable Latin-1 characters stand for themselves; the other 68 bytes are numbered from U+0100 on (the convention of
GPT-2's vocabulary files, which the `tokenizers` library follows).
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import accumulate, pairwise

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [b for b in range(256) if b not in set(_VISIBLE)]
_SYMBOLS = {b: chr(b) for b in _VISIBLE} | {b: chr(0x100 + i) for i, b in enumerate(_HIDDEN)}
# Encoding maps are fast only where byte 0 is U+0000, so the symbol of byte 0 takes that place first.
_TO_BYTES = codecs.charmap_build("\0" + "".join(_SYMBOLS[b] for b in range(1, 256)))


def symbol_of_byte(byte: int) -> str:
    """The character that stands for a byte."""
    return _SYMBOLS[byte]


def bytes_of_symbol(symbol: str) -> bytes:
    """The bytes that a vocabulary entry stands for. Raises ValueError for a character outside the alphabet."""
    if "\0" in symbol:
        raise ValueError(f"vocabulary entry {symbol!r} is not written in the byte alphabet")
    try:
        return codecs.charmap_encode(symbol.replace(_SYMBOLS[0], "\0"), "strict", _TO_BYTES)[0]
    except UnicodeEncodeError as error:
        raise ValueError(f"vocabulary entry {symbol!r} is not written in the byte alphabet") from error


def bytes_of_symbols(symbols: Sequence[str]) -> list[bytes]:
    """`bytes_of_symbol` of many entries, in one pass over all of them."""
    data = bytes_of_symbol("".join(symbols))
    return [data[first:end] for first, end in pairwise(accumulate(map(len, symbols), initial=0))]
