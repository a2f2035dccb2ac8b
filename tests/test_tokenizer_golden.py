"""The real ChatGLM2/3 vocabulary: published golden vectors and the original code's renderings, id for id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given

from openglm.tokenizer import Tokenizer
from openglm.tokenizer.backend import ROLES
from tests.tokenizer_helpers import FUZZ, TEXT, check_files, folder_of


@pytest.fixture(scope="session")
def vocabulary(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "chatglm3"


@pytest.fixture(scope="session")
def chatglm3(vocabulary: Path) -> Tokenizer:
    return Tokenizer.load(vocabulary)


@pytest.fixture(scope="session")
def chatglm2(vocabulary: Path) -> Tokenizer:
    return Tokenizer.load(vocabulary, roles=False)


@pytest.fixture(scope="session")
def codegeex2(chatglm3: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """CodeGeeX2's model file is ChatGLM2's without the dummy prefix: normalizer_spec {add_dummy_prefix: false}."""
    files = {"tokenizer.model": chatglm3.files["tokenizer.model"] + b"\x1a\x02\x18\x00"}
    code = {"tokenization_chatglm.py": b"class ChatGLMTokenizer: pass"}
    return Tokenizer.load(folder_of(tmp_path_factory.mktemp("anything"), {**files, **code}))


def test_golden_vectors(chatglm2: Tokenizer, chatglm3: Tokenizer, codegeex2: Tokenizer) -> None:
    head = [64790, 64792]
    assert [*chatglm2.prefix_ids, *chatglm2.encode("你好")] == [*head, 36474, 54591]
    assert [*chatglm2.prefix_ids, *chatglm2.encode("[Round 1]\n\n问：你好\n\n答：")] == [
        *head, 790, 30951, 517, 30910, 30939, 30996, 13, 13, 54761, 31211, 39701, 13, 13, 55437, 31211,
    ]  # fmt: skip
    special = chatglm3.special_ids
    chat = [special["<|user|>"], *chatglm3.encode("\n"), *chatglm3.encode("你好"), special["<|assistant|>"]]
    assert [*chatglm3.prefix_ids, *chat] == [*head, 64795, 30910, 13, 36474, 54591, 64796]
    code = codegeex2.encode("# language: Python\n# write a bubble sort function\n")
    assert [*codegeex2.prefix_ids, *code] == [
        *head, 31010, 3239, 30954, 16719, 13, 31010, 3072, 260, 17338, 3482, 1674, 13,
    ]  # fmt: skip


def test_codegeex2_has_no_dummy_prefix_and_no_roles(codegeex2: Tokenizer, chatglm2: Tokenizer) -> None:
    text = "# language: Python\n"
    assert codegeex2.encode(text) == chatglm2.encode(text, dummy_prefix=False) != chatglm2.encode(text)
    assert codegeex2.decode(codegeex2.encode(" x")) == " x" and chatglm2.decode(chatglm2.encode(" x")) == " x"
    assert codegeex2.special_ids == chatglm2.special_ids and not set(ROLES) & set(codegeex2.special_ids)


def test_ids_of_the_generations(chatglm2: Tokenizer, chatglm3: Tokenizer) -> None:
    """End tokens {2} and {2, 64795, 64797}; as many ids as the tokenizer has, not the 65024 rows of the table."""
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES]
    assert [chatglm3.special_ids[name] for name in names] == list(range(64789, 64798))
    assert chatglm3.special_ids["</s>"] == 2 and chatglm3.n_text_ids == 64789
    assert (chatglm2.vocab_size, chatglm3.vocab_size) == (64794, 64798)
    with pytest.raises(ValueError, match="outside the tokenizer's 64798 ids"):
        chatglm3.token_bytes(65023)


def test_original_renderings(chatglm2: Tokenizer, chatglm3: Tokenizer, shared_data: Path) -> None:
    golden = json.loads((shared_data / "golden" / "chat-chatglm3" / "renderings.json").read_text("utf-8"))
    for case in golden["plain"]:
        assert chatglm3.encode(case["text"]) == case["ids"]
        assert chatglm3.decode(case["ids"]) == case["text"]
    for case in golden["chatglm2_prompts"]:
        assert [*chatglm2.prefix_ids, *chatglm2.encode(case["prompt"])] == case["input_ids"]
    for case in golden["conversations"]:
        turns = [*case["history"], {"role": case["role"], "content": case["query"]}]
        if any("tools" in turn for turn in turns):
            continue
        ids = list(chatglm3.prefix_ids)
        for turn in turns:
            ids.append(chatglm3.special_ids[f"<|{turn['role']}|>"])
            ids += chatglm3.encode(f"{turn.get('metadata', '')}\n") + chatglm3.encode(turn["content"])
        assert [*ids, chatglm3.special_ids["<|assistant|>"]] == case["input_ids"], case["name"]


def test_a_literal_end_of_text_is_spelled_out(chatglm3: Tokenizer, vocabulary: Path) -> None:
    """The library reads it as id 2 from the same file; the original does not."""
    library = tokenizers.Tokenizer.from_file(str(vocabulary / "tokenizer.json"))
    assert 2 in library.encode("a</s>b", add_special_tokens=False).ids
    ids = chatglm3.encode("a</s>b")
    assert 2 not in ids and chatglm3.decode(ids) == "a</s>b"


@FUZZ
@given(text=TEXT.filter(lambda t: "</s>" not in t and t.encode("utf-8", "ignore").decode() == t))
def test_the_rest_is_as_the_library_reads_the_file(chatglm3: Tokenizer, vocabulary: Path, text: str) -> None:
    library = _library(vocabulary)
    if text and not any(name in text for name in ("<s>", "<unk>")):
        assert chatglm3.encode(text) == library.encode(text, add_special_tokens=False).ids


_LIBRARIES: dict[Path, tokenizers.Tokenizer] = {}


def _library(vocabulary: Path) -> tokenizers.Tokenizer:
    if vocabulary not in _LIBRARIES:
        _LIBRARIES[vocabulary] = tokenizers.Tokenizer.from_file(str(vocabulary / "tokenizer.json"))
    return _LIBRARIES[vocabulary]


def test_files_and_the_json_form(chatglm3: Tokenizer, vocabulary: Path, tmp_path: Path) -> None:
    """The rebuilt model file travels. Without a sign of ChatGLM, the same file is a tokenizer.json like any other."""
    assert chatglm3.kind == "sentencepiece" and set(chatglm3.files) == {"tokenizer.model", "tokenizer_config.json"}
    assert "chat_template" in json.loads(chatglm3.files["tokenizer_config.json"])
    check_files(chatglm3, tmp_path / "a")
    plain = Tokenizer({"tokenizer.json": (vocabulary / "tokenizer.json").read_bytes()})
    assert plain.kind == "json" and plain.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert plain.prefix_ids == (1,)
    for text in ("你好，世界！", "  two  leading", "\n\n", "🎉 龘", ""):
        ids = plain.encode(text)
        assert ids == chatglm3.encode(text) and plain.decode(ids) == text
        assert plain.decode(plain.encode(text, dummy_prefix=False), continues=True) == text
    assert 2 not in plain.encode("a</s>b") and plain.decode(plain.encode("a</s>b")) == "a</s>b"
    check_files(plain, tmp_path / "b")
