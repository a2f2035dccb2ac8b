"""SentencePiece vocabularies against the `sentencepiece` library: icetk, ChatGLM2/3, the Chinese GLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from openglm.tokenizer import Detokenizer, Tokenizer
from openglm.tokenizer.backend import ROLES
from openglm.tokenizer.sentencepiece import CONTROL, UNKNOWN, write_bpe_model
from tests.tokenizer_helpers import (
    BYTES,
    FUZZ,
    SAMPLES,
    TEXT,
    check_detokenizer,
    check_files,
    check_no_special,
    folder_of,
    train_sentencepiece,
)

ICE_COMMANDS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]


def extended(model: bytes, user_defined: bool = False) -> bytes:
    """The model with icetk's further pieces, by the library's own message classes.

    user_defined: the commands as pieces that text can match, which some files may have.
    """
    import sentencepiece.sentencepiece_model_pb2 as messages

    pb: Any = messages
    proto = pb.ModelProto.FromString(model)
    piece = pb.ModelProto.SentencePiece
    for name in ICE_COMMANDS:
        proto.pieces.append(piece(piece=name, score=0.0, type=4 if user_defined else 3))
    for name in ["<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]:
        proto.pieces.append(piece(piece=name, score=0.0, type=4))
    for b in range(256):
        proto.pieces.append(piece(piece=f"<0x{b:02X}>", score=0.0, type=6))
    proto.trainer_spec.byte_fallback = True
    return proto.SerializeToString()


def original_text(text: str) -> str:
    """The preprocessing as the original spells it: longest runs first, one length after the other."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for k in range(80, 1, -1):
        text = text.replace(" " * k, f"<|blank_{k}|>")
    return text


def original_decode(sp: sentencepiece.SentencePieceProcessor, ids: list[int]) -> str:
    text = sp.decode(ids).replace("<n>", "\n").replace("<|tab|>", "\t")
    for k in range(2, 81):
        text = text.replace(f"<|blank_{k}|>", " " * k)
    return text


@pytest.fixture(scope="module")
def ice_model() -> bytes:
    """130000 pieces in small: pad 3, <n> 4, no byte pieces yet."""
    return train_sentencepiece(model_type="unigram", pad_id=3, user_defined_symbols=["<n>"])


@pytest.fixture(scope="module")
def ice(ice_model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=extended(ice_model))


@pytest.fixture(scope="module")
def ice_v0(ice_model: bytes) -> Tokenizer:
    return Tokenizer({"ice_text.model": ice_model})


@pytest.fixture(scope="module")
def ice_v1(ice_model: bytes) -> Tokenizer:
    return Tokenizer({"ice_text.model": extended(ice_model), "tokenizer_config.json": b'{"num_image_tokens": 0}'})


@FUZZ
@given(text=TEXT.filter(lambda t: t.encode("utf-8", "ignore").decode() == t))
def test_icetk_is_the_librarys_with_the_original_preprocessing(
    ice: sentencepiece.SentencePieceProcessor, ice_v0: Tokenizer, ice_v1: Tokenizer, text: str
) -> None:
    """Both releases: the first counts from 20000 on and appends the commands itself, the second has them in it."""
    expected = ice.encode(original_text(text))
    assert ice_v1.encode(text) == expected
    assert ice_v0.encode(text) == [i + 20000 for i in expected]
    unprefixed = ice.encode("<n>" + original_text(text))[2:]
    assert ice_v1.encode(text, dummy_prefix=False) == unprefixed
    assert ice_v0.encode(text, dummy_prefix=False) == [i + 20000 for i in unprefixed]
    check_no_special(ice_v0, text)
    for tokenizer in (ice_v0, ice_v1):
        assert tokenizer.decode(tokenizer.encode(text)) == original_decode(ice, expected)
    if "\u2581" not in text:
        assert ice_v1.decode(expected) == text and ice_v1.decode(unprefixed, continues=True) == text


