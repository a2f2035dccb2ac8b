"""Tokenizer files for Hugging Face: transformers reads them and gives our ids, prefix and chat template."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from openglm.model.gguf_tokenizer import NORMAL, gguf_tokenizer_fields
from openglm.model.hf_tokenizer import hf_tokenizer_files
from openglm.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox, 12345 times!", "你好，世界。今天是2024年。", "def f(x):\n    return x ** 2\n",
    "  two  spaces", "café — naïve 😀 \t tab", "a", "\n\n",
]  # fmt: skip
TEMPLATE = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"


def read_back(folder: Path, tokenizer: Tokenizer, template: str | None = None) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the test extra: transformers")
    for name, content in hf_tokenizer_files(tokenizer, template, (tokenizer.special_ids["<|user|>"],)).items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


def check(theirs: Any, tokenizer: Tokenizer, folder: Path) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.encode(text) == [*tokenizer.prefix_ids, *ids]
    for name, i in tokenizer.special_ids.items():
        assert theirs.convert_tokens_to_ids(name) == i
    assert theirs.eos_token == "<|user|>"
    again = Tokenizer.load(folder)  # and we read them back
    assert [again.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert again.special_ids == tokenizer.special_ids and again.prefix_ids == tokenizer.prefix_ids


def test_our_own_vocabulary(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = read_back(tmp_path, tiny_tokenizer, TEMPLATE)
    check(theirs, tiny_tokenizer, tmp_path)
    ids = theirs.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
    special = tiny_tokenizer.special_ids
    assert ids == [special["[gMASK]"], special["<sop>"], special["<|user|>"], *tiny_tokenizer.encode("\nhi")]


def test_a_tiktoken_vocabulary(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    ranks = b"".join(
        base64.b64encode(tiny_tokenizer.token_bytes(i)) + b" %d\n" % i for i in range(tiny_tokenizer.n_text_ids)
    )
    tokenizer = Tokenizer({"tokenizer.model": ranks})
    assert tokenizer.kind == "tiktoken" and len(tokenizer.prefix_ids) == 2
    check(read_back(tmp_path, tokenizer), tokenizer, tmp_path)


def test_chatglm3s_sentencepiece_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizers" / "chatglm3", roles=True)
    assert tokenizer.kind == "sentencepiece"
    check(read_back(tmp_path, tokenizer), tokenizer, tmp_path)


def test_a_gguf_vocabulary_whose_specials_come_first(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As SmolLM2's: the `tokenizers` library numbers added tokens behind the vocabulary unless they are in it."""
    fields = gguf_tokenizer_fields(tiny_tokenizer)
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    order = sorted(range(len(tokens)), key=lambda i: (kinds[i] == NORMAL, i))
    fields["tokenizer.ggml.tokens"] = [tokens[i] for i in order]
    fields["tokenizer.ggml.token_type"] = [kinds[i] for i in order]
    tokenizer = Tokenizer.from_gguf({**fields, "tokenizer.ggml.pre": "smollm"})
    assert tokenizer.kind == "json" and max(tokenizer.special_ids.values()) == len(tokenizer.special_ids) - 1
    check(read_back(tmp_path, tokenizer), tokenizer, tmp_path)
