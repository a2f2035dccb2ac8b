"""openglm.engine.grammar: drawn at random, every answer is valid for `jsonschema`, `re` or `decimal`, and ends."""

from __future__ import annotations

import datetime
import decimal
import json
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from openglm.engine.grammar import Grammars, to_ebnf
from openglm.engine.number_grammar import Bound, integer_between, number_between
from openglm.engine.sampler import Sampler
from openglm.loading import resolve
from openglm.tokenizer import Tokenizer
from openglm.types import Grammar, SamplingParams
from tests.test_tokenizer_gguf import bpe_fields, spm_fields
from tests.test_tokenizer_sentencepiece import extended
from tests.tokenizer_helpers import train_sentencepiece

pytest.importorskip("xgrammar", reason="needs xgrammar, which is not installed: pip install 'openglm[grammar]'")

PERSON = {
    "type": "object",
    "properties": {"姓名": {"type": "string", "minLength": 1, "maxLength": 4}, "age": {"type": "integer", "minimum": 0,
                   "maximum": 130}, "城市": {"enum": ["北京", "上海", None]}},
    "required": ["姓名", "城市"],
}  # fmt: skip
TREE = {
    "$defs": {"node": {"type": "object", "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [
        {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}},
    "$ref": "#/$defs/node",
}  # fmt: skip
SHAPES = {
    "oneOf": [
        {"type": "object", "properties": {"kind": {"const": "circle"}, "r": {"type": "number", "exclusiveMinimum": 0}},
         "required": ["kind", "r"]},
        {"type": "object", "properties": {"kind": {"const": "square"}, "a": {"type": "integer"}},
         "required": ["kind", "a"], "additionalProperties": False},
        {"type": "null"},
    ]
}  # fmt: skip
SCHEMAS: list[Any] = [
    {}, {"type": "string"}, {"type": "number"}, {"type": ["integer", "null"]}, {"enum": [1, "二", None, {"x": [1.5]}]},
    {"const": "a\"b\\ \n中"}, {"type": "string", "enum": [1, "a"]}, {"properties": {"a": {"type": "integer"}}},
    {"type": "integer", "minimum": -17, "exclusiveMaximum": 1203}, {"type": "number", "minimum": 0.5, "maximum": 2.25},
    {"type": "string", "pattern": "^[A-Z]{2}-\\d{3,4}(\\.[^x\"]|“中文”)?$"},
    {"type": "string", "pattern": "\"\\\\\\S\\W."},
    {"type": "string", "minLength": 2, "maxLength": 3}, {"type": "array", "items": {"type": "integer"}, "minItems": 2},
    {"type": "array", "items": {"enum": ["甲", "乙"]}, "maxItems": 3}, {"type": "array", "maxItems": 0},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}]},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"type": "null"}, "minItems": 1,
     "maxItems": 4},
    {"type": "array", "items": {"type": "array", "items": PERSON, "maxItems": 1}, "minItems": 1, "maxItems": 2},
    {"type": "object", "properties": {}, "additionalProperties": False}, {"type": "object"},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
    {"type": "object", "properties": {"a": {"const": 1}, "ab": {"const": 2}}, "required": ["ab"],
     "additionalProperties": {"type": "boolean"}},
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["z", "a"]},
    {"type": "object", "additionalProperties": {"type": "integer", "minimum": 3}},
    {"type": "object", "properties": {"never": False, "quote\"d": {"const": True}}, "required": ["quote\"d"]},
    {"anyOf": [{"type": "integer", "maximum": -1}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
    {"allOf": [{"type": "boolean"}], "title": "one", "x-vendor": 1}, {"minimum": 3}, PERSON, TREE, SHAPES,
    {"type": "string", "maxLength": 500}, {"type": "string", "pattern": "^[^é]{130,200}$"},
    {"type": "object", "properties": {"when": {"type": "string", "format": "date-time"}, "day": {"type": "string",
     "format": "date"}, "id": {"type": "string", "format": "uuid"}, "ip": {"type": "string", "format": "ipv4"},
     "mail": {"type": "string", "format": "email"}}, "required": ["when", "day", "id", "ip", "mail"]},
]  # fmt: skip
REGEXES = [
    r"[a-c]{2,5}", r"\d{3}-\w+", r".{3}", r"[^x]", r"(?:ab|中文)+x?", r"\S\D\W", r"a{0}b{2,}", r"(a|b|)c",
    r"[\]\-\\^]+", r"\x41中\n\t", r"^a$|^b$", r"a{x}", r"(?P<n>a)+?c", r"[^\x00-\uffff]{2}", r"[]a]+",
    r" +[ab]*", r"\s{1,3}é", r"(是|否)，因为[^。]{1,8}。", r"-?(0|[1-9]\d*)(\.\d+)?",
]  # fmt: skip


def spelled_by_bytes() -> Tokenizer:
    """A vocabulary of ranks, as GLM-4's, without merges that matter."""
    import base64

    words = [bytes([i]) for i in range(256)] + [b'{"', b'":', b'", "', " 中".encode(), "中文".encode(), b"  ", b"true"]
    lines = [base64.b64encode(word) + f" {rank}\n".encode() for rank, word in enumerate(words)]
    return Tokenizer({"tokenizer.model": b"".join(lines)})


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "tiktoken": spelled_by_bytes,
    "chatglm": lambda: Tokenizer(
        {"tokenizer.model": train_sentencepiece(model_type="bpe", byte_fallback=True, vocab_size=600)}, roles=True
    ),
    "icetk": lambda: Tokenizer(
        {"ice_text.model": extended(train_sentencepiece(model_type="unigram", pad_id=3, user_defined_symbols=["<n>"])),
         "tokenizer_config.json": b'{"num_image_tokens": 0}'}
    ),
    "gguf-bpe": lambda: Tokenizer.from_gguf(bpe_fields("qwen2")[0]),
    "gguf-spm": lambda: Tokenizer.from_gguf(spm_fields()[0]),
}  # fmt: skip


