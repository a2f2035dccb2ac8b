"""Blank infilling as GLM trains it: pure functions from a window of text to one Example.

Sources: GLM (Du et al. 2022, section 2.1) and GLM-130B (Zeng et al. 2023, section 2.2).

A sample is a corrupted text A (the context, seen in both directions) followed by parts B, one per blank, in shuffled
order. The part of a blank is `<sop> s1 .. sn` on the input side and `s1 .. sn <eop>` on the target side.

    text     a b c d e f g
    ids      a [MASK] d e [MASK] g   <sop> f   <sop> b c
    targets  .   .    . .   .    .     f <eop>   b   c <eop>
    position 0   1    2 3   4    5     4   4     1   1   1        (two-axis scheme, row 0)
    block    0   0    0 0   0    0     1   2     1   2   3        (row 1)

Three kinds: "mask" hides short spans, "smask" whole sentences, "gmask" one suffix, whose blank is [gMASK]. "lm" is
"gmask" with the whole window hidden, so that the context is the one token [gMASK]: how chat prompts look.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openglm.data.example import Example
from openglm.types import IGNORE

__all__ = ["InfillParams", "SpecialIds", "infill", "restore", "sample_spans", "sample_sentences"]

IntArray = NDArray[np.int64]
MAX_SPAN = 40
MIN_SENTENCES = 3


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that infilling inserts."""

    mask: int
    smask: int
    gmask: int
    sop: int
    eop: int

    @classmethod
    def from_names(cls, special_ids: Mapping[str, int]) -> SpecialIds:
        names = ("[MASK]", "[sMASK]", "[gMASK]", "<sop>", "<eop>")
        for name in names:
            if name not in special_ids:
                raise ValueError(f"the tokenizer has no {name} token, which blank infilling needs; use objective: lm")
        return cls(*(special_ids[name] for name in names))


@dataclass(frozen=True)
class InfillParams:
    """mask_ratio: share of the window hidden by [MASK] and [sMASK]. mean_span: Poisson mean of [MASK] span lengths.

    min_gmask_ratio: least share hidden by [gMASK]; the length is uniform from there to the whole window.
    positions: "2d" (ChatGLM-6B): a target token carries the position of its blank, and block positions count from 1 at
    <sop>. "1d" (GLM-130B): row 0 runs on after [gMASK], and stays at the blank after [MASK] and [sMASK].
    """

    mask_ratio: float = 0.15
    mean_span: float = 3.0
    min_gmask_ratio: float = 0.2
    positions: Literal["2d", "1d"] = "2d"

    def __post_init__(self) -> None:
        for name, low, high in (("mask_ratio", 0.0, 0.9), ("min_gmask_ratio", 0.0, 1.0), ("mean_span", 0.0, MAX_SPAN)):
            if not low < getattr(self, name) <= high:
                raise ValueError(f"{name} must be above {low:g} and at most {high:g}, not {getattr(self, name)}")
        if self.positions not in ("2d", "1d"):
            raise ValueError(f"positions must be '2d' or '1d', not {self.positions!r}")


def infill(
    window: NDArray[np.integer],
    kind: str,
    rng: np.random.Generator,
    specials: SpecialIds,
    params: InfillParams,
    *,
    ends_document: bool,
    sentence_ends: NDArray[np.bool_] | None = None,
) -> Example:
    """One Example from a window of at least 2 text tokens.

    kind: "mask", "smask", "gmask" or "lm". "smask" falls back to "mask" when the window has fewer than three sentences.
    ends_document: the window reaches the end of its document.
    sentence_ends: (vocab,) bool table of tokens that end a sentence; needed for "smask".
    """
    n = len(window)
    assert n >= 2, "a window needs two tokens"
    if kind == "smask":
        assert sentence_ends is not None, "smask needs the table of sentence ends"
        spans = sample_sentences(sentence_ends[window], params.mask_ratio, rng)
        if spans is not None:
            return _blanks(window, *spans, specials.smask, "smask", rng, specials)
        kind = "mask"
    if kind == "mask":
        spans = sample_spans(n, params.mask_ratio, params.mean_span, rng)
        return _blanks(window, *spans, specials.mask, "mask", rng, specials)
    if kind == "lm":
        return _suffix(window, n, kind, specials, params.positions, ends_document)
    assert kind == "gmask", kind
    least = min(n, max(1, math.ceil(params.min_gmask_ratio * n)))
    return _suffix(window, int(rng.integers(least, n + 1)), kind, specials, params.positions, ends_document)


