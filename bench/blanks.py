"""Blanks in held-out text, and what a GLM and n-gram models write into them (see bench/nano.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.ngram import KneserNey

if TYPE_CHECKING:
    import torch

    from openglm.data.shards import TokenDataset
    from openglm.engine import Engine
    from openglm.tokenizer import Tokenizer

IntArray = NDArray[np.int64]
WINDOW, EDGE = 64, 8  # tokens around a blank; a blank keeps this far from the ends
BLANKS: dict[str, int | None] = {"1 token": 1, "3 tokens": 3, "word": None}
MAX_WORD = 4
BEAMS = {1: 200, 2: 64}  # candidates of the two-sided 5-gram by length of the blank; more tokens: 32


@dataclass(frozen=True)
class Blank:
    """A window of held-out text (WINDOW ids) and the part of it that is hidden."""

    window: IntArray
    start: int
    length: int

    @property
    def hidden(self) -> tuple[int, ...]:
        return tuple(self.window[self.start : self.start + self.length].tolist())


def words_in(window: IntArray, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(start, length) of whole words: English, of up to MAX_WORD tokens; Chinese, tokens of two or more characters."""
    pieces = [tokenizer.token_bytes(int(i)) for i in window]
    found = []
    for start in range(EDGE, len(window) - EDGE - MAX_WORD):
        text = pieces[start].decode("utf-8", "replace")
        if len(text) >= 2 and all("\u4e00" <= c <= "\u9fff" for c in text):
            found.append((start, 1))
        elif text.startswith(" ") and text[1:].isascii() and text[1:].isalpha():
            stop = start + 1
            while stop < len(window) and pieces[stop].isalpha() and pieces[stop].isascii():
                stop += 1
            if stop - start <= MAX_WORD and not pieces[stop][:1].isalpha():
                found.append((start, stop - start))
    return found


def sample_blanks(data: TokenDataset, kind: str, n: int, seed: int, tokenizer: Tokenizer) -> list[Blank]:
    """n blanks at random places of the held-out text."""
    rng = np.random.default_rng(seed)
    room = np.maximum(data.lengths() - WINDOW + 1, 0).astype(np.float64)
    if not room.any():
        raise ValueError(f"{data.folder}: no document of {WINDOW} tokens to hide blanks in; give longer held-out text")
    blanks: list[Blank] = []
    while len(blanks) < n:
        document = int(rng.choice(len(room), p=room / room.sum()))
        at = int(rng.integers(int(room[document])))
        window = data.document(document)[at : at + WINDOW].astype(np.int64)
        length = BLANKS[kind]
        if length is not None:
            blanks.append(Blank(window, int(rng.integers(EDGE, WINDOW - EDGE - length + 1)), length))
        elif words := words_in(window, tokenizer):
            start, length = words[int(rng.integers(len(words)))]
            blanks.append(Blank(window, start, length))
    return blanks


Scores = dict[str, float]


def accuracy(blanks: Sequence[Blank], answers: Sequence[Sequence[int]]) -> Scores:
    """Share of answers that are the hidden tokens, and of first tokens that are right."""
    exact = [tuple(answer) == blank.hidden for blank, answer in zip(blanks, answers, strict=True)]
    first = [bool(answer) and answer[0] == blank.hidden[0] for blank, answer in zip(blanks, answers, strict=True)]
    return {"exact": float(np.mean(exact)), "first": float(np.mean(first))}


def model_answers(
    engine: Engine, blanks: Sequence[Blank], rows: int = 64
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Greedy answers up to the first wrong token: stopping by itself, and told the length (no special tokens).

    Greedy decoding gives the hidden tokens exactly when, fed with them, the model's best token is right at each step.
    So one pass with the right answer as input decides it; behind a wrong token the rest no longer matters.
    """
    import torch
    from tqdm import tqdm

    from openglm.model.batch import ForwardBatch, prompt_layout

    special = engine.special_ids
    ordinary = torch.ones(engine.config.vocab_size, dtype=torch.bool)
    ordinary[list(special.values())] = False
    free: list[tuple[int, ...]] = []
    told: list[tuple[int, ...]] = []
    for first in tqdm(range(0, len(blanks), rows), desc="blanks", unit="batch", delay=2, leave=False):
        batch = blanks[first : first + rows]
        ids, positions, context = [], [], []
        for blank in batch:
            stop = blank.start + blank.length
            prompt = [*blank.window[: blank.start], special["[MASK]"], *blank.window[stop:], special["<sop>"]]
            layout = prompt_layout([int(i) for i in prompt], engine.config, special)
            ids.append(torch.tensor([*(int(i) for i in prompt), *blank.hidden]))
            positions.append(layout.positions(0, len(ids[-1])))
            context.append(layout.context(len(ids[-1])))
        forward = ForwardBatch(torch.stack(ids), torch.stack(positions, dim=1), context=torch.stack(context))
        with torch.inference_mode():
            hidden = engine.model(forward.to(engine.device))
            for row, blank in enumerate(batch):
                logits = engine.model.logits(hidden[row, -1 - blank.length :]).cpu()
                free.append(_greedy(logits, (*blank.hidden, special["<eop>"])))
                told.append(_greedy(logits[:-1].masked_fill(~ordinary, -math.inf), blank.hidden))
    ends = special["<eop>"]
    return [answer[:-1] if answer[-1] == ends else answer for answer in free], told


def _greedy(logits: torch.Tensor, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Best tokens up to and with the first that differs from `wanted`."""
    best = logits.argmax(-1).tolist()
    right = 0
    while right < len(wanted) and best[right] == wanted[right]:
        right += 1
    return tuple(best[: right + 1])


def left_answers(model: KneserNey, blanks: Sequence[Blank]) -> list[tuple[int, ...]]:
    """Greedy, from what stands left of the blank."""
    answers: list[list[int]] = [[] for _ in blanks]
    for step in range(max(blank.length for blank in blanks)):
        open_ = [i for i, blank in enumerate(blanks) if step < blank.length]
        for some in np.array_split(open_, max(1, len(open_) // 64)):
            histories = [[*blanks[i].window[: blanks[i].start], *answers[i]] for i in some]
            for i, best in zip(some, model.distributions(histories).argmax(axis=1), strict=True):
                answers[i].append(int(best))
    return [tuple(answer) for answer in answers]


def both_sides_answers(model: KneserNey, blanks: Sequence[Blank]) -> list[tuple[int, ...]]:
    """The candidate of a left-to-right beam that is likeliest together with the tokens behind the blank."""
    from tqdm import tqdm

    answers = []
    reach = model.order - 1
    for blank in tqdm(blanks, desc="5-gram, both sides", unit="blank", delay=2, leave=False):
        width = BEAMS.get(blank.length, 32)
        left = blank.window[blank.start - reach : blank.start].tolist()
        right = blank.window[blank.start + blank.length :][:reach].tolist()
        beams: list[tuple[int, ...]] = [()]
        scores = np.zeros(1)
        for _ in range(blank.length):
            total = scores[:, None] + np.log(model.distributions([[*left, *beam] for beam in beams]))
            best = np.argpartition(total, -width, axis=None)[-width:]
            beams = [(*beams[i // model.vocab_size], int(i % model.vocab_size)) for i in best.tolist()]
            scores = total.reshape(-1)[best]
        texts = np.array([[*left, *beam, *right] for beam in beams])
        whole = model.log_probs(texts).reshape(texts.shape)[:, len(left) :].sum(axis=1)
        answers.append(beams[int(whole.argmax())])
    return answers