@pytest.fixture(scope="module", params=["bpe", *MAKERS])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer) -> Tokenizer:
    return tiny_tokenizer if request.param == "bpe" else MAKERS[request.param]()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer)


def answer(tokenizer: Tokenizer, grammars: Grammars, grammar: Grammar, seed: int, **options: Any) -> tuple[str, bool]:
    """(text, whether it ended) of one answer to random logits; what closes strings and values grows likelier."""
    stop = max(tokenizer.special_ids.values())
    params = SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "seed": seed, "stop_ids": (stop,), "grammar": grammar,
                               "max_new_tokens": 600, **options})  # fmt: skip
    sampler = Sampler(params, [0], tokenizer.vocab_size, grammars(grammar))
    closers = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i).strip() in (b'"', b"}", b"]", b"1")]
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for step in range(params.max_new_tokens):
        logits = 2.0 * torch.randn(tokenizer.vocab_size + 24, generator=generator)  # 24: rows of padding
        logits[tokenizer.vocab_size :] = 50.0
        logits[[*closers, stop]] += 0.1 * min(step, 150)
        drawn = sampler.draw(logits)
        assert drawn.error is None
        sampler.accept(drawn.token_id)
        if drawn.token_id == stop:
            break
        ids.append(drawn.token_id)
        assert tokenizer.token_bytes(drawn.token_id), "specials and padding are never drawn"
        if sampler.done:
            break
    ended = len(ids) < params.max_new_tokens
    return tokenizer.decode_bytes(ids, continues=grammar.continues).decode("utf-8" if ended else "latin-1"), ended


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s, ensure_ascii=True)[:50])
def test_answers_are_valid_for_their_schema(tokenizer: Tokenizer, grammars: Grammars, schema: Any) -> None:
    grammar = Grammar("json_schema", json.dumps(schema, ensure_ascii=False))
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for seed in range(4):
        text, ended = answer(tokenizer, grammars, grammar, seed)
        assert ended, text
        checker.validate(json.loads(text))


@pytest.mark.parametrize("pattern", REGEXES)
def test_answers_match_their_expression(tokenizer: Tokenizer, grammars: Grammars, pattern: str) -> None:
    for continues in (False, True):
        for seed in range(6):
            text, ended = answer(tokenizer, grammars, Grammar("regex", pattern, continues), seed)
            assert ended and re.fullmatch(pattern, text), (pattern, text)


def test_any_json_and_ebnf(tokenizer: Tokenizer, grammars: Grammars) -> None:
    for seed in range(8):
        text, ended = answer(tokenizer, grammars, Grammar("json"), seed)
        assert ended
        json.loads(text)
        text, ended = answer(tokenizer, grammars, Grammar("ebnf", 'root ::= "(" root ")" | "中" [0-9]'), seed)
        assert ended and re.fullmatch(r"\(*中[0-9]\)*", text) and text.count("(") == text.count(")")


def test_time_of_day() -> None:
    schema, tokenizer = {"type": "string", "format": "time"}, spelled_by_bytes()
    for seed in range(20):
        text, _ = answer(tokenizer, Grammars(tokenizer), Grammar("json_schema", json.dumps(schema)), seed)
        assert datetime.time.fromisoformat(json.loads(text)).tzinfo is not None


