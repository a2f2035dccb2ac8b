"""The tokenizer: exact round trips, specials out of reach of text, whole characters only, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openglm.tokenizer import SPECIALS, Detokenizer, Tokenizer
from openglm.tokenizer.bytes import bytes_of_symbol, symbol_of_byte
from openglm.tokenizer.tokenizer import CONFIG_FILE, MODEL_FILE
from openglm.tokenizer.train import MIN_VOCAB, train_bpe

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Text that stresses a tokenizer: names of specials, blanks, digits, CJK, emoji joined by U+200D, combining marks.
MARKS = [" ", "  ", "\n", "\r\n", "\t", "'S", "'re", "12345", "٣٤", "。", "你好", "世界", "e\u0301", "\x00", "\ufeff"]
PIECES = st.sampled_from([*SPECIALS, *MARKS, "🎉", "👩\u200d👩\u200d👧"])
TEXT = st.lists(st.one_of(PIECES, st.text(max_size=8))).map("".join)
BYTES = st.lists(st.one_of(st.binary(max_size=6), TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")))).map(b"".join)


@FUZZ
@given(text=TEXT)
def test_text_round_trips_and_never_gives_a_special(tiny_tokenizer: Tokenizer, text: str) -> None:
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode_bytes(ids) == text.encode("utf-8", "surrogatepass")
    assert not set(ids) & set(tiny_tokenizer.special_ids.values())
    assert tiny_tokenizer.encode_batch([text, "x"]) == [ids, tiny_tokenizer.encode("x")]


@FUZZ
@given(data=BYTES)
def test_bytes_round_trip(tiny_tokenizer: Tokenizer, data: bytes) -> None:
    ids = tiny_tokenizer.encode_bytes(data)
    assert tiny_tokenizer.decode_bytes(ids) == data
    assert tiny_tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert not set(ids) & set(tiny_tokenizer.special_ids.values())


def test_every_single_byte_round_trips(tiny_tokenizer: Tokenizer) -> None:
    for b in range(256):
        assert tiny_tokenizer.decode_bytes(tiny_tokenizer.encode_bytes(bytes([b]))) == bytes([b])


def test_valid_bytes_encode_as_text_does(tiny_tokenizer: Tokenizer) -> None:
    text = "The capital, 北京."
    assert tiny_tokenizer.encode_bytes(text.encode()) == tiny_tokenizer.encode(text)


@FUZZ
@given(data=st.data())
def test_detokenizer_over_any_split_equals_decode(tiny_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Ids need not come from encode: any sequence, with characters cut by specials or never finished."""
    ids = data.draw(
        st.one_of(
            st.lists(st.integers(0, tiny_tokenizer.vocab_size - 1)),
            TEXT.map(tiny_tokenizer.encode),
            BYTES.map(tiny_tokenizer.encode_bytes),
        )
    )
    detokenizer = Detokenizer(tiny_tokenizer)
    parts = [detokenizer.feed(i) for i in ids]
    parts.append(detokenizer.finish())
    assert "".join(parts) == tiny_tokenizer.decode(ids)
    assert detokenizer.feed(tiny_tokenizer.encode("a")[0]) == "a"


@FUZZ
@given(text=st.text(st.sampled_from("a 你好龘🎉👧é\u0301\u200d")))
def test_detokenizer_emits_whole_characters_only(tiny_tokenizer: Tokenizer, text: str) -> None:
    byte_by_byte = [i for b in text.encode() for i in tiny_tokenizer.encode_bytes(bytes([b]))]
    for ids in (tiny_tokenizer.encode(text), byte_by_byte):
        detokenizer = Detokenizer(tiny_tokenizer)
        parts = [detokenizer.feed(i) for i in ids]
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) == text and detokenizer.finish() == ""


