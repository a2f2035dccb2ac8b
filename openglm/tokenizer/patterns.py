"""How byte-level vocabularies cut text before merging, and which GGUF file means which way.

A way to cut is a list of regular expressions. Each cuts what the one before it left: matches and the text between
them both stay, as pieces of their own. Sources: the released tokenizer files, and the table of llama.cpp.
"""

from __future__ import annotations

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_BLANKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# GLM-4 (and Llama 3): contractions, words with one leading mark, digits in threes, punctuation, blanks.
SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _WORDS_AND_BLANKS
# Qwen2: the same with every digit on its own.
SPLIT_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _WORDS_AND_BLANKS
SPLIT_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_GLM4, _QWEN2, _GPT2 = [SPLIT], [SPLIT_QWEN2], [SPLIT_GPT2]
_DIGITS_FIRST = [r"\p{N}", SPLIT_GPT2]
_DEFAULT = [r"[\p{P}\$\+<=>\^~\|]+", SPLIT_GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]

# tokenizer.ggml.pre -> regular expressions.
GGUF_SPLITS: dict[str, list[str]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _GLM4),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_FIRST),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), _GPT2),
}
# Those whose files start every text with the begin token unless they say otherwise, and those that take a word which
# is in the vocabulary as it is, without asking the merges.
GGUF_ADDS_BOS = frozenset({"llama-bpe", "llama3", "llama-v3"})
GGUF_WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3"})
