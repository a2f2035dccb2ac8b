"""Tokenizers in GGUF metadata: built from trained ones, compared with the library that trained them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from openglm.model.gguf_file import GgufFile
from openglm.tokenizer import Tokenizer
from openglm.tokenizer.tiktoken import Tiktoken
from tests.conftest import TINY_TEXT
from tests.tokenizer_helpers import (
    BYTES,
    FUZZ,
    SAMPLES,
    TEXT,
    check_detokenizer,
    check_files,
    check_no_special,
    train_sentencepiece,
)

VALID = TEXT.filter(lambda t: t.encode("utf-8", "ignore").decode() == t)
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


# How the releases that llama.cpp names so cut text, in the library's own components.
CUTS: dict[str, list[Any]] = {
    "llama-bpe": [split(WORDS + r"\p{N}{1,3}" + TAIL), LEVEL],
    "glm4": [split(WORDS + r"\p{N}{1,3}" + TAIL), LEVEL],
    "chatglm-bpe": [split(WORDS + r"\p{N}{1,3}" + TAIL), LEVEL],
    "qwen2": [split(WORDS + r"\p{N}" + TAIL), LEVEL],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "gpt-2": [GPT2],
    "default": [
        split(r"[\p{P}\$\+<=>\^~\|]+"),
        split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
        split(r"\p{N}+"),
        split("[0-9][0-9][0-9]"),
        LEVEL,
    ],
}


def bpe_fields(pre: str) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """Metadata as converters write it: tokens filled up with unused ones to the rows of the table."""
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    library.pre_tokenizer = pre_tokenizers.Sequence(CUTS[pre])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=560, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
    )
    library.train_from_iterator(TINY_TEXT, trainer)
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = ["<|endoftext|>", "<|im_start|>", "[gMASK]", "<sop>", "<|user|>"]
    types = [1] * len(tokens) + [3] * len(special) + [4, 5, 5]
    tokens += [*special, "<tool_call>", "[PAD1]", "[PAD2]"]
    library.add_special_tokens(special)
    library.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
    library.encode_special_tokens = True
    fields = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens) - 8, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    return fields, library


@pytest.fixture(scope="module", params=list(CUTS))
def bpe(request: pytest.FixtureRequest) -> tuple[str, Tokenizer, tokenizers.Tokenizer]:
    fields, library = bpe_fields(request.param)
    return request.param, Tokenizer.from_gguf(fields), library


@FUZZ
@given(text=VALID)
def test_bpe_is_the_librarys(bpe: tuple[str, Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    _, ours, library = bpe
    ids = ours.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids and ours.decode(ids) == text
    check_no_special(ours, text)
    check_detokenizer(ours, ids)


def test_bpe_files_and_ids(bpe: tuple[str, Tokenizer, tokenizers.Tokenizer], tmp_path: Path) -> None:
    pre, ours, library = bpe
    n = library.get_vocab_size()
    assert ours.vocab_size == n  # unused tokens fill the table's rows; they are not the tokenizer's
    assert ours.special_ids == {t.content: i for i, t in library.get_added_tokens_decoder().items() if t.special}
    assert library.token_to_id("<tool_call>") in ours.encode("a<tool_call>b")
    assert ours.prefix_ids == ((n - 6,) if pre == "llama-bpe" else ())
    assert isinstance(ours._backend, Tiktoken) is (pre not in ("smollm", "default"))
    assert json.loads(ours.files["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
    check_files(ours, tmp_path)


def test_bos_follows_the_file() -> None:
    fields, _ = bpe_fields("qwen2")
    bos = fields["tokenizer.ggml.bos_token_id"]
    assert Tokenizer.from_gguf({**fields, "tokenizer.ggml.add_bos_token": True}).prefix_ids == (bos,)
    fields, _ = bpe_fields("llama-bpe")
    assert Tokenizer.from_gguf({**fields, "tokenizer.ggml.add_bos_token": False}).prefix_ids == ()


def test_without_a_pre_tokenizer_it_is_the_default() -> None:
    fields, library = bpe_fields("default")
    ours = Tokenizer.from_gguf({**fields, "tokenizer.ggml.pre": None})
    for text in SAMPLES:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def spm_fields() -> tuple[dict[str, Any], sentencepiece.SentencePieceProcessor]:
    sp = sentencepiece.SentencePieceProcessor(
        model_proto=train_sentencepiece(model_type="bpe", byte_fallback=True, vocab_size=600)
    )
    n = sp.get_piece_size()
    types = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in range(n)]
    fields = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(n)] + ["<|user|>"],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in range(n)] + [0.0],
        "tokenizer.ggml.token_type": [*types, 3], "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip
    return fields, sp


@pytest.fixture(scope="module")
def spm() -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    fields, sp = spm_fields()
    return Tokenizer.from_gguf(fields), sp


@FUZZ
@given(text=VALID, data=BYTES)
def test_sentencepiece_is_the_librarys(
    spm: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], text: str, data: bytes
) -> None:
    ours, sp = spm
    ids = ours.encode(text)
    assert ids == sp.encode(text) and ours.decode(ids) == sp.decode(ids)
    check_no_special(ours, text)
    check_detokenizer(ours, [*ids, ours.special_ids["<|user|>"], *ids])
    if b"\xe2\x96\x81" not in data:
        assert ours.decode_bytes(ours.encode_bytes(data)) == data


def test_sentencepiece_files_and_fields(
    spm: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], tmp_path: Path
) -> None:
    ours, sp = spm
    n = sp.get_piece_size()
    assert ours.special_ids == {"<s>": 1, "</s>": 2, "<|user|>": n} and ours.vocab_size == n + 1
    assert ours.prefix_ids == (1,) and ours.kind == "sentencepiece"
    check_files(ours, tmp_path)
    fields, _ = spm_fields()
    bare = Tokenizer.from_gguf({**fields, "tokenizer.ggml.add_space_prefix": False})
    assert bare.encode("The quick") == ours.encode("The quick", dummy_prefix=False) != ours.encode("The quick")
    assert bare.decode(bare.encode(" x")) == " x"


@pytest.mark.parametrize(
    "model, change, message",
    [
        ("llama", {"model": "rwkv"}, "model is 'rwkv'"),
        ("llama", {"model": None}, "tokenizer.ggml.model is missing"),
        ("llama", {"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ("llama", {"scores": None}, "tokenizer.ggml.scores is missing"),
        ("llama", {"scores": [0.0]}, "but 1 scores"),
        ("llama", {"token_type": [1]}, "but 1 token types"),
        ("gpt2", {"merges": None}, "tokenizer.ggml.merges is missing"),
        ("gpt2", {"pre": "morse"}, "unknown tokenizer.ggml.pre 'morse'"),
        ("gpt2", {"merges": ["zz yy"]}, "cannot be read"),
    ],
)
def test_fields_that_cannot_be_read(model: str, change: dict[str, Any], message: str) -> None:
    fields = spm_fields()[0] if model == "llama" else bpe_fields("qwen2")[0]
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_gguf({**fields, **{f"tokenizer.ggml.{name}": value for name, value in change.items()}})
    assert "\n" not in str(caught.value)


def test_an_ordinary_word_is_not_a_special() -> None:
    """Vocabularies hold words such as MASK and sop; only control tokens are specials."""
    fields, _ = bpe_fields("qwen2")
    tokens = [*fields["tokenizer.ggml.tokens"], "MASK"]
    types = [*fields["tokenizer.ggml.token_type"], 1]
    ours = Tokenizer.from_gguf({**fields, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})
    assert "[MASK]" not in ours.special_ids and ours.token_bytes(len(tokens) - 1) == b"MASK"


@pytest.mark.parametrize("odd", [[], ["x" * 300], [""], ["two\nlines"], ["a\0b"], ["\0" * 9], ["春" * 80, "", "y"]])
def test_string_arrays_are_what_the_library_wrote(odd: list[str], tmp_path: Path) -> None:
    """Thousands of short strings are read in one pass, others one by one; the odd ones may be anywhere."""
    gguf = pytest.importorskip("gguf")
    short = [f"{'词' * (i % 5)}{i}" for i in range(10_000)]
    for at in (0, 4095, 4096, 9_999, 10_000):
        strings = short[:at] + odd + short[at:]
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_array("some.strings", strings)
        writer.add_uint32("some.end", 7)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        fields = GgufFile(tmp_path / "m.gguf").fields
        assert fields["some.strings"] == strings and fields["some.end"] == 7


def test_merges_out_of_the_ids_order_are_the_librarys() -> None:
    """tiktoken goes by ids alone: a file whose merges say otherwise must not become one."""
    fields, _ = bpe_fields("qwen2")
    merges = fields["tokenizer.ggml.merges"]
    changes = {
        "swapped": [*merges[:40], merges[41], merges[40], *merges[42:]], "short": merges[:-1],
        "first halves": [merges[0], *merges[:-1]], "three parts": [*merges[:-1], f"{merges[-1]} x"],
    }  # fmt: skip
    for name, changed in changes.items():
        try:
            ours = Tokenizer.from_gguf({**fields, "tokenizer.ggml.merges": changed})
        except ValueError:
            assert name == "three parts"
        else:
            assert name != "three parts" and not isinstance(ours._backend, Tiktoken), name
