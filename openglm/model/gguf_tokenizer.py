"""The `tokenizer.ggml.*` fields of a GGUF file from one of our tokenizers: the way back from `Tokenizer.from_gguf`.

    gguf_tokenizer_fields(Tokenizer.load("folder"))

Byte-level vocabularies become "gpt2" with merges and the name of the way they cut text, SentencePiece ones "llama"
with scores. llama.cpp knows ways to cut by name alone, so one that it has no name for cannot be written.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from openglm.tokenizer import Tokenizer
from openglm.tokenizer.bytes import symbol_of_byte
from openglm.tokenizer.patterns import GGUF_SPLITS, SPLIT_GPT2
from openglm.tokenizer.sentencepiece import read_number
from openglm.tokenizer.tiktoken import parse_ranks

__all__ = ["gguf_tokenizer_fields", "padded_tokens", "splits_of"]

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Of the names that mean one way to cut, those without rules of their own for begin tokens and whole words.
NAMES = ("glm4", "qwen2", "smollm", "gpt-2", "default")
WHOLE_WORDS = "llama-bpe"


def gguf_tokenizer_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """Fields by key. Raises ValueError for a vocabulary that GGUF cannot express: icetk, SentencePiece's unigram
    models, a way to cut text without a name.
    """
    config = json.loads(tokenizer.files["tokenizer_config.json"])
    vocabulary = {name: data for name, data in tokenizer.files.items() if name != "tokenizer_config.json"}
    if tokenizer.kind == "sentencepiece":
        fields = _sentencepiece(next(iter(vocabulary.values())), tokenizer)
    elif tokenizer.kind == "icetk":
        raise ValueError("GGUF cannot express icetk's vocabulary (spaces and newlines with ids): convert to openglm")
    elif tokenizer.kind == "tiktoken":
        fields = _tiktoken(parse_ranks(vocabulary["tokenizer.model"]), config, tokenizer.special_ids)
    else:
        fields = _json(tokenizer, vocabulary)
    prefix = list(config.get("prefix_ids") or [])
    fields[PREFIX + "add_bos_token"] = len(prefix) == 1  # GLM's two are written by the chat template
    if prefix:
        fields[PREFIX + "bos_token_id"] = prefix[0]
    if len(prefix) > 1:
        fields[PREFIX + "prefix_ids"] = prefix  # ours alone, for the way back
    return fields


def padded_tokens(fields: Mapping[str, Any], n_rows: int) -> dict[str, Any]:
    """The fields with as many tokens as the embedding has rows, which llama.cpp asks for: the rest unused."""
    fields = dict(fields)
    tokens = fields.get(PREFIX + "tokens")
    if tokens is None:
        return fields
    missing = n_rows - len(tokens)
    if missing < 0:
        raise ValueError(f"the tokenizer has {len(tokens)} ids, the model {n_rows}: they do not belong together")
    fields[PREFIX + "tokens"] = [*tokens, *(f"[PAD{i}]" for i in range(len(tokens), n_rows))]
    fields[PREFIX + "token_type"] = [*fields[PREFIX + "token_type"], *[UNUSED] * missing]
    if PREFIX + "scores" in fields:
        fields[PREFIX + "scores"] = [*fields[PREFIX + "scores"], *[-1000.0] * missing]
    return fields


# -------------------------------------------------------------------- byte-level vocabularies


def _json(tokenizer: Tokenizer, vocabulary: Mapping[str, bytes]) -> dict[str, Any]:
    """From tokenizer.json, or GPT-2's two files."""
    if "tokenizer.json" in vocabulary:
        content = json.loads(vocabulary["tokenizer.json"])
        model, added = content["model"], content.get("added_tokens") or []
        splits, merges = splits_of(content.get("pre_tokenizer")), model["merges"]
        vocab, whole = model["vocab"], bool(model.get("ignore_merges"))
    else:
        vocab, added, splits, whole = json.loads(vocabulary["vocab.json"]), [], [SPLIT_GPT2], False
        lines = vocabulary["merges.txt"].decode().split("\n")
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    matched = {t["content"]: int(t["id"]) for t in added if not t.get("special")}
    pairs = [m if isinstance(m, str) else " ".join(m) for m in merges]
    return _byte_level(vocab, pairs, splits, matched, tokenizer.special_ids, whole)