def test_the_real_vocabularies(shared_data: Any) -> None:
    """The bundled one and ChatGLM2/3's 64,789 pieces."""
    folders = [resolve(None), shared_data / "tokenizers" / "chatglm3"]
    for folder in folders:
        tokenizer = Tokenizer.load(folder)
        grammars = Grammars(tokenizer)
        for schema in (PERSON, SHAPES):
            for seed in range(2):
                text, ended = answer(tokenizer, grammars, Grammar("json_schema", json.dumps(schema)), seed)
                assert ended
                jsonschema.validate(json.loads(text), schema)
        text, ended = answer(tokenizer, grammars, Grammar("regex", r"(是|否)，因为[^。]{1,8}。"), 0)
        assert ended and re.fullmatch(r"(是|否)，因为[^。]{1,8}。", text)


# -------------------------------------------------------------------- where an answer ends


def test_stop_ids_come_only_where_the_grammar_may_end() -> None:
    tokenizer = spelled_by_bytes()
    stop = tokenizer.special_ids["<|user|>"]
    params = SamplingParams(temperature=0.0, stop_ids=(stop,), grammar=Grammar("regex", "a{2,4}"))
    sampler = Sampler(params, [0], tokenizer.vocab_size, Grammars(tokenizer)(params.grammar))  # type: ignore[arg-type]
    eager = torch.zeros(tokenizer.vocab_size)
    eager[stop] = 9.0
    ids: list[int] = []
    while not ids or ids[-1] != stop:
        ids.append(sampler.draw(eager).token_id)
        sampler.accept(ids[-1])
    assert ids == [ord("a"), ord("a"), stop]


@pytest.mark.parametrize("least,length", [(0, 2), (3, 3), (9, 4)])
def test_min_new_tokens_holds_as_far_as_the_grammar_goes_on(least: int, length: int) -> None:
    tokenizer = spelled_by_bytes()
    stop = tokenizer.special_ids["<|user|>"]
    params = SamplingParams(
        temperature=0.0, stop_ids=(stop,), grammar=Grammar("regex", "a{2,4}"), min_new_tokens=least,
        logit_bias={stop: 9},
    )
    sampler = Sampler(params, [0], tokenizer.vocab_size, Grammars(tokenizer)(params.grammar))  # type: ignore[arg-type]
    n = 0
    while not sampler.done:
        drawn = sampler.draw(torch.zeros(tokenizer.vocab_size))
        if drawn.token_id == stop:
            break
        sampler.accept(drawn.token_id)
        n += 1
    assert n == length and sampler.done is (length == 4)


def test_a_model_without_the_bytes_for_an_answer_ends_with_an_error() -> None:
    tokenizer = spelled_by_bytes()
    grammar = Grammar("regex", "ab")
    params = SamplingParams(grammar=grammar, logit_bias={ord("a"): -np.inf})
    drawn = Sampler(params, [0], tokenizer.vocab_size, Grammars(tokenizer)(grammar)).draw(torch.zeros(300))
    assert isinstance(drawn.error, ValueError) and "no token is possible" in str(drawn.error)