@FUZZ
@given(data=st.data())
def test_icetk_detokenizer_equals_decode(ice_v0: Tokenizer, ice_v1: Tokenizer, data: st.DataObject) -> None:
    check_detokenizer(ice_v1, data.draw(st.lists(st.integers(0, ice_v1.vocab_size - 1))))
    check_detokenizer(ice_v0, data.draw(st.lists(st.integers(19990, ice_v0.vocab_size - 1))))
    content = data.draw(BYTES)
    ids = ice_v0.encode_bytes(content)
    check_detokenizer(ice_v0, ids)
    if b"\xe2\x96\x81" not in content:
        assert ice_v0.decode_bytes(ids) == content


def test_icetk_ids_follow_the_number_of_pieces(ice_model: bytes, ice_v0: Tokenizer, ice_v1: Tokenizer) -> None:
    n = sentencepiece.SentencePieceProcessor(model_proto=ice_model).get_piece_size()
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>"]
    assert [ice_v0.special_ids[name] for name in names] == [20000 + n + i for i in range(6)]
    assert ice_v1.special_ids["[MASK]"] == n and ice_v1.special_ids["<sop>"] == n + 4
    assert (ice_v1.special_ids["</s>"], ice_v1.special_ids["<pad>"], ice_v0.special_ids["</s>"]) == (2, 3, 20002)
    assert ice_v1.encode("a\n\t", dummy_prefix=False)[-2:] == [4, n + 8]  # <n> 4, tab 130008
    assert ice_v1.encode("a" + " " * 5 + "a")[-2] == n + 9 + 3  # blank_k: 130009 + (k - 2)
    assert ice_v1.vocab_size == n + 344 and ice_v0.vocab_size == n + 20344  # 130344, not the 130528 rows
    assert ice_v0.prefix_ids == () and ice_v0.token_bytes(5) == b""
    assert (ice_v0.kind, ice_v0.n_text_ids) == ("icetk", n + 20344)


def test_icetk_offset_comes_from_the_files(ice_model: bytes, tmp_path: Path) -> None:
    n = sentencepiece.SentencePieceProcessor(model_proto=ice_model).get_piece_size()
    for i, (config, offset) in enumerate(
        [
            ({"gmask_token_id": n + 1}, 0),
            ({"gmask_token_id": n + 20001}, 20000),
            ({"vocab_size": n + 528}, 0),
            ({"vocab_size": n + 20528}, 20000),
        ]
    ):
        folder = folder_of(tmp_path / str(i), {"ice_text.model": ice_model, "config.json": config})
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.special_ids["[gMASK]"] == n + 1 + offset
        check_files(tokenizer, tmp_path / f"{i} again")
    for offset in (0, 20000):  # said beside the vocabulary, whatever a config's rows would say
        stated = json.dumps({"num_image_tokens": offset}).encode()
        rows = json.dumps({"vocab_size": n + 20528 - offset}).encode()
        files = {"ice_text.model": ice_model, "tokenizer_config.json": stated, "config.json": rows}
        assert Tokenizer(files).special_ids["[gMASK]"] == n + 1 + offset


def test_icetk_commands_in_text_are_spelled_out_even_if_the_file_would_match_them(ice_model: bytes) -> None:
    model = extended(ice_model, user_defined=True)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer({"ice_text.model": model, "tokenizer_config.json": b'{"num_image_tokens": 0}'})
    assert tokenizer.special_ids["[gMASK]"] in library.encode("a [gMASK]")
    check_no_special(tokenizer, "a [gMASK] <sop><eop> [MASK]")
    assert tokenizer.decode(tokenizer.encode("a [gMASK] <sop>")) == "a [gMASK] <sop>"


@pytest.fixture(scope="module")
def bpe_model() -> bytes:
    return train_sentencepiece(model_type="bpe", byte_fallback=True, vocab_size=600)


@pytest.fixture(scope="module")
def bpe(bpe_model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=bpe_model)


@pytest.fixture(scope="module")
def chatglm3(bpe_model: bytes) -> Tokenizer:
    return Tokenizer({"tokenizer.model": bpe_model}, roles=True)