def splits_of(node: Any) -> list[str]:
    """The regular expressions of a tokenizer.json's pre-tokenizer, one after another."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [split for part in node["pretokenizers"] for split in splits_of(part)]
    if node["type"] == "Split" and "Regex" in node["pattern"]:
        return [node["pattern"]["Regex"]]
    if node["type"] == "Digits":
        return [r"\p{N}" if node.get("individual_digits") else r"\p{N}+"]
    if node["type"] == "ByteLevel":
        return [SPLIT_GPT2] if node.get("use_regex", True) else []
    raise ValueError(f"GGUF has no name for a vocabulary that cuts text by {node['type']}: convert to openglm or hf")


def _tiktoken(ranks: Mapping[bytes, int], config: Mapping[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """Ranks are the order in which pairs merge; a pair's halves are what the earlier merges make of a token."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = zip(parts, parts[1:], strict=False)
            first, at = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairs))
            if first >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(_symbols, parts)))
    vocab = {_symbols(token): rank for token, rank in ranks.items()}
    split = config.get("split") or GGUF_SPLITS["glm4"][0]
    return _byte_level(vocab, merges, [split], config.get("matched") or {}, special, False)


def _symbols(data: bytes) -> str:
    return "".join(map(symbol_of_byte, data))


def _byte_level(
    vocab: Mapping[str, int], merges: Sequence[str], splits: Sequence[str], matched: Mapping[str, int],
    special: Mapping[str, int], whole_words: bool,
) -> dict[str, Any]:  # fmt: skip
    names = [name for name in NAMES if GGUF_SPLITS[name] == list(splits)]
    if whole_words and "glm4" in names:
        names = [WHOLE_WORDS]
    if not names or (whole_words and names != [WHOLE_WORDS]):
        raise ValueError("GGUF has no name for the way this vocabulary cuts text: convert to openglm or hf instead")
    table = {i: (token, NORMAL) for token, i in vocab.items()}
    table |= {i: (token, USER_DEFINED) for token, i in matched.items()}
    fields = _tokens(table | {i: (name, CONTROL) for name, i in special.items()})
    return {PREFIX + "model": "gpt2", PREFIX + "pre": names[0], **fields, PREFIX + "merges": list(merges)}


def _tokens(table: Mapping[int, tuple[str, int]]) -> dict[str, Any]:
    rows = [table.get(i, (f"[PAD{i}]", UNUSED)) for i in range(max(table) + 1)]
    return {PREFIX + "tokens": [token for token, _ in rows], PREFIX + "token_type": [kind for _, kind in rows]}


# -------------------------------------------------------------------- SentencePiece


def _sentencepiece(model: bytes, tokenizer: Tokenizer) -> dict[str, Any]:
    """From a model file, a protobuf message: field 1 a piece, field 2 the trainer's settings (of which 3: 2 is BPE),
    field 3 the normaliser's (2: its table, 4: whether runs of spaces are cut).
    """
    pieces, is_bpe = [], False
    normaliser: dict[int, bytes] = {}
    for number, payload in _messages(model):
        if number == 1:
            values = dict(_messages(payload))
            score = struct.unpack("<f", values.get(2, bytes(4)))[0]
            pieces.append((values[1].decode(), score, int.from_bytes(values.get(3, bytes([NORMAL])), "little")))
        elif number == 2:
            is_bpe = dict(_messages(payload)).get(3, b"\x01") == b"\x02" or is_bpe
        elif number == 3:
            normaliser |= dict(_messages(payload))
    if not is_bpe:
        raise ValueError("GGUF's llama vocabulary is SentencePiece BPE, this one is another kind: convert to openglm")
    if normaliser.get(2) or normaliser.get(4, b"\x01") != b"\x00":
        raise ValueError("llama.cpp does not normalise text as this SentencePiece vocabulary does: convert to openglm")
    table = {i: (piece, kind) for i, (piece, _, kind) in enumerate(pieces)}
    fields = _tokens(table | {i: (name, CONTROL) for name, i in tokenizer.special_ids.items()})
    scores = [pieces[i][1] if i < len(pieces) else 0.0 for i in range(len(fields[PREFIX + "tokens"]))]
    unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]
    fields |= {PREFIX + "model": "llama", PREFIX + "scores": scores}
    fields[PREFIX + "add_space_prefix"] = tokenizer.encode("a") != tokenizer.encode("a", dummy_prefix=False)
    return fields | ({PREFIX + "unknown_token_id": unknown[0]} if unknown else {})


def _messages(data: bytes) -> list[tuple[int, bytes]]:
    """(number, content) of a protobuf message's fields; numbers as their bytes, of which small ones have one."""
    at, found = 0, []
    while at < len(data):
        tag, at = read_number(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = read_number(data, at)
            found.append((tag >> 3, value.to_bytes(max(1, (value.bit_length() + 7) // 8), "little")))
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = read_number(data, at)
        found.append((tag >> 3, data[at : at + size]))
        at += size
    return found
