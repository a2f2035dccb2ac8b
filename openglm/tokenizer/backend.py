"""What a vocabulary of any kind offers to the Tokenizer: ids of text and bytes of ids; and the names of specials."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

# The specials whose names are the same in every generation, whatever a file calls them.
SPECIALS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
ROLES = SPECIALS[6:]

_SPELLINGS = {
    "sop": "<sop>",
    "<|startofpiece|>": "<sop>",
    "eop": "<eop>",
    "<|endofpiece|>": "<eop>",
    "MASK": "[MASK]",
    "gMASK": "[gMASK]",
    "sMASK": "[sMASK]",
}


def canonical_name(name: str) -> str:
    """The name under which `special_ids` lists a special that a file spells in its own way, e.g. sop -> <sop>."""
    return _SPELLINGS.get(name, name)


class Backend(Protocol):
    """One vocabulary.

    dummy_prefix: `encode` puts a space in front of every text, and decoding drops it.
    per_segment: decoding drops it after every special, not at the very start alone.
    """

    dummy_prefix: bool
    per_segment: bool

    @property
    def n_ids(self) -> int:
        """Ids that the vocabulary defines: one more than the highest."""
        ...

    @property
    def table(self) -> Sequence[bytes]:
        """Bytes of each id from 0 on; b"" for an id that stands for no text."""
        ...

    @property
    def byte_ids(self) -> Sequence[int] | None:
        """Id of each of the 256 single bytes; None where the vocabulary cannot spell bytes."""
        ...

    def encode(self, text: str, dummy_prefix: bool = True) -> list[int]:
        """Ids of text; never a special. dummy_prefix=False leaves the space out where there would be one.

        Raises TypeError or UnicodeError if the text holds lone surrogates.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores unless TOKENIZERS_PARALLELISM is "false"."""
        ...


def n_threads() -> int:
    """Threads for a batch. The variable is the `tokenizers` library's, which callers already set."""
    return 1 if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() == "false" else os.cpu_count() or 1
