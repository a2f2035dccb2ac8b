"""Packing and streams: nothing is lost or doubled, rows hold what they should, and a resume is exact."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openglm.data.example import KINDS, Example, Rows, causal_example, collate
from openglm.data.pack import Packer
from openglm.data.stream import ExampleSource, InfillSource, LMSource, PackedStream, Source, philox
from openglm.types import IGNORE

VOCAB = 50
NAMES = {"[MASK]": 50, "[gMASK]": 51, "[sMASK]": 52, "<sop>": 53, "<eop>": 54}
PAD = 55


class Corpus:
    """Documents in memory: every token of document i is unique to its place, modulo the vocabulary."""

    sentence_ends = frozenset({3, 7})

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths)
        self.n_documents = len(lengths)

    def lengths(self) -> np.ndarray:
        return self._lengths

    def document(self, index: int) -> np.ndarray:
        return ((np.arange(self._lengths[index]) + 13 * index) % VOCAB).astype(np.uint16)


def corpus(n: int = 60, seed: int = 0) -> Corpus:
    return Corpus(np.random.default_rng(seed).integers(1, 200, n).tolist())


def infill_stream(seed: int = 0, row_len: int = 64, **options: object) -> PackedStream:
    source = InfillSource(
        corpus(), row_len, NAMES, vocab_size=56, mix={"gmask": 0.5, "mask": 0.3, "smask": 0.2}, seed=seed
    )  # fmt: skip
    return PackedStream([source], row_len, PAD, seed=seed, **options)  # type: ignore[arg-type]


def same(a: Rows, b: Rows) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def lm_example(n: int, token: int = 1) -> Example:
    return causal_example(np.full(n + 1, token))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=80), st.integers(0, 6), st.integers(1, 10))
def test_packer_keeps_every_example_once(sizes: list[int], n_open: int, min_len: int) -> None:
    packer = Packer(40, n_open, min_len)
    rows = []
    for i, size in enumerate(sizes):
        packer.add((0, 0, i, 0), lm_example(size, i))
        while (row := packer.pop()) is not None:
            rows.append(row)
        assert len(packer.keys()["open"]) <= n_open
    held = [key[2] for row in packer.keys()["open"] for key in row]
    assert sorted([int(e.ids[0]) for row in rows for e in row] + held) == list(range(len(sizes)))
    assert all(sum(map(len, row)) <= 40 for row in rows)


def test_best_fit() -> None:
    packer = Packer(10, 4)
    for i, size in enumerate((7, 6, 3, 4)):  # 3 belongs behind 7, 4 behind 6
        packer.add((0, 0, i, 0), lm_example(size))
    assert [len(row) for row in (packer.pop(), packer.pop()) if row] == [2, 2]
    assert packer.keys() == {"open": [], "ready": []}


def test_collate() -> None:
    first = causal_example(np.arange(5))
    second = dataclasses.replace(
        causal_example(np.arange(10, 13)), context=np.array([True, False]), kind="gmask", weight=0.5
    )
    rows = collate([[first, second], []], 8, PAD)
    assert rows.ids.tolist() == [[0, 1, 2, 3, 10, 11, PAD, PAD], [PAD] * 8]
    assert rows.targets[0].tolist() == [1, 2, 3, 4, 11, 12, IGNORE, IGNORE]
    assert rows.segments.tolist() == [[0, 0, 0, 0, 1, 1, -1, -1], [-1] * 8]
    assert rows.positions[0, 0].tolist() == [0, 1, 2, 3, 0, 1, 0, 0]
    assert rows.context[0].tolist() == [False] * 4 + [True] + [False] * 3
    assert rows.weights[0].tolist() == [1, 1, 1, 1, 0.5, 0.5, 0, 0]
    assert rows.kinds[0, 4] == KINDS.index("gmask") and rows.n_tokens == 6
    assert [a.dtype.name for a in (rows.ids, rows.kinds, rows.weights)] == ["int64", "int8", "float32"]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.integers(1, 5), st.integers(0, 3))
def test_resume_is_exact(n_before: int, batch: int, seed: int) -> None:
    stream = infill_stream(seed)
    for _ in range(n_before):
        stream.next_rows(batch)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [stream.next_rows(batch) for _ in range(6)]
    resumed = infill_stream(seed)
    resumed.load_state_dict(state)
    assert all(same(a, resumed.next_rows(batch)) for a in expected)
    assert resumed.state_dict() == stream.state_dict()


def test_state_is_small_and_refuses_another_run() -> None:
    stream = infill_stream()
    stream.next_rows(200)
    state = stream.state_dict()
    assert len(json.dumps(state)) < 10_000
    with pytest.raises(ValueError, match="seed 0, this run 1"):
        infill_stream(1).load_state_dict(state)
    with pytest.raises(ValueError, match="row_len"):
        infill_stream(row_len=128).load_state_dict(state)


def test_batch_size_does_not_change_the_rows() -> None:
    one, many = infill_stream(), infill_stream()
    whole = many.next_rows(12)
    for i in range(12):
        row = one.next_rows(1)
        assert np.array_equal(row.ids[0], whole.ids[i])


def test_rows_of_infilling() -> None:
    """Every text token of a row belongs to one sample; shares of the kinds are by tokens; rows are nearly full."""
    stream = infill_stream(row_len=128)
    counts: Counter[str] = Counter()
    filled = 0
    for _ in range(60):
        rows = stream.next_rows(4)
        filled += rows.n_tokens
        used = rows.segments >= 0
        assert not used[~used].any() and (rows.ids[~used] == PAD).all() and (rows.targets[~used] == IGNORE).all()
        assert ((rows.targets != IGNORE) == (rows.weights > 0)).all()
        assert not (rows.context & (rows.targets != IGNORE)).any()
        for kind, n in zip(KINDS, np.bincount(rows.kinds[used], minlength=5), strict=True):
            counts[kind] += int(n)
        # a segment starts at position 0, and its context comes first
        starts = used & np.diff(rows.segments, axis=1, prepend=-2).astype(bool)
        assert not rows.positions[:, starts].any() and rows.context[starts].all()
    total = sum(counts.values())
    assert filled / (240 * 128) > 0.93
    assert abs(counts["gmask"] / total - 0.5) < 0.08 and counts["lm"] == 0


def test_every_epoch_covers_the_corpus_once() -> None:
    """Text of all windows of one epoch, put together, is the corpus without its rests under eight tokens."""
    documents = Corpus([100, 7, 8, 63, 130])
    source = InfillSource(documents, 64, NAMES, vocab_size=56, mix={"lm": 1.0})
    texts = [e.targets[e.targets != IGNORE] for unit in range(len(source)) for e in source.examples(0, unit)]
    whole = [documents.document(i)[start : start + 62] for i, start in
             ((0, 0), (0, 62), (2, 0), (3, 0), (4, 0), (4, 62))]  # fmt: skip
    ended = [False, True, True, False, False, False]  # 63 = 62 + 1 and 130 = 124 + 6: the rest is too short
    assert [t.tolist() for t in texts] == [
        [*w.tolist(), *([NAMES["<eop>"]] if end else [])] for w, end in zip(whole, ended, strict=True)
    ]


def test_orders_of_epochs_differ_and_are_permutations() -> None:
    stream = PackedStream([ExampleSource([lm_example(8, i) for i in range(10)])], 8, PAD, seed=3)
    rows = stream.next_rows(30).ids[:, 0].reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in rows.tolist())
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 3


def test_shares_of_sources_hold_by_tokens() -> None:
    """Instruction share: 5 % of the tokens although the examples are much shorter, from the first rows on."""
    text: Source = LMSource(corpus(), 64)
    chat = ExampleSource([lm_example(n, 49) for n in range(5, 25)])
    stream = PackedStream([text, chat], 64, PAD, shares=[0.95, 0.05])
    stream.next_rows(400)
    tokens = stream.state_dict()["tokens"]
    assert abs(tokens[1] / sum(tokens) - 0.05) < 0.002


def test_lm_windows_predict_every_token_but_the_first() -> None:
    documents = Corpus([150])
    source = LMSource(documents, 64)
    examples = [source.examples(0, unit)[0] for unit in range(len(source))]
    assert [len(e) for e in examples] == [64, 64, 21]
    assert np.concatenate([e.targets for e in examples]).tolist() == documents.document(0)[1:].tolist()
    assert all(e.positions[0].tolist() == list(range(len(e))) and not e.context.any() for e in examples)


@pytest.mark.parametrize("lengths", [[], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7], [40]])
def test_empty_corpus(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="empty corpus"):
        InfillSource(Corpus(lengths), 64, NAMES, vocab_size=56)
    with pytest.raises(ValueError, match="empty corpus"):
        LMSource(Corpus(lengths), 64)


def test_bad_settings() -> None:
    for mix, words in (
        ({"gmsk": 1.0}, "unknown kind 'gmsk'"),
        ({"mask": 0.0}, "at least one"),
        ({"mask": -1.0}, "mask"),
    ):
        with pytest.raises(ValueError, match=words):
            InfillSource(corpus(), 64, NAMES, vocab_size=56, mix=mix)
    with pytest.raises(ValueError, match="mask_window"):
        InfillSource(corpus(), 64, NAMES, vocab_size=56, mask_window=60)
    with pytest.raises(ValueError, match="positive shares"):
        PackedStream([LMSource(corpus(), 64)], 64, PAD, shares=[0.0])
    with pytest.raises(ValueError, match="no training examples"):
        ExampleSource([])


def test_samples_are_a_pure_function_of_their_numbers() -> None:
    a = philox(1, 2, 3, 4).random(5)
    assert np.array_equal(a, philox(1, 2, 3, 4).random(5))
    for other in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)):
        assert not np.array_equal(a, philox(*other).random(5))