def test_states_are_independent_and_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = spelled_by_bytes()
    grammars = Grammars(tokenizer)
    first, second = grammars(Grammar("regex", "ab")), grammars(Grammar("regex", "ab"))
    first.accept(ord("a"))
    assert np.flatnonzero(first.allowed()).tolist() == [ord("b")]
    assert np.flatnonzero(second.allowed()).tolist() == [ord("a")]
    assert len(grammars._compiled) == 1
    for i in range(70):
        grammars(Grammar("regex", f"x{i}"))
    assert len(grammars._compiled) == 64


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "schema,words",
    [
        ({"type": "integer", "multipleOf": 3}, "the keyword 'multipleOf' is not supported"),
        ({"properties": {"a": {"uniqueItems": True}}}, "the schema.properties.a: the keyword 'uniqueItems'"),
        ({"not": {}}, "'not'"), ({"if": {}}, "'if'"), ({"contains": {}}, "'contains'"),
        ({"nullable": True}, "'nullable'"),
        ({"patternProperties": {}}, "'patternProperties'"), ({"propertyNames": {}}, "'propertyNames'"),
        ({"minProperties": 1}, "'minProperties'"), ({"dependentRequired": {}}, "'dependentRequired'"),
        ({"type": "string", "format": "uri"}, "'format' 'uri' is not supported: known are date"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "only one is supported"),
        ({"type": "string", "pattern": "(?=a)b"}, "looking ahead or behind"),
        ({"type": "string", "pattern": 1}, "'pattern' must be text"),
        ({"type": "string", "minimum": 1}, "'minimum' says nothing about type string"),
        ({"type": "string", "enum": [1]}, "no value of 'enum'"), ({"enum": []}, "'enum' must be a list"),
        ({"enum": [1], "minimum": 0}, "'minimum' beside 'enum'"), ({"type": "funny"}, "'type' must be of object"),
        ({"anyOf": [{}], "type": "object"}, "'type' beside 'anyOf'"), ({"anyOf": []}, "'anyOf' must be a list"),
        ({"allOf": [{}, {}]}, "'allOf' of several"), ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
        ({"oneOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"a": {"const": 2}}}]}, "'oneOf'"),
        ({"$ref": "http://x/y"}, "'$ref' 'http://x/y'"), ({"$ref": "#/$defs/x"}, "points at nothing"),
        ({"$ref": "#"}, "leads back to itself"), ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "leads back to itself"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object", "additionalProperties": False},
         "leads back to itself without an end"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "no integer lies between"),
        ({"minimum": "1"}, "'minimum' must be"),
        ({"type": "number", "exclusiveMinimum": 2, "maximum": 2}, "no number lies between"),
        ({"type": "string", "minLength": 3, "maxLength": 1}, "'minLength' is above 'maxLength'"),
        ({"type": "array", "minItems": -1}, "'minItems' must be"),
        ({"type": "array", "items": False, "minItems": 1}, "'minItems' is above"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'required' names 'a'"),
        ({"type": "object", "required": "a"}, "'required' must be a list"), (False, "must be an object, not false"),
        ([], "must be an object"), ({"properties": {"a": False}, "required": ["a"]}, "not false"),
        ({"const": "\ud800"}, "surrogate"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_held_to_name_the_keyword(schema: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        to_ebnf(Grammar("json_schema", json.dumps(schema)))


@pytest.mark.parametrize(
    "pattern",
    [r"(?=a)b", r"(?<!a)b", r"a**", r"\bx", r"(a)\1", "a^b", "(^a)", "a$b", "(a", "a)", "[a", "a{3,1}", "*a", r"\p{L}",
     "(?i)a", "[z-a]", "a\\", r"[\d-z]", r"\u12", "a{99999}"],
)  # fmt: skip
def test_expressions_that_cannot_be_held_to(pattern: str) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        to_ebnf(Grammar("regex", pattern))


def test_damaged_grammars_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(spelled_by_bytes())
    with pytest.raises(ValueError, match="the JSON schema is not JSON"):
        grammars(Grammar("json_schema", "{"))
    with pytest.raises(ValueError, match="nested too deeply"):
        grammars(Grammar("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000))
    with pytest.raises(ValueError, match="the grammar is damaged: "):
        grammars(Grammar("ebnf", "root ::= nothing"))
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(ValueError, match=r"pip install 'openglm\[grammar\]'"):
        grammars(Grammar("json"))


# -------------------------------------------------------------------- numbers


def within(value: decimal.Decimal, low: Bound | None, high: Bound | None) -> bool:
    above = low is None or value > low.value or (value == low.value and not low.strict)
    return above and (high is None or value < high.value or (value == high.value and not high.strict))


def test_bounds_of_numbers_digit_by_digit() -> None:
    """Numbers beside the bounds are let through if and only if they lie within; written without zeros to spare."""
    grammars, rng = Grammars(spelled_by_bytes()), random.Random(5)

    def bound() -> Bound | None:
        size, places = 10 ** rng.choice([1, 2, 4]), rng.choice([0, 1, 2, 3])
        value = decimal.Decimal(rng.randint(-size, size)).scaleb(-places)
        return Bound(value, rng.random() < 0.4) if rng.random() < 0.8 else None

    def fits(body: str, text: str) -> bool:
        state = grammars(Grammar("ebnf", f"root ::= {body}"))
        for char in text.encode():
            if not state.allowed()[char]:
                return False
            state.accept(char)
        return state.may_end

    for _ in range(60):
        low, high = bound(), bound()
        for make in (integer_between, number_between):
            try:
                body = make(low, high)
            except ValueError:
                body = ""
            for edge in (low, high, Bound(decimal.Decimal(0))):
                for step in ("0", "1", "-1", "0.001", "-0.001", "17.5"):
                    value = (edge or Bound(decimal.Decimal(7))).value + decimal.Decimal(step)
                    value = value.normalize() if make is number_between else value.to_integral_value()
                    if value or value.is_signed() is False:
                        assert (bool(body) and fits(body, f"{value:f}")) == within(value, low, high), (low, high, value)