@FUZZ
@given(text=TEXT.filter(lambda t: t.encode("utf-8", "ignore").decode() == t))
def test_chatglm_is_the_librarys(bpe: sentencepiece.SentencePieceProcessor, chatglm3: Tokenizer, text: str) -> None:
    ids = chatglm3.encode(text)
    assert ids == bpe.encode(text) and chatglm3.decode(ids) == bpe.decode(ids)
    check_no_special(chatglm3, text)
    if "\u2581" not in text:
        assert chatglm3.decode(ids) == text
        assert chatglm3.decode(chatglm3.encode(text, dummy_prefix=False), continues=True) == text


@FUZZ
@given(data=st.data())
def test_chatglm_bytes_and_detokenizer(chatglm3: Tokenizer, data: st.DataObject) -> None:
    content = data.draw(BYTES)
    ids = chatglm3.encode_bytes(content)
    if b"\xe2\x96\x81" not in content:
        assert chatglm3.decode_bytes(ids) == content
    check_detokenizer(chatglm3, ids)
    check_detokenizer(chatglm3, data.draw(st.lists(st.integers(0, chatglm3.vocab_size - 1))))


def test_every_segment_gets_its_own_space(chatglm3: Tokenizer, bpe: sentencepiece.SentencePieceProcessor) -> None:
    """A newline alone is two ids; text cut at a special has a space on both sides, dropped again on both."""
    space, newline = bpe.piece_to_id("\u2581"), bpe.piece_to_id("<0x0A>")
    assert chatglm3.encode("\n") == [space, newline]
    assert chatglm3.encode("\n", dummy_prefix=False) == [newline]
    user = chatglm3.special_ids["<|user|>"]
    ids = chatglm3.encode_marked("你好<|user|>\n", ["<|user|>"])
    assert ids == [*bpe.encode("你好"), user, space, newline]
    assert chatglm3.decode(ids) == "你好\n" and chatglm3.decode(ids, skip_special=False) == "你好<|user|>\n"
    assert chatglm3.token_bytes(space) == b" " and chatglm3.token_bytes(user) == b""
    detokenizer = Detokenizer(chatglm3, continues=True)
    assert detokenizer.feed(space) == " " and detokenizer.feed(user) == "" and detokenizer.feed(space) == ""


