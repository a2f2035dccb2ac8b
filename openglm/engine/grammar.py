"""Grammars: answers that are held to a JSON schema, a regular expression or an EBNF grammar, token by token.

    grammars = Grammars(tokenizer)
    engine = Engine(model, special_ids, tokenizer.vocab_size, grammar_state=grammars)
    engine.generate(ids, SamplingParams(grammar=Grammar("regex", "[0-9]{3}-[a-z]+")))

xgrammar (Dong et al. 2024) finds which tokens may follow; schemas and expressions are put in its notation by
`schema_to_ebnf` and `regex_to_ebnf`, since it passes over much of what they may say.

    python -m pytest -q tests/test_grammar.py
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from openglm.engine.json_grammar import json_to_ebnf
from openglm.engine.regex_grammar import regex_to_ebnf
from openglm.engine.schema_grammar import schema_to_ebnf
from openglm.tokenizer import Tokenizer
from openglm.types import Grammar

__all__ = ["Grammars", "TokenGrammar", "check_grammar"]

_MAX_COMPILED = 64  # grammars that are kept; one may take megabytes


def _xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError:
        raise ValueError("grammars need xgrammar: pip install 'openglm[grammar]'") from None
    return xgrammar


def to_ebnf(grammar: Grammar) -> str:
    """In xgrammar's notation, start symbol `root`. Raises ValueError naming what a grammar cannot say."""
    try:
        if grammar.kind == "json":
            return json_to_ebnf()
        if grammar.kind == "regex":
            return f"root ::= {regex_to_ebnf(grammar.text)}"
        if grammar.kind == "json_schema":
            return schema_to_ebnf(json.loads(grammar.text))
    except json.JSONDecodeError as error:
        raise ValueError(f"the JSON schema is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"the grammar of kind {grammar.kind} is nested too deeply") from None
    return grammar.text


def check_grammar(grammar: Grammar) -> None:
    """Raises ValueError for a grammar that says what cannot be held to, and where xgrammar is missing."""
    to_ebnf(grammar)
    _xgrammar()


class Grammars:
    """Makes the state of an answer for any `Grammar`; compiled grammars are kept. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, spelled: Iterable[str] = ()) -> None:
        """spelled: special tokens that whoever reads the answers takes for their names, such as </think>."""
        self._tokenizer = tokenizer
        special = tokenizer.special_ids
        self._names = {special[name]: name.encode() for name in spelled if name in special}
        self._lock, self._compiling = threading.Lock(), threading.Lock()
        self._compiled: OrderedDict[tuple[str, bool], Any] = OrderedDict()

    def __call__(self, grammar: Grammar) -> TokenGrammar:
        """A fresh state. Raises ValueError for a grammar that is damaged or says what cannot be held to."""
        text = to_ebnf(grammar)
        matchers = [self._matcher(text, False)]
        if self._drops_space and not grammar.continues:
            matchers.append(self._matcher(text, True))
        return TokenGrammar(matchers, self._starts_with_space, self._tokenizer.vocab_size)

    def _matcher(self, text: str, after_space: bool) -> Any:
        xgrammar = _xgrammar()
        key = (text, after_space)
        with self._lock:
            compiled = self._compiled.get(key)
        if compiled is None:
            with self._compiling:  # it may take seconds, in which what is known can be had
                compiled = self._compile(text, after_space)
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return xgrammar.GrammarMatcher(compiled)

    def _compile(self, text: str, after_space: bool) -> Any:
        xgrammar = _xgrammar()
        try:
            parsed = xgrammar.Grammar.from_ebnf(text)
            if after_space:
                parsed = xgrammar.Grammar.concat(xgrammar.Grammar.from_ebnf('root ::= " "'), parsed)
            return self._compiler.compile_grammar(parsed)
        except (RuntimeError, ValueError) as error:
            cause = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error).strip())
            raise ValueError(f"the grammar is damaged: {' '.join(cause.split())}") from None

    @cached_property
    def _compiler(self) -> Any:
        """Specials spell nothing, which xgrammar never allows; one more id than there are marks the end."""
        xgrammar, size = _xgrammar(), self._tokenizer.vocab_size
        spelled = [self._names.get(i) or self._tokenizer.token_bytes(i) for i in range(size)]
        info = xgrammar.TokenizerInfo(
            [*spelled, b"<end>"], xgrammar.VocabType.RAW, vocab_size=size + 1, stop_token_ids=[size]
        )
        return xgrammar.GrammarCompiler(info, cache_enabled=False)

    @cached_property
    def _starts_with_space(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        size = self._tokenizer.vocab_size
        return np.array([self._tokenizer.token_bytes(i)[:1] == b" " for i in range(size)], dtype=bool)

    @cached_property
    def _drops_space(self) -> bool:
        """Whether decoding drops a space in front of the first token, as of SentencePiece vocabularies."""
        spaced = np.flatnonzero(self._starts_with_space)
        return bool(len(spaced)) and not self._tokenizer.decode_bytes([int(spaced[0])]).startswith(b" ")


class TokenGrammar:
    """Where one answer stands.

    matchers: of the grammar; and, where decoding drops a space in front of the first token, of the grammar behind a
    space. The first token decides between them.
    """

    def __init__(
        self, matchers: list[Any], starts_with_space: np.ndarray[Any, np.dtype[np.bool_]], vocab_size: int
    ) -> None:
        self._matchers, self._starts_with_space, self._size = matchers, starts_with_space, vocab_size
        self._bits = np.zeros((1, vocab_size // 32 + 1), dtype=np.int32)  # vocab_size + 1 bits, rounded up
        self._next: np.ndarray[Any, np.dtype[np.bool_]] | None = None

    def _may_follow(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(vocab_size + 1,) bool; the last one: the answer may end."""
        if self._next is None:
            self._next = self._filled(self._matchers[0])
            if len(self._matchers) > 1:
                second = self._filled(self._matchers[1])
                self._next[:-1] = np.where(self._starts_with_space, second[:-1], self._next[:-1])
        return self._next

    def _filled(self, matcher: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
        import torch

        if not matcher.fill_next_token_bitmask(torch.from_numpy(self._bits)):
            return np.ones(self._size + 1, dtype=bool)  # everything may follow, and the bits were left alone
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=self._size + 1)
        return bits.astype(bool)

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(vocab_size,) bool, the caller's own: ids of text that may come next.

        xgrammar lets a few too many through where something may be repeated more than 128 times: ask `accepts`.
        """
        return self._may_follow()[:-1].copy()

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete, be it that more may follow."""
        return bool(self._may_follow()[-1])

    @property
    def done(self) -> bool:
        """Whether it is complete and nothing may follow."""
        return self.may_end and not self._may_follow()[:-1].any()

    def _matcher_of(self, token_id: int) -> Any:
        return self._matchers[int(self._starts_with_space[token_id]) if len(self._matchers) > 1 else 0]

    def accepts(self, token_id: int) -> bool:
        """Whether this token may come next."""
        matcher = self._matcher_of(token_id)
        if not matcher.accept_token(token_id):
            return False
        matcher.rollback(1)
        return True

    def accept(self, token_id: int) -> None:
        """Move on by a token that is allowed."""
        self._matchers = [self._matcher_of(token_id)]
        accepted = self._matchers[0].accept_token(token_id)
        assert accepted, f"token {token_id} is not allowed here"
        self._next = None
