"""The byte alphabet of byte-level BPE files: each of the 256 bytes is written as one printable character.

Printable Latin-1 characters stand for themselves; the other 68 bytes are numbered from U+0100 on (the convention of
GPT-2's vocabulary files, which the `tokenizers` library follows).
"""

from __future__ import annotations

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [b for b in range(256) if b not in set(_VISIBLE)]
_SYMBOLS = {b: chr(b) for b in _VISIBLE} | {b: chr(0x100 + i) for i, b in enumerate(_HIDDEN)}
# To Latin-1, byte for byte; Latin-1 characters that stand for nothing go where Latin-1 cannot follow.
_LATIN1 = {b: "\uffff" for b in _HIDDEN} | {ord(symbol): chr(b) for b, symbol in _SYMBOLS.items()}


def symbol_of_byte(byte: int) -> str:
    """The character that stands for a byte."""
    return _SYMBOLS[byte]


def bytes_of_symbol(symbol: str) -> bytes:
    """The bytes that a vocabulary entry stands for. Raises ValueError for a character outside the alphabet."""
    try:
        return symbol.translate(_LATIN1).encode("latin-1")
    except UnicodeEncodeError as error:
        raise ValueError(f"vocabulary entry {symbol!r} is not written in the byte alphabet") from error