def sample_spans(n: int, ratio: float, mean: float, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Starts and lengths of random spans over n tokens: at least ratio * n hidden, spans in order, none touching.

    Lengths are Poisson(mean) clipped to 1..40 (and to half the window); they are drawn until enough is hidden. Where
    they go: the spans take distinct slots among the gaps of the visible tokens, so every placement in which at least
    one visible token lies between two spans is equally likely.
    """
    goal = math.ceil(ratio * n)
    longest = min(MAX_SPAN, max(1, n // 2))
    lengths = np.clip(rng.poisson(mean, goal), 1, longest)  # each hides at least one token, so `goal` draws suffice
    total = np.cumsum(lengths)
    count = int(np.searchsorted(total, goal)) + 1
    # k spans need k - 1 visible tokens between them, and one token stays visible in any case
    while count > 1 and n - total[count - 1] < max(count - 1, 1):
        count -= 1
    lengths = lengths[:count].astype(np.int64)
    visible = n - int(total[count - 1])
    slots = np.sort(rng.permutation(visible + 1)[:count])
    starts = slots + np.cumsum(lengths) - lengths
    return starts, lengths


def sample_sentences(
    is_end: NDArray[np.bool_], ratio: float, rng: np.random.Generator
) -> tuple[IntArray, IntArray] | None:
    """Starts and lengths of whole sentences, in order, until ratio of the tokens is hidden; None below three sentences.

    A sentence ends after a run of ending tokens (". \\n" is one end). A piece without an end, cut off by the window,
    is not hidden; nor are two neighbours, so that a visible sentence lies between two blanks.
    """
    n = len(is_end)
    last = np.flatnonzero(is_end & ~np.append(is_end[1:], False))
    if len(last) < MIN_SENTENCES:
        return None
    starts = np.concatenate([[0], last[:-1] + 1])
    lengths = last + 1 - starts
    chosen = np.zeros(len(last) + 2, np.bool_)  # one false border on each side
    hidden, goal = 0, ratio * n
    for i in rng.permutation(len(last)):
        if chosen[i] or chosen[i + 2]:
            continue
        chosen[i + 1] = True
        hidden += int(lengths[i])
        if hidden >= goal:
            break
    keep = np.flatnonzero(chosen[1:-1])
    return starts[keep], lengths[keep]


def _blanks(
    window: NDArray[np.integer], starts: IntArray, lengths: IntArray, mask_id: int, kind: str,
    rng: np.random.Generator, specials: SpecialIds,
) -> Example:  # fmt: skip
    """Replace each span by one mask token and append the spans in shuffled order."""
    n, k = len(window), len(starts)
    hidden = int(lengths.sum())
    n_context = n - hidden + k
    total = n_context + hidden + k
    # Each span becomes its first token's slot: keep that slot, drop the others.
    inside = np.zeros(n + 1, np.int64)
    np.add.at(inside, starts, 1)
    np.add.at(inside, starts + lengths, -1)
    keep = np.cumsum(inside[:-1]) == 0
    keep[starts] = True
    corrupted = window.astype(np.int32)
    corrupted[starts] = mask_id
    mask_index = starts - (np.cumsum(lengths - 1) - (lengths - 1))  # index of each blank in the corrupted text

    order = rng.permutation(k)
    part_lengths = lengths[order] + 1  # <sop> or <eop> and the span
    part_starts = np.cumsum(part_lengths) - part_lengths
    block = np.arange(hidden + k) - np.repeat(part_starts, part_lengths)  # 0 at <sop>, then 1, 2, ...
    source = np.repeat(starts[order], part_lengths) + block  # text index of the token to predict
    part_ends = part_starts + part_lengths - 1
    source[part_ends] = 0  # holds <eop>; any valid index
    part_targets = window[source].astype(np.int32)
    part_targets[part_ends] = specials.eop
    part_ids = np.empty_like(part_targets)
    part_ids[1:] = part_targets[:-1]
    part_ids[part_starts] = specials.sop

    ids = np.concatenate([corrupted[keep], part_ids])
    targets = np.full(total, IGNORE, np.int32)
    targets[n_context:] = part_targets
    positions = np.zeros((2, total), np.int32)
    positions[0, :n_context] = np.arange(n_context)
    positions[0, n_context:] = np.repeat(mask_index[order], part_lengths)
    positions[1, n_context:] = block + 1
    return Example(ids, targets, positions, np.arange(total) < n_context, kind)


def _suffix(
    window: NDArray[np.integer], n_hidden: int, kind: str, specials: SpecialIds, scheme: str, ends_document: bool
) -> Example:
    """Hide the last n_hidden tokens behind [gMASK].

    <eop> closes the part only where the document really ends. A window that was cut out of a longer document ends
    because the row is full; <eop> there would teach the model to stop at a random place.
    """
    n = len(window)
    n_visible = n - n_hidden
    n_context = n_visible + 1
    n_part = n_hidden + 1 if ends_document else n_hidden  # without <eop> the last token is a target but not an input
    total = n_context + n_part
    ids = np.empty(total, np.int32)
    ids[:n_visible] = window[:n_visible]
    ids[n_visible] = specials.gmask
    ids[n_context] = specials.sop
    ids[n_context + 1 :] = window[n_visible : n_visible + n_part - 1]
    targets = np.full(total, IGNORE, np.int32)
    targets[n_context : n_context + n_hidden] = window[n_visible:]
    if ends_document:
        targets[-1] = specials.eop
    index = np.arange(total, dtype=np.int32)
    positions = np.stack([index, np.maximum(index - np.int32(n_visible), 0)])
    if scheme == "2d":
        np.minimum(positions[0], n_visible, out=positions[0])
    return Example(ids, targets, positions, index < n_context, kind)


def restore(example: Example, specials: SpecialIds) -> IntArray:
    """The window that an infilling example was made from, rebuilt from its parts alone. Inverse of `infill`."""
    n_context = int(example.context.sum())
    context = example.ids[:n_context]
    part_ids, part_targets = example.ids[n_context:], example.targets[n_context:]
    starts = np.flatnonzero(part_ids == specials.sop)
    stops = np.append(starts[1:], len(part_ids))
    parts = {}
    for start, stop in zip(starts, stops, strict=True):
        tokens = part_targets[start:stop]
        # In the two-axis scheme the position of every part token is its blank's index. In the one-axis scheme a
        # [gMASK] part runs on instead, but then there is only one blank and it is the last token of the context.
        blank = min(int(example.positions[0, n_context + start]), n_context - 1)
        parts[blank] = tokens[:-1] if tokens[-1] == specials.eop else tokens
    pieces, done = [], 0
    for blank in sorted(parts):
        assert context[blank] in (specials.mask, specials.smask, specials.gmask), "a part points at no blank"
        pieces += [context[done:blank], parts[blank]]
        done = blank + 1
    return np.concatenate([*pieces, context[done:]]).astype(np.int64)
