"""Byte-level vocabularies against `tiktoken` and `tokenizers`: GLM-4's ranks, tokenizer.json, GPT-2's two files."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from openglm.tokenizer import Tokenizer
from openglm.tokenizer.patterns import SPLIT, SPLIT_QWEN2
from openglm.tokenizer.tiktoken import LONG_BLANK, Tiktoken
from openglm.tokenizer.train import train_bpe
from tests.conftest import TINY_TEXT
from tests.tokenizer_helpers import (
    BYTES,
    FUZZ,
    SAMPLES,
    TEXT,
    check_detokenizer,
    check_files,
    check_no_special,
    folder_of,
)

# The expression as the fact sheet gives it, not as the code builds it.
GLM4_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VALID = TEXT.filter(lambda t: t.encode("utf-8", "ignore").decode() == t)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    trained = train_bpe(TINY_TEXT, 600, at_most=True)
    return {trained.token_bytes(i): i for i in range(trained.n_text_ids)}


@pytest.fixture(scope="module")
def rank_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())


@pytest.fixture(scope="module")
def glm4(rank_file: bytes) -> Tokenizer:
    return Tokenizer({"tokenizer.model": rank_file})


@pytest.fixture(scope="module")
def glm4_library(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("glm-4", pat_str=GLM4_REGEX, mergeable_ranks=ranks, special_tokens={})


@FUZZ
@given(text=VALID)
def test_glm4_is_tiktokens(glm4: Tokenizer, glm4_library: tiktoken.Encoding, text: str) -> None:
    ids = glm4.encode(text)
    assert ids == glm4_library.encode_ordinary(text) and glm4.decode(ids) == text
    check_no_special(glm4, text)


@FUZZ
@given(data=st.data())
def test_glm4_bytes_and_detokenizer(glm4: Tokenizer, data: st.DataObject) -> None:
    content = data.draw(BYTES)
    ids = glm4.encode_bytes(content)
    assert glm4.decode_bytes(ids) == content
    check_detokenizer(glm4, ids)
    check_detokenizer(glm4, data.draw(st.lists(st.integers(0, glm4.vocab_size - 1))))


def test_glm4_specials_follow_the_ranks(glm4: Tokenizer, rank_file: bytes, tmp_path: Path) -> None:
    n = len(rank_file.splitlines())
    names = [
        "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
        "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    ]  # fmt: skip
    assert glm4.special_ids == {name: n + i for i, name in enumerate(names)}
    assert glm4.vocab_size == n + 14 and glm4.n_text_ids == n and glm4.kind == "tiktoken"
    assert glm4.prefix_ids == (n + 2, n + 4)
    added = {str(n + 5): {"content": "<eop>"}, str(n + 18): {"content": "<|code_prefix|>"}}
    config = {"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": added, "chat_template": "x"}
    model = {"model_type": "chatglm", "padded_vocab_size": 4096}
    files: dict[str, Any] = {"tokenizer.model": rank_file, "tokenizer_config.json": config, "config.json": model}
    codegeex4 = Tokenizer.load(folder_of(tmp_path / "a", files))
    assert codegeex4.special_ids == {**glm4.special_ids, "<|code_prefix|>": n + 18}
    assert codegeex4.vocab_size == n + 19 and codegeex4.token_bytes(n + 16) == b""
    check_files(codegeex4, tmp_path / "b")
    assert json.loads(codegeex4.files["tokenizer_config.json"])["chat_template"] == "x"


def test_long_runs_of_blanks_do_not_exhaust_the_stack(glm4: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (" " * (8 * LONG_BLANK), "x" + "\n" * LONG_BLANK + "  x"):
        assert glm4.decode(glm4.encode(text)) == text == glm4.decode(glm4.encode_batch([text])[0])
    short = ["a   b", "a \n\n  b", "   ", "1234567 x", *SAMPLES]
    expected = [glm4.encode(text) for text in short]
    monkeypatch.setattr("openglm.tokenizer.tiktoken._has_long_blank", lambda text: True)  # the other way, same ids
    assert [glm4.encode(text) for text in short] == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (b"IQ== 0\nnonsense\n", "line 2 is not"),
        (b"IQ== 0\nIg== 1\n", "holds 2 of the 256 single bytes"),
    ],
)
def test_damaged_rank_files(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(folder_of(tmp_path, {"tokenizer.model": content}))
    assert "\n" not in str(caught.value)


def byte_level(split: str | None = GLM4_REGEX, **model: Any) -> tokenizers.Tokenizer:
    """A library tokenizer whose specials come first, as some releases have them, trained on the tiny text."""
    library = tokenizers.Tokenizer(models.BPE(**model))
    cuts = [] if split is None else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<pad>"],
    )  # fmt: skip
    library.train_from_iterator(TINY_TEXT, trainer)
    return library


def _plain() -> tokenizers.Tokenizer:
    return byte_level()


def _glm4_0414() -> tokenizers.Tokenizer:
    """Specials after the vocabulary, and tokens that are no specials between them, which text does match."""
    library = byte_level()
    library.add_special_tokens(["[gMASK]", "<sop>", "<|user|>"])
    library.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False), "世界"])
    library.add_special_tokens(["<|observation|>"])
    return library


def _qwen2() -> tokenizers.Tokenizer:
    library = byte_level(SPLIT_QWEN2)
    library.normalizer = normalizers.NFC()
    library.add_tokens(["<tool_call>"])
    return library


def _whole_words() -> tokenizers.Tokenizer:
    library = byte_level(ignore_merges=True)
    begin = library.token_to_id("<|im_start|>")
    library.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    return library


def _llama() -> tokenizers.Tokenizer:
    """BPE in SentencePiece's manner, with the end token in the vocabulary and merges that make it."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
    )  # fmt: skip
    library.train_from_iterator([text.replace(" ", "\u2581") for text in TINY_TEXT * 2], trainer)
    config = json.loads(library.to_str())
    config["added_tokens"] = config["added_tokens"][:3]  # the library's trainer flags the bytes as well
    vocab = config["model"]["vocab"]
    for piece in ("</", "s>"):
        vocab[piece] = len(vocab)
    config["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    for piece in ("<", "/", ">"):
        vocab.setdefault(piece, len(vocab))
    return tokenizers.Tokenizer.from_str(json.dumps(config))


RELEASES = {"plain": _plain, "0414": _glm4_0414, "qwen2": _qwen2, "llama-3": _whole_words, "llama": _llama}


@pytest.fixture(scope="module", params=list(RELEASES))
def released(request: pytest.FixtureRequest) -> tuple[str, Tokenizer, tokenizers.Tokenizer]:
    library = RELEASES[request.param]()
    ours = Tokenizer({"tokenizer.json": library.to_str().encode()})
    library.encode_special_tokens = True  # the library's own way to keep specials out of text
    return request.param, ours, library


@FUZZ
@given(text=VALID)
def test_json_is_the_librarys(released: tuple[str, Tokenizer, tokenizers.Tokenizer], text: str) -> None:
    name, ours, library = released
    ids = ours.encode(text)
    if name != "llama" or "</s>" not in text:  # there the library's merges do give the special
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == library.decode(ids)
    check_no_special(ours, text)
    if name != "qwen2" and "\u2581" not in text:
        assert ours.decode(ids) == text


@FUZZ
@given(data=st.data())
def test_json_detokenizer(released: tuple[str, Tokenizer, tokenizers.Tokenizer], data: st.DataObject) -> None:
    _, ours, _ = released
    check_detokenizer(ours, data.draw(st.lists(st.integers(0, ours.vocab_size - 1))))
    check_detokenizer(ours, ours.encode_bytes(data.draw(BYTES)))


def test_json_files(released: tuple[str, Tokenizer, tokenizers.Tokenizer], tmp_path: Path) -> None:
    name, ours, library = released
    assert ours.kind == "json" and ours.vocab_size == library.get_vocab_size()
    check_files(ours, tmp_path)
    specials = {t.content: i for i, t in library.get_added_tokens_decoder().items() if t.special}
    assert ours.special_ids == specials
    assert ours.prefix_ids == ((1,) if name == "llama-3" else ())
    assert isinstance(ours._backend, Tiktoken) is (name in ("plain", "0414", "llama-3"))


def test_added_tokens_match_only_if_they_are_not_special() -> None:
    library = _glm4_0414()
    ours = Tokenizer({"tokenizer.json": library.to_str().encode()})
    assert [library.id_to_token(i) for i in (603, 604)] == ["<tool_call>", "世界"]
    ids = ours.encode("<tool_call>你好世界<|user|><|observation|>")
    assert [ids.count(i) for i in (603, 604)] == [1, 1]
    assert not set(ids) & set(ours.special_ids.values())
    assert library.token_to_id("<|user|>") in library.encode("<|user|>").ids  # what the library does unless told
    config = json.loads(library.to_str())
    for token in config["added_tokens"]:
        token["special"] = False  # a file that forgets the flag: the family's roles are specials all the same
    forgetful = Tokenizer({"tokenizer.json": json.dumps(config).encode()})
    assert {"[gMASK]", "<sop>", "<|user|>", "<|observation|>", "<|endoftext|>"} <= set(forgetful.special_ids)
    check_no_special(forgetful, "<|user|>[gMASK]<sop>")


def test_llamas_end_token_is_out_of_reach_of_its_merges() -> None:
    library = _llama()
    library.encode_special_tokens = True
    assert library.token_to_id("</s>") in library.encode("a</s>").ids
    ours = Tokenizer({"tokenizer.json": _llama().to_str().encode()})
    assert ours.decode(ours.encode("a</s>")) == "a</s>"
    check_no_special(ours, "a</s>")


def test_merges_out_of_order_stay_with_the_library() -> None:
    """tiktoken merges by id, the library by the list: where they differ, the list counts."""
    config = json.loads(byte_level().to_str())
    config["model"]["merges"] = [["l", "o"], ["h", "e"], ["he", "l"], *[m for m in config["model"]["merges"]]]
    vocab = config["model"]["vocab"]
    for piece in ("lo", "he", "hel"):
        vocab.setdefault(piece, max(vocab.values()) + 1)
    content = json.dumps(config)
    ours, library = Tokenizer({"tokenizer.json": content.encode()}), tokenizers.Tokenizer.from_str(content)
    assert not isinstance(ours._backend, Tiktoken)
    assert ours.encode("hello held") == library.encode("hello held").ids


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "of the kind 'Unigram'; only BPE"),
        ({"model": {"type": "BPE", "vocab": {}}}, "is damaged"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder WordPiece"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = {**json.loads(byte_level().to_str()), **change}
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(folder_of(tmp_path, {"tokenizer.json": config}))
    assert "\n" not in str(caught.value)


def test_gpt2_files(tmp_path: Path) -> None:
    library = byte_level(None)
    library.model.save(str(tmp_path))
    vocab, merges = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    peer = tokenizers.ByteLevelBPETokenizer(vocab, merges)
    ours = Tokenizer.load(tmp_path)
    n = peer.get_vocab_size()
    names = ["<sop>", "<eop>", "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]", "[dBLOCK]"]
    assert ours.special_ids == {"<|endoftext|>": 0, **{name: n + i for i, name in enumerate(names)}}
    assert (ours.kind, ours.n_text_ids, ours.vocab_size) == ("gpt2", n, n + 9)
    for text in SAMPLES:
        assert ours.encode(text) == peer.encode(text).ids and ours.decode(ours.encode(text)) == text
        check_no_special(ours, text)
        check_detokenizer(ours, [*ours.encode(text), n, 0, *ours.encode(text)])
    check_files(ours, tmp_path / "again")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|startofpiece|>": n, "[gMASK]": n + 7}))
    assert Tokenizer.load(tmp_path).special_ids["[gMASK]"] == n + 7
    (tmp_path / "vocab.json").write_bytes(b"{")
    with pytest.raises(ValueError, match="vocab.json is damaged"):
        Tokenizer.load(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer in") as caught:
        Tokenizer.load(folder_of(tmp_path, {"config.json": {"model_type": "chatglm"}}))
    assert "\n" not in str(caught.value)
    assert SPLIT == GLM4_REGEX