def test_unfinished_character_becomes_a_replacement_at_the_end(tiny_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tiny_tokenizer)
    assert [detokenizer.feed(i) for i in tiny_tokenizer.encode_bytes("🎉".encode()[:3])] == ["", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_specials_come_last_and_only_marked_text_has_them(tiny_tokenizer: Tokenizer) -> None:
    t = tiny_tokenizer
    assert t.vocab_size == 600 and tuple(t.special_ids) == SPECIALS
    assert list(t.special_ids.values()) == list(range(590, 600))
    ids = t.encode_marked("Paris is [MASK] of <sop>[MASK]", ["[MASK]"])
    assert ids.count(t.special_ids["[MASK]"]) == 2 and t.special_ids["<sop>"] not in ids
    assert t.decode(ids) == "Paris is  of <sop>"
    assert t.decode(ids, skip_special=False) == "Paris is [MASK] of <sop>[MASK]"
    assert t.encode_marked("a [MASK]", []) == t.encode("a [MASK]")
    with pytest.raises(ValueError, match="no special token '<nope>'"):
        t.encode_marked("x", ["<nope>"])


def _library(tokenizer: Tokenizer) -> Any:
    """The same vocabulary in the `tokenizers` library."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer.files[MODEL_FILE].decode())


def test_text_is_cut_as_glm4_cuts_it(tiny_tokenizer: Tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [text[a:b] for _, (a, b) in _library(tiny_tokenizer).pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("1234567 I'LL they've") == ["123", "456", "7", " I", "'LL", " they", "'ve"]
    assert pieces("你好，世界 42!\n\n  x") == ["你好", "，世界", " ", "42", "!\n\n", " ", " x"]


def test_no_token_holds_more_than_three_digits() -> None:
    tokenizer = train_bpe(["123456789 " * 50, "2024年 " * 50, "00000000 " * 50], 300, at_most=True)
    for i in range(tokenizer.n_text_ids):
        assert sum(c.isdigit() for c in tokenizer.token_bytes(i).decode("utf-8", "replace")) <= 3


def test_merges_agree_with_a_plain_implementation(tiny_tokenizer: Tokenizer) -> None:
    """Byte-pair encoding written out: the earliest merge of the list first, one pair at a time."""
    model = json.loads(tiny_tokenizer.files[MODEL_FILE])["model"]
    ranks = {tuple(m if isinstance(m, list) else m.split(" ")): r for r, m in enumerate(model["merges"])}

    def encode_piece(symbols: list[str]) -> list[int]:
        while len(symbols) > 1:
            pairs = zip(symbols, symbols[1:], strict=False)
            rank, at = min((ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairs))
            if rank == 1 << 30:
                break
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [model["vocab"][s] for s in symbols]

    for text in ("The blank sentences they filled in 1998", "人工智能的首都，和后面的文化！", "couldn't  \n\n fly 🎉"):
        expected = []
        for piece, _ in _library(tiny_tokenizer).pre_tokenizer.pre_tokenize_str(text):
            expected += encode_piece(list(piece))
        assert tiny_tokenizer.encode(text) == expected


def test_sentence_ends(tiny_tokenizer: Tokenizer) -> None:
    ends = tiny_tokenizer.sentence_end_ids()
    for text in (".", "?", "!", "。", "\n", "\n\n"):
        ids = tiny_tokenizer.encode("x" + text)
        assert ids[-1] in ends and ids[0] not in ends
    assert not ends & set(tiny_tokenizer.special_ids.values())
    assert not ends & set(tiny_tokenizer.encode("fills the blank, 首都，"))


def test_byte_alphabet_is_the_librarys() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert {symbol_of_byte(b) for b in range(256)} == set(ByteLevel.alphabet())
    assert [bytes_of_symbol(symbol_of_byte(b)) for b in range(256)] == [bytes([b]) for b in range(256)]
    text = "aé 你\n"
    [(symbols, _)] = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert bytes_of_symbol(symbols) == text.encode()
    with pytest.raises(ValueError, match="byte alphabet"):
        bytes_of_symbol("你")


def test_save_and_load(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny_tokenizer.save(tmp_path / "t")
    again = Tokenizer.load(tmp_path / "t")
    assert again.fingerprint == tiny_tokenizer.fingerprint and len(again.fingerprint) == 64
    assert again.kind == "bpe" and again.special_ids == tiny_tokenizer.special_ids
    assert again.encode("你好, world") == tiny_tokenizer.encode("你好, world")
    assert {p.name for p in (tmp_path / "t").iterdir()} == {MODEL_FILE, CONFIG_FILE}
    assert train_bpe(["other text " * 9], 270, at_most=True).fingerprint != again.fingerprint


def _damage(kind: str, folder: Path) -> None:
    model, config = folder / MODEL_FILE, folder / CONFIG_FILE
    if kind == "missing":
        config.unlink()
    elif kind == "cut":
        model.write_bytes(model.read_bytes()[:1000])
    elif kind == "config":
        config.write_text('{"kind": "bpe"}')
    elif kind == "kind":
        config.write_text('{"kind": "morse", "special_ids": {}}')
    elif kind == "ids":
        config.write_text('{"kind": "bpe", "special_ids": {"[MASK]": 7}}')
    else:  # a tokenizer of the library with a special of its own, which would match inside text
        import tokenizers

        bpe = tokenizers.Tokenizer.from_file(str(model))
        bpe.add_special_tokens(["<|user|>"])
        bpe.save(str(model))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "cannot read tokenizer_config.json"),
        ("cut", "tokenizer.json is damaged"),
        ("config", "tokenizer_config.json is damaged"),
        ("kind", "unknown tokenizer kind 'morse'"),
        ("ids", "written for another tokenizer.json"),
        ("added", "holds added tokens"),
    ],
)
def test_damaged_files_give_one_line(tiny_tokenizer: Tokenizer, tmp_path: Path, kind: str, message: str) -> None:
    tiny_tokenizer.save(tmp_path)
    _damage(kind, tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_ids_outside_the_vocabulary(tiny_tokenizer: Tokenizer) -> None:
    for i in (-1, tiny_tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the tokenizer's 600 ids"):
            tiny_tokenizer.decode([i])


def test_too_small_a_vocabulary_and_too_little_text() -> None:
    with pytest.raises(ValueError, match="too small"):
        train_bpe(["text"], MIN_VOCAB - 1)
    with pytest.raises(ValueError, match="gives only 2[67][0-9] distinct tokens, 1000 were asked for") as caught:
        train_bpe(["the same line\n"] * 100, 1000)
    possible = int(str(caught.value).split("--vocab-size ")[1].split()[0])
    assert train_bpe(["the same line\n"] * 100, possible).vocab_size == possible
    assert train_bpe([], MIN_VOCAB).decode_bytes(train_bpe([], MIN_VOCAB).encode("é")) == "é".encode()