def test_chatglm_specials_follow_the_pieces(bpe_model: bytes, tmp_path: Path) -> None:
    n = sentencepiece.SentencePieceProcessor(model_proto=bpe_model).get_piece_size()
    folder = folder_of(tmp_path / "a", {"tokenizer.model": bpe_model, "config.json": {"model_type": "chatglm"}})
    second, third = Tokenizer.load(folder), Tokenizer.load(folder, roles=True)
    five = {"[MASK]": n, "[gMASK]": n + 1, "[sMASK]": n + 2, "<sop>": n + 3, "<eop>": n + 4}
    own = {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert second.special_ids == {**own, **five} and second.vocab_size == n + 5
    assert third.special_ids == {**own, **five, **{r: n + 5 + i for i, r in enumerate(ROLES)}}
    assert second.prefix_ids == third.prefix_ids == (n + 1, n + 3)
    check_files(second, tmp_path / "b")
    check_files(third, tmp_path / "c")


ADDED = {"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}


@pytest.mark.parametrize(
    "files, roles",
    [
        ({"tokenizer_config.json": ADDED}, True),
        ({"tokenizer_config.json": {"chat_template": "{% for m in messages %}<|user|>{% endfor %}"}}, True),
        ({"tokenization_chatglm.py": b'raise SystemExit(1)  # role_special_tokens = ["<|observation|>"]'}, True),
        ({"tokenization_chatglm.py": b"raise SystemExit(1)", "config.json": {"eos_token_id": [2, 3]}}, False),
        ({"generation_config.json": {"eos_token_id": [2, 64795, 64797]}}, True),
        ({"config.json": {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm3-6b", "eos_token_id": 2}}, True),
        ({"config.json": {"model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b", "eos_token_id": 2}}, False),
        ({}, False),
    ],
)
def test_what_decides_between_chatglm2_and_chatglm3(
    bpe_model: bytes, tmp_path: Path, files: dict[str, bytes | dict[str, object]], roles: bool
) -> None:
    """The folder's name does not, and the code is read as text."""
    files = {"config.json": {"model_type": "chatglm"}, **files, "tokenizer.model": bpe_model}
    for name in ("chatglm2-6b", "chatglm3-6b"):
        folder = folder_of(tmp_path / name, files)
        assert ("<|user|>" in Tokenizer.load(folder).special_ids) is roles
        assert "<|user|>" in Tokenizer.load(folder, roles=True).special_ids
        assert "<|user|>" not in Tokenizer.load(folder, roles=False).special_ids


def test_a_plain_model_has_its_control_pieces_alone(bpe_model: bytes) -> None:
    tokenizer = Tokenizer({"tokenizer.model": bpe_model, "config.json": b'{"model_type": "llama"}'})
    assert tokenizer.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2} and tokenizer.prefix_ids == ()


def test_chinese_glm(tmp_path: Path) -> None:
    model = train_sentencepiece(model_type="unigram", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    n = library.get_piece_size()
    tokenizer = Tokenizer.load(folder_of(tmp_path / "a", {"cog-pretrain.model": model}))
    names = {"<|endoftext|>": n, "[MASK]": n + 3, "<sop>": n + 6, "<eop>": n + 7, "[sMASK]": n + 8, "[gMASK]": n + 9}
    assert names.items() <= tokenizer.special_ids.items() and tokenizer.vocab_size == n + 10
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text) and tokenizer.decode(ids) == library.decode(ids)
        check_no_special(tokenizer, text)
        check_detokenizer(tokenizer, [*ids, n + 7, *ids])
    assert tokenizer.decode(tokenizer.encode_bytes(b"The \xff")) == library.decode(library.encode("The \ufffd"))
    check_files(tokenizer, tmp_path / "b")
    # The conversions for transformers list the ids themselves.
    added = {"[gMASK]": n + 7, "<|startofpiece|>": n + 6}
    other = Tokenizer.load(folder_of(tmp_path / "c", {"cog-pretrain.model": model, "added_tokens.json": added}))
    assert other.special_ids["[gMASK]"] == n + 7 and "<|startofpiece|>" not in other.special_ids


def test_written_model_files_are_the_librarys(bpe: sentencepiece.SentencePieceProcessor) -> None:
    """A model written from pieces, scores and types encodes as the trained one."""
    kinds = [
        UNKNOWN if bpe.is_unknown(i) else CONTROL if bpe.is_control(i) else 6 if bpe.is_byte(i) else 1
        for i in range(bpe.get_piece_size())
    ]
    pieces = [(bpe.id_to_piece(i), bpe.get_score(i), kind) for i, kind in enumerate(kinds)]
    written = sentencepiece.SentencePieceProcessor(model_proto=write_bpe_model(pieces))
    bare = Tokenizer({"tokenizer.model": write_bpe_model(pieces, dummy_prefix=False)})
    for text in SAMPLES:
        assert written.encode(text) == bpe.encode(text)
        assert bare.encode(text) == bare.encode(text, dummy_prefix=False) and bare.decode(bare.encode(text)) == text


@pytest.mark.parametrize("content", [b"", b"\x0a\xff", b"plain text, no model"])
@pytest.mark.parametrize("name", ["tokenizer.model", "ice_text.model"])
def test_damaged_model_files(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(ValueError, match="SentencePiece model|no piece '<n>'") as caught:
        Tokenizer.load(folder_of(tmp_path, {name: content}))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_model_without_newline_piece_is_not_icetk(bpe_model: bytes) -> None:
    with pytest.raises(ValueError, match="no piece '<n>'"):
        Tokenizer({"ice_text.model": bpe_model})
