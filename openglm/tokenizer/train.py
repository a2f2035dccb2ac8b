"""Train a byte-level BPE on an iterable of texts. `openglm.data.prepare.train_tokenizer` does it from files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from openglm.tokenizer.bytes import symbol_of_byte
from openglm.tokenizer.patterns import SPLIT
from openglm.tokenizer.tokenizer import CONFIG_FILE, MODEL_FILE, SPECIALS, Tokenizer

if TYPE_CHECKING:
    import tokenizers

MIN_VOCAB = 256 + len(SPECIALS)


def train_bpe(texts: Iterable[str], vocab_size: int, *, at_most: bool = False) -> Tokenizer:
    """Train on texts, using all cores. vocab_size counts every id, the specials included, which come last.

    Raises ValueError if the texts are too few or too alike to give that many tokens; with at_most=True the
    tokenizer is then smaller instead.
    """
    from tokenizers.trainers import BpeTrainer

    if vocab_size < MIN_VOCAB:
        raise ValueError(
            f"vocabulary of {vocab_size} is too small: 256 bytes and {len(SPECIALS)} special tokens need {MIN_VOCAB}"
        )
    n_merges_and_bytes = vocab_size - len(SPECIALS)
    bpe = untrained_bpe()
    trainer = BpeTrainer(
        vocab_size=n_merges_and_bytes,
        initial_alphabet=[symbol_of_byte(b) for b in range(256)],
        special_tokens=[],
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(iter(texts), trainer)
    n_text_ids = bpe.get_vocab_size()
    if n_text_ids < n_merges_and_bytes and not at_most:
        possible = n_text_ids + len(SPECIALS)
        raise ValueError(
            f"this text gives only {possible} distinct tokens, {vocab_size} were asked for: "
            f"add more varied text or pass --vocab-size {possible} or less"
        )
    config = {"kind": "bpe", "special_ids": {name: n_text_ids + i for i, name in enumerate(SPECIALS)}}
    return Tokenizer(
        {MODEL_FILE: bpe.to_str().encode("utf-8"), CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode("utf-8")}
    )


def untrained_bpe() -> tokenizers.Tokenizer:
    """The library's tokenizer with our pre-tokenizer and decoder, and an empty vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    return bpe
