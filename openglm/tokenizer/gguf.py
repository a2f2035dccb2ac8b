"""The tokenizer inside a GGUF file, from its `tokenizer.ggml.*` fields.

    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": [...], ...}
    Tokenizer.from_gguf(fields)

"gpt2" is byte-level BPE cut the way that `.pre` names; "llama" is SentencePiece BPE with scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from openglm.tokenizer.backend import SPECIALS, Backend, canonical_name
from openglm.tokenizer.bpe import added_token, byte_level_json, load_json, tiktoken_of
from openglm.tokenizer.patterns import GGUF_ADDS_BOS, GGUF_SPLITS, GGUF_WHOLE_WORDS
from openglm.tokenizer.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePiece,
    write_bpe_model,
)
from openglm.tokenizer.tiktoken import Tiktoken, write_ranks

PREFIX = "tokenizer.ggml."
_NAMES, _MARKED = frozenset(SPECIALS), frozenset((CONTROL, USER_DEFINED))


class GgufTokenizer(NamedTuple):
    """files: makes the vocabulary files. config: kind, special_ids, prefix_ids and more, for tokenizer_config.json."""

    backend: Backend
    files: Callable[[], dict[str, bytes]]
    config: dict[str, Any]


def open_gguf(fields: Mapping[str, Any]) -> GgufTokenizer:
    """Raises ValueError, naming it, for a field that is missing or a vocabulary kind that is not read."""
    model = _need(fields, "model")
    if model not in ("gpt2", "llama"):
        raise ValueError(f'GGUF tokenizer: {PREFIX}model is {model!r}; "gpt2" and "llama" are read')
    tokens: list[str] = list(_need(fields, "tokens"))
    types: list[int] = list(fields.get(PREFIX + "token_type") or [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ValueError(f"GGUF tokenizer: {len(tokens)} tokens but {len(types)} token types; the file is damaged")
    # Converters fill the table up to the embedding's rows; those entries are of the type "unused".
    n = len(types)
    while n and types[n - 1] == UNUSED:
        n -= 1
    tokens, types = tokens[:n], types[:n]
    if not _NAMES.isdisjoint(tokens):
        types = [CONTROL if token in _NAMES else kind for token, kind in zip(tokens, types, strict=True)]
    marked = [i for i, kind in enumerate(types) if kind in _MARKED]
    special = {canonical_name(tokens[i]): i for i in marked if types[i] == CONTROL}
    if model == "llama":
        opened = _sentencepiece(fields, tokens, types)
    else:
        opened = _bpe(fields, tokens, {i: types[i] == CONTROL for i in marked})
    config = opened.config
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    config["special_ids"] = special
    config["prefix_ids"] = _prefix_ids(fields, n, model)
    return opened


def _need(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(PREFIX + name) is None:
        raise ValueError(f"GGUF file without a tokenizer: {PREFIX}{name} is missing")
    return fields[PREFIX + name]


def _prefix_ids(fields: Mapping[str, Any], n: int, model: str) -> list[int]:
    if PREFIX + "prefix_ids" in fields:  # we wrote it
        return list(fields[PREFIX + "prefix_ids"])
    default = model == "llama" or fields.get(PREFIX + "pre") in GGUF_ADDS_BOS
    adds = fields.get(PREFIX + "add_bos_token")
    bos = fields.get(PREFIX + "bos_token_id")
    wanted = default if adds is None else bool(adds)
    return [int(bos)] if wanted and bos is not None and 0 <= int(bos) < n else []


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> GgufTokenizer:
    scores = [float(s) for s in _need(fields, "scores")]
    if len(scores) < len(tokens):
        raise ValueError(f"GGUF tokenizer: {len(tokens)} tokens but {len(scores)} scores; the file is damaged")
    prefix = fields.get(PREFIX + "add_space_prefix")
    if UNKNOWN not in types:  # the library needs one
        unknown = fields.get(PREFIX + "unknown_token_id")
        types = [UNKNOWN if i == int(unknown or 0) else kind for i, kind in enumerate(types)]
    pieces = list(zip(tokens, scores, types, strict=False))
    model = write_bpe_model(pieces, dummy_prefix=prefix is None or bool(prefix))
    return GgufTokenizer(SentencePiece(model), lambda: {"tokenizer.model": model}, {"kind": "sentencepiece"})


def _bpe(fields: Mapping[str, Any], tokens: Sequence[str], marked: Mapping[int, bool]) -> GgufTokenizer:
    """marked: id -> whether it is a special, of the tokens that are no product of merges."""
    pre = fields.get(PREFIX + "pre") or "default"
    if pre not in GGUF_SPLITS:
        raise ValueError(f"GGUF tokenizer: unknown {PREFIX}pre {pre!r}; known are {', '.join(GGUF_SPLITS)}")
    merges: list[str] = list(_need(fields, "merges"))
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) == len(tokens):
        for i in marked:
            del vocab[tokens[i]]
    else:  # some are there twice
        vocab = {token: i for i, token in enumerate(tokens) if i not in marked}
    added = [added_token(i, tokens[i], control) for i, control in marked.items()]
    config = byte_level_json(vocab, merges, GGUF_SPLITS[pre], added, pre in GGUF_WHOLE_WORDS)
    fast = tiktoken_of(config)
    if fast is not None:
        ranks, split, matched = fast
        settings: dict[str, Any] = {"kind": "tiktoken", "split": split, "matched": matched}
        return GgufTokenizer(Tiktoken(*fast), lambda: {"tokenizer.model": write_ranks(ranks)}, settings)
    config["model"]["merges"] = [m.split(" ") for m in merges]
    content = json.dumps(config, ensure_ascii=False).encode()
    return GgufTokenizer(load_json(config).backend, lambda: {"tokenizer.json": content}, {"kind": "json"})
