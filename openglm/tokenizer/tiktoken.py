"""tiktoken vocabularies: GLM-4 and CodeGeeX4. One line per token, "base64(bytes) rank"; the rank is the id.

The `tiktoken` library does the encoding: five to nine times the speed of the same vocabulary in `tokenizers` (see
bench/tokenizer.py), and a table of 151 thousand ranks loads in a third of a second.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from openglm.tokenizer.backend import n_threads
from openglm.tokenizer.patterns import SPLIT

LONG_BLANK = 100_000
LONG_BLANK_RUN = re.compile(rf"\s{{{LONG_BLANK}}}")


class Tiktoken:
    """Ranks of byte strings, merged lowest rank first within the pieces that a regular expression cuts.

    matched: content -> id of added tokens that text does give, as GGUF's user-defined ones.
    """

    dummy_prefix = False
    per_segment = False

    def __init__(
        self, ranks: Mapping[bytes, int], split: str = SPLIT, matched: Mapping[str, int] | None = None
    ) -> None:
        """Raises ValueError unless the ranks hold every single byte."""
        import tiktoken

        single = sum(bytes([b]) in ranks for b in range(256))
        if single < 256:
            raise ValueError(f"the tiktoken file holds {single} of the 256 single bytes, so it cannot encode any text")
        self._ranks = ranks
        self._split = split
        self._matched = dict(matched or {})
        names = sorted(self._matched, key=len, reverse=True)
        self._marks = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self.n_ids = max([*ranks.values(), *self._matched.values()]) + 1
        self._encoding = tiktoken.Encoding("openglm", pat_str=split, mergeable_ranks=dict(ranks), special_tokens={})

    def encode(self, text: str, dummy_prefix: bool = True) -> list[int]:
        if self._marks is None:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for i, piece in enumerate(self._marks.split(text)):
            if i % 2:
                ids.append(self._matched[piece])
            elif piece:
                ids += self._encode_ordinary(piece)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        threads = n_threads()
        if threads == 1 or self._marks is not None or any(_has_long_blank(text) for text in texts):
            return [self.encode(text) for text in texts]
        "".join(texts).encode()
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def _encode_ordinary(self, text: str) -> list[int]:
        if not _has_long_blank(text):
            # The wrapper around this would replace lone surrogates without a word; this raises UnicodeEncodeError.
            return self._encoding._core_bpe.encode_ordinary(text)
        import regex  # tiktoken's own dependency; it cuts such text without a limit

        return [i for piece in regex.findall(self._split, text) for i in self._encoding._encode_single_piece(piece)]

    @cached_property
    def table(self) -> list[bytes]:
        matched = {i: text.encode() for text, i in self._matched.items()}
        table = [b""] * self.n_ids
        for data, i in self._ranks.items():
            table[i] = data
        for i, data in matched.items():
            table[i] = data
        return table

    @cached_property
    def byte_ids(self) -> list[int]:
        return [self._ranks[bytes([b])] for b in range(256)]


def _has_long_blank(text: str) -> bool:
    """Whether the library's regular expressions would run out of stack, which ends in a panic."""
    return len(text) >= LONG_BLANK and LONG_BLANK_RUN.search(text) is not None


def looks_like_ranks(content: bytes) -> bool:
    """Whether a tokenizer.model is such a file; SentencePiece files have the same name."""
    fields = content[:1024].split(b"\n", 1)[0].split()
    try:
        return len(fields) == 2 and fields[1].isdigit() and bool(base64.b64decode(fields[0], validate=True))
    except binascii.Error:
        return False


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """Token bytes -> rank. Raises ValueError, with the line, for a damaged file."""
    decode, ranks = binascii.a2b_base64, {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[decode(token)] = int(rank)
        except ValueError as error:  # binascii.Error is one
            if line.strip():
                raise ValueError(f'tokenizer.model is damaged: line {number} is not "base64 rank"') from error
    return ranks


def write_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """The file's content, by rank."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda r: r[1]))
    return b"".join(lines)
