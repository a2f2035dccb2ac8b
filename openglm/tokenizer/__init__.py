"""Text to token ids and back: one Tokenizer class and an incremental detokenizer."""

from __future__ import annotations

from openglm.tokenizer.tokenizer import SPECIALS, Detokenizer, Tokenizer, has_tokenizer

__all__ = ["SPECIALS", "Detokenizer", "Tokenizer", "has_tokenizer"]
