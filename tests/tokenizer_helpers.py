"""What the tests of the tokenizers share: texts that stress them, tiny vocabularies of each kind, and the checks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from openglm.tokenizer import SPECIALS, Detokenizer, Tokenizer
from tests.conftest import TINY_TEXT

FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MARKS = [
    " ", "  ", " " * 7, " " * 80, " " * 81, " " * 163, "\n", "\n\n", "\r\n", "\t", "\t\t", "'S", "'re", "12345", "٣٤",
    "。", "你好", "世界", "e\u0301", "\x00", "def f(x):\n    return x\n", "🎉", "👩\u200d👩\u200d👧", "The quick brown",
    "Ａ", "</s>", "<s>", "<pad>", "<unk>", "<|im_start|>", "<tool_call>", *SPECIALS,
]  # fmt: skip
TEXT = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=8))).map("".join)
BYTES = st.lists(st.one_of(st.binary(max_size=6), TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")))).map(b"".join)
SAMPLES = [
    "Hello, world! It's 1998 and they've 1234567 things.", "你好，世界！今天天气怎么样？",
    "def f(x):\n\treturn  x + 1\n",
    "🎉 👩\u200d👩\u200d👧 龘", "", " ", "\n", "  leading and trailing  ", "\t\ttabs", "a" + " " * 100 + "b",
    *SPECIALS, "</s> <pad> <unk> <s>",
]  # fmt: skip


def train_sentencepiece(**options: Any) -> bytes:
    """A tiny SentencePiece model: of 400 pieces, without normalisation, spaces kept."""
    out = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 400, "hard_vocab_limit": False, "character_coverage": 1.0, "minloglevel": 2,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for t in TINY_TEXT * 3 for line in t.split("\n")]),
        model_writer=out,
        **{**defaults, **options},
    )
    return out.getvalue()


def folder_of(folder: Path, files: dict[str, bytes | dict[str, Any]]) -> Path:
    """Write files, dictionaries as JSON, into a folder whose name says nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def check_no_special(tokenizer: Tokenizer, text: str) -> None:
    """No special comes out of text, one by one or in a batch."""
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def check_detokenizer(tokenizer: Tokenizer, ids: list[int]) -> None:
    """One at a time gives what all at once gives, at the start of a text and within one."""
    for continues in (False, True):
        detokenizer = Detokenizer(tokenizer, continues=continues)
        for _ in range(2):  # it is as new after finish
            text = "".join([*(detokenizer.feed(i) for i in ids), detokenizer.finish()])
            assert text == tokenizer.decode(ids, continues=continues)
        assert tokenizer.decode_bytes(ids, continues=continues).decode("utf-8", "replace") == text


def check_files(tokenizer: Tokenizer, folder: Path) -> None:
    """The files make an equal tokenizer, saved or not."""
    tokenizer.save(folder)
    assert {p.name for p in folder.iterdir()} == set(tokenizer.files)
    for again in (Tokenizer.load(folder), Tokenizer(tokenizer.files)):
        assert again.fingerprint == tokenizer.fingerprint and again.kind == tokenizer.kind
        assert (again.special_ids, again.vocab_size) == (tokenizer.special_ids, tokenizer.vocab_size)
        assert (again.prefix_ids, again.n_text_ids) == (tokenizer.prefix_ids, tokenizer.n_text_ids)
        for text in SAMPLES:
            assert again.encode(text) == tokenizer.encode(text)
            assert again.encode(text, dummy_prefix=False) == tokenizer.encode(text, dummy_prefix=False)
        assert again._bytes == tokenizer._bytes
