"""Blank infilling: every example gives its window back, and its mask, positions and targets follow GLM's rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openglm.config import GLMConfig, RopeConfig
from openglm.data.example import Example
from openglm.data.infill import InfillParams, SpecialIds, infill, restore, sample_sentences, sample_spans
from openglm.model.batch import prompt_layout
from openglm.types import IGNORE

VOCAB = 100
NAMES = {"[MASK]": 100, "[gMASK]": 101, "[sMASK]": 102, "<sop>": 103, "<eop>": 104}
SPECIALS = SpecialIds.from_names(NAMES)
ENDS = np.arange(VOCAB + 5) < 12  # token ids 0..11 end a sentence
KINDS = ("mask", "smask", "gmask", "lm")


def make(n: int, kind: str, seed: int = 0, ends: bool = True, **params: object) -> tuple[np.ndarray, Example]:
    rng = np.random.default_rng(seed)
    window = rng.integers(0, VOCAB, n).astype(np.uint16)
    example = infill(
        window, kind, rng, SPECIALS, InfillParams(**params), ends_document=ends, sentence_ends=ENDS  # type: ignore[arg-type]
    )  # fmt: skip
    return window, example


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 200), st.sampled_from(KINDS), st.integers(0, 2**32), st.booleans(), st.sampled_from(["1d", "2d"]),
    st.sampled_from([0.05, 0.15, 0.6]), st.sampled_from([1.0, 3.0, 20.0]),
)  # fmt: skip
def test_round_trip(n: int, kind: str, seed: int, ends: bool, scheme: str, ratio: float, mean: float) -> None:
    window, example = make(n, kind, seed, ends, positions=scheme, mask_ratio=ratio, mean_span=mean)
    assert restore(example, SPECIALS).tolist() == window.tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.sampled_from(KINDS), st.integers(0, 2**32), st.booleans())
def test_layout(n: int, kind: str, seed: int, ends: bool) -> None:
    """Loss exactly on the parts; context exactly on the corrupted text; parts shifted by one; positions as in GLM."""
    window, e = make(n, kind, seed, ends)
    n_context = int(e.context.sum())
    assert e.context[:n_context].all() and not e.context[n_context:].any()
    assert (e.targets[:n_context] == IGNORE).all() and (e.targets[n_context:] != IGNORE).all()
    assert e.ids[n_context] == SPECIALS.sop and SPECIALS.sop not in e.ids[:n_context]
    assert len(e.ids) == len(e.targets) == e.positions.shape[1] == len(e.context)
    assert e.positions[0, :n_context].tolist() == list(range(n_context))
    assert not e.positions[1, :n_context].any()
    starts = np.flatnonzero(e.ids == SPECIALS.sop)
    blanks = []
    for start, stop in zip(starts, [*starts[1:], len(e)], strict=True):
        assert e.ids[start + 1 : stop].tolist() == e.targets[start : stop - 1].tolist()
        assert e.positions[1, start:stop].tolist() == list(range(1, stop - start + 1))
        assert len(set(e.positions[0, start:stop].tolist())) == 1
        blanks.append(int(e.positions[0, start]))
        blank_id = {"mask": SPECIALS.mask, "smask": SPECIALS.smask}.get(e.kind, SPECIALS.gmask)
        assert e.ids[blanks[-1]] == blank_id
    assert sorted(blanks) == [i for i in range(n_context) if e.ids[i] >= VOCAB]  # each blank has one part
    if e.kind in ("gmask", "lm"):
        assert (e.targets[-1] == SPECIALS.eop) == ends, "<eop> only where the document really ends"
    else:
        assert all(e.targets[stop - 1] == SPECIALS.eop for stop in [*starts[1:], len(e)])


def test_a_small_case_by_hand() -> None:
    """[MASK] sample with its spans known: the layout of the figure in data/infill.py, in one of the two part orders."""
    from openglm.data.infill import _blanks

    window = np.array([10, 11, 12, 13, 14, 15, 16])
    seen = set()
    for seed in range(20):
        e = _blanks(window, np.array([1, 5]), np.array([2, 1]), 100, "mask", np.random.default_rng(seed), SPECIALS)
        seen.add(tuple(e.ids.tolist()))
        if e.ids[7] == 15:
            assert e.ids.tolist() == [10, 100, 13, 14, 100, 16, 103, 15, 103, 11, 12]
            assert e.targets[6:].tolist() == [15, 104, 11, 12, 104]
            assert e.positions.tolist() == [[0, 1, 2, 3, 4, 5, 4, 4, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 2, 1, 2, 3]]
    assert len(seen) == 2, "parts come in shuffled order"


def test_one_axis_positions_of_gmask_run_on() -> None:
    _, e = make(20, "gmask", seed=3, positions="1d")
    assert e.positions[0].tolist() == list(range(len(e)))
    _, e = make(60, "mask", seed=3, positions="1d")
    n_context = int(e.context.sum())
    assert e.positions[0, n_context:].max() < n_context, "[MASK] positions stay at the blank"


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("kind", ["gmask", "lm", "mask"])
def test_training_layout_equals_prompt_layout(kind: str, axes: int) -> None:
    """What is trained is what generation does: positions and context of model.batch.prompt_layout."""
    config = GLMConfig(
        vocab_size=105, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, ffn_dim=8, max_seq_len=64,
        mask="prefix", rope=RopeConfig(axes=axes),  # type: ignore[arg-type]
    )  # fmt: skip
    scheme = "2d" if axes == 2 else "1d"
    # one blank only, as prompts with several are filled one at a time
    _, e = make(12 if kind != "mask" else 8, kind, seed=1, positions=scheme, mask_ratio=0.01)
    assert (e.ids == SPECIALS.sop).sum() == 1
    layout = prompt_layout(e.ids[: int(e.context.sum()) + 1].tolist(), config, NAMES)
    assert layout.positions(0, len(e)).numpy().tolist() == e.positions[:axes].tolist()
    assert layout.context(len(e)).numpy().tolist() == e.context.tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(0, 2**32), st.sampled_from([0.05, 0.15, 0.5, 0.9]))
def test_spans(n: int, seed: int, ratio: float) -> None:
    starts, lengths = sample_spans(n, ratio, 3.0, np.random.default_rng(seed))
    assert (lengths >= 1).all() and (lengths <= 40).all()
    assert (starts[1:] > (starts + lengths)[:-1]).all(), "at least one visible token between two spans"
    assert starts[0] >= 0 and starts[-1] + lengths[-1] <= n
    assert lengths.sum() < n
    if ratio <= 0.15 and n >= 30:
        assert lengths.sum() >= ratio * n
        assert lengths[:-1].sum() < ratio * n + 40, "no more spans than needed"


def test_span_statistics() -> None:
    """Lengths follow Poisson(3) clipped to 1 (mean 3.05), 15 % and a little are hidden, and places are even."""
    rng = np.random.default_rng(0)
    samples = [sample_spans(512, 0.15, 3.0, rng) for _ in range(400)]
    lengths = np.concatenate([spans for _, spans in samples])
    assert 2.95 < lengths.mean() < 3.2
    hidden = np.array([spans.sum() for _, spans in samples]) / 512
    assert hidden.min() >= 0.15 and hidden.mean() < 0.16
    covered = np.zeros(512)
    for starts, spans in samples:
        for start, length in zip(starts, spans, strict=True):
            covered[start : start + length] += 1
    quarters = covered.reshape(4, 128).sum(1) / covered.sum()
    assert np.abs(quarters - 0.25).max() < 0.02


def test_gmask_lengths_are_uniform_up_to_the_whole_window() -> None:
    rng = np.random.default_rng(0)
    window = np.arange(10)
    n_hidden = [
        len(window) + 1 - int(infill(window, "gmask", rng, SPECIALS, InfillParams(), ends_document=True).context.sum())
        for _ in range(4000)
    ]
    counts = np.bincount(n_hidden, minlength=11)
    assert not counts[:2].any() and counts[2:].min() > 350, counts
    whole = infill(window, "lm", rng, SPECIALS, InfillParams(), ends_document=False)
    assert whole.ids.tolist() == [SPECIALS.gmask, SPECIALS.sop, *range(9)]
    assert whole.targets[1:].tolist() == [*range(10)]


def test_sentences() -> None:
    """Whole sentences are hidden; runs of end tokens close one sentence; neighbours are never both hidden."""
    is_end = np.array([0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0], bool)
    bounds = {(0, 4), (4, 3), (7, 2), (9, 4)}  # the piece from 13 on has no end
    for seed in range(30):
        found = sample_sentences(is_end, 0.15, np.random.default_rng(seed))
        assert found is not None
        pairs = list(zip(found[0].tolist(), found[1].tolist(), strict=True))
        assert set(pairs) <= bounds and found[1].sum() >= 0.15 * 15 or pairs == [(7, 2)]
        assert (found[0][1:] > (found[0] + found[1])[:-1]).all()
    assert sample_sentences(is_end[:9][:7], 0.15, np.random.default_rng(0)) is None, "two sentences are too few"


def test_smask_falls_back_to_mask() -> None:
    window, rng, params = np.full(30, 50), np.random.default_rng(0), InfillParams()
    e = infill(window, "smask", rng, SPECIALS, params, ends_document=True, sentence_ends=ENDS)
    assert e.kind == "mask" and SPECIALS.mask in e.ids
    window[[5, 12, 20, 29]] = 3
    e = infill(window, "smask", rng, SPECIALS, params, ends_document=True, sentence_ends=ENDS)
    assert e.kind == "smask" and SPECIALS.smask in e.ids


@pytest.mark.parametrize(
    "values", [{"mask_ratio": 0.0}, {"min_gmask_ratio": 1.2}, {"mean_span": -1.0}, {"positions": "3d"}]
)
def test_bad_parameters(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        InfillParams(**values)  # type: ignore[arg-type]


def test_missing_specials_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[sMASK\].*objective: lm"):
        SpecialIds.from_names({k: v for k, v in NAMES.items() if k != "[sMASK]"})
