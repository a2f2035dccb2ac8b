"""tokenizer.json and tokenizer_config.json from any of our tokenizers, as transformers, vLLM and SGLang read them.

    hf_tokenizer_files(Tokenizer.load("folder"), chat_template, stop_ids)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from openglm.model.gguf_tokenizer import NORMAL, PREFIX, UNUSED, gguf_tokenizer_fields, splits_of
from openglm.tokenizer import Tokenizer
from openglm.tokenizer.bpe import added_token, byte_level_json
from openglm.tokenizer.patterns import GGUF_SPLITS

__all__ = ["cuts_like_qwen2", "hf_tokenizer_files"]

# Ours, and what would bring in the release's own spellings of special tokens or its code.
DROPPED = (
    "kind", "special_ids", "prefix_ids", "split", "matched", "id_offset", "auto_map", "do_lower_case",
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
)  # fmt: skip
METASPACE = "\u2581"


def hf_tokenizer_files(tokenizer: Tokenizer, template: str | None, stop_ids: Sequence[int]) -> dict[str, bytes]:
    """The two files by name. template: the chat template. stop_ids: the first that is a special becomes eos_token.

    Raises ValueError for a vocabulary that tokenizer.json cannot express (icetk, SentencePiece's unigram models).
    """
    files = tokenizer.files
    if tokenizer.kind == "json":
        content = _with_added_ids(files["tokenizer.json"])
    else:
        content = json.dumps(_tokenizer_json(tokenizer), ensure_ascii=False).encode()
    config = {k: v for k, v in json.loads(files["tokenizer_config.json"]).items() if k not in DROPPED}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    names = {i: name for name, i in tokenizer.special_ids.items()}
    end = next((names[i] for i in stop_ids if i in names), None)
    if end is not None:
        config["eos_token"] = end
        config.setdefault("pad_token", "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_ids else end)
    if template is not None:
        config["chat_template"] = template
    config["clean_up_tokenization_spaces"] = False
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    return {"tokenizer.json": content, "tokenizer_config.json": text.encode()}


def _with_added_ids(content: bytes) -> bytes:
    """The file, with added tokens in the vocabulary too where the library would give them other ids.

    It does not heed their "id": one that is not in the vocabulary goes behind all others.
    """
    value = json.loads(content)
    vocab, added = value["model"].get("vocab"), value.get("added_tokens") or []
    if not isinstance(vocab, dict):
        return content
    missing = {token["content"]: int(token["id"]) for token in added if token["content"] not in vocab}
    if list(missing.values()) == list(range(len(vocab), len(vocab) + len(missing))):
        return content
    vocab |= missing
    return json.dumps(value, ensure_ascii=False).encode()


def cuts_like_qwen2(tokenizer_json: bytes) -> bool:
    """Whether a tokenizer.json cuts text as Qwen2's does."""
    content = json.loads(tokenizer_json)
    try:
        return splits_of(content.get("pre_tokenizer")) == GGUF_SPLITS["qwen2"]
    except ValueError:
        return False


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    special = [added_token(i, name, True) for name, i in sorted(tokenizer.special_ids.items(), key=lambda e: e[1])]
    if tokenizer.kind == "bpe":
        value = {**json.loads(tokenizer.files["tokenizer.json"]), "added_tokens": special}
    else:
        fields = gguf_tokenizer_fields(tokenizer)
        vocab = {
            token: i
            for i, (token, kind) in enumerate(
                zip(fields[PREFIX + "tokens"], fields[PREFIX + "token_type"], strict=True)
            )
            if kind != UNUSED
        }
        if fields[PREFIX + "model"] == "gpt2":
            merges = [merge.split(" ") for merge in fields[PREFIX + "merges"]]
            value = byte_level_json(vocab, merges, GGUF_SPLITS[fields[PREFIX + "pre"]], special)
        else:
            value = _metaspace_json(vocab, fields, special)
    return {**value, "post_processor": _template(tokenizer)}


def _template(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The post-processor that puts prefix_ids in front of a text."""
    names = {i: name for name, i in tokenizer.special_ids.items()}
    prefix = [names[i] for i in tokenizer.prefix_ids]
    if not prefix:
        return None
    first = [{"SpecialToken": {"id": name, "type_id": 0}} for name in prefix]
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    tokens = {n: {"id": n, "ids": [tokenizer.special_ids[n]], "tokens": [n]} for n in prefix}
    return {"type": "TemplateProcessing", "single": [*first, a], "pair": [*first, a, b], "special_tokens": tokens}


def _metaspace_json(vocab: Mapping[str, int], fields: Mapping[str, Any], special: Sequence[Any]) -> dict[str, Any]:
    """A SentencePiece BPE vocabulary with byte fallback: pieces merge in the order of their scores."""
    scores, kinds = fields[PREFIX + "scores"], fields[PREFIX + "token_type"]
    found: list[tuple[float, int, int, str, str]] = []
    for piece, i in vocab.items():
        if kinds[i] != NORMAL:
            continue
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in vocab and right in vocab:
                found.append((-scores[i], vocab[left], vocab[right], left, right))
    merges = [[left, right] for *_, left, right in sorted(found)]
    prepend = [{"type": "Prepend", "prepend": METASPACE}] if fields[PREFIX + "add_space_prefix"] else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepend else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}
    back = {"type": "Replace", "pattern": {"String": METASPACE}, "content": " "}
    unknown = fields.get(PREFIX + "unknown_token_id")
    unknown_token = None if unknown is None else fields[PREFIX + "tokens"][unknown]
    return {
        "version": "1.0", "added_tokens": list(special),
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]}, "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown_token,
            "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
