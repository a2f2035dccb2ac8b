"""Filling blanks: masks left to right, each answer put in place of its mask before the next pass. Token ids only.

GLM-130B's strategy: the text with its masks is context in both directions, then <sop>, then the answer until a stop
id. [MASK] and [sMASK] come first, in the order of the text (GLM-130B: every [MASK] before an [sMASK]); a [gMASK] stays
out of the context until it is its turn, because no sample of the training objective holds both kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openglm.engine.beam import Beam
from openglm.engine.engine import Engine
from openglm.engine.request import FinishReason
from openglm.types import SamplingParams

__all__ = ["MASKS", "Blanks", "FilledBlank", "fill_blanks"]

MASKS = ("[MASK]", "[sMASK]", "[gMASK]")


@dataclass(frozen=True)
class FilledBlank:
    """ids: the answer that was put in, without a stop id. candidates: all beams, best first (one when drawing)."""

    ids: tuple[int, ...]
    finish_reason: FinishReason
    candidates: tuple[Beam, ...]


class Blanks:
    """A text with blanks on its way to one without. order: their numbers, counted in the text, as they are filled.

    Raises ValueError when there is no mask, or a model has no <sop> or sees only backwards.
    """

    def __init__(self, engine: Engine, ids: Sequence[int]) -> None:
        special = engine.special_ids
        if engine.config.mask != "prefix" or "<sop>" not in special:
            raise ValueError("this model sees only what comes before and cannot fill blanks: use generate")
        masks = {special[name] for name in MASKS if name in special}
        self._gmask, self._sop = special.get("[gMASK]"), special["<sop>"]
        # Pieces of the text: a list of ids, or the number of a blank.
        self._pieces: list[list[int] | int] = [[]]
        self._kinds: list[int] = []
        for token in ids:
            if token in masks:
                self._pieces += [len(self._kinds), []]
                self._kinds.append(token)
            else:
                assert isinstance(self._pieces[-1], list)
                self._pieces[-1].append(token)
        if not self._kinds:
            raise ValueError("the text has no blank: put [MASK] where words are missing (or [sMASK], [gMASK])")
        late = {self._gmask, special.get("[sMASK]")} if engine.config.n_axes == 1 else {self._gmask}
        rank = {kind: 2 if kind == self._gmask else 1 for kind in late}
        self.order = sorted(range(len(self._kinds)), key=lambda blank: rank.get(self._kinds[blank], 0))

    def prompt(self, answers: Sequence[Sequence[int]]) -> list[int]:
        """The prompt for the next blank in `order`, with these answers to the ones before it."""
        kinds, blank = self._kinds, self.order[len(answers)]
        is_open = {b for b in self.order[len(answers) :] if kinds[b] != self._gmask or kinds[blank] == self._gmask}
        return [*self._joined(answers, is_open), self._sop]

    def filled(self, answers: Sequence[Sequence[int]]) -> list[int]:
        """The text with all its blanks filled; answers in `order`."""
        assert len(answers) == len(self.order)
        return self._joined(answers, set())

    def _joined(self, answers: Sequence[Sequence[int]], is_open: set[int]) -> list[int]:
        put = dict(zip(self.order, answers, strict=False))
        out: list[int] = []
        for piece in self._pieces:
            if isinstance(piece, list):
                out += piece
            elif piece in put:
                out += put[piece]
            elif piece in is_open:
                out.append(self._kinds[piece])
        return out


def fill_blanks(
    engine: Engine,
    ids: Sequence[int],
    params: SamplingParams,
    n_beams: int = 1,
    length_penalty: float = 0.0,
    no_repeat_ngram: int = 0,
    min_new_tokens: int = 0,
    joined: Callable[[int, list[int]], list[int]] = lambda blank, answer: answer,
) -> tuple[list[int], list[FilledBlank]]:
    """(ids with every mask replaced, blanks in the order of the text).

    With n_beams above 1 every blank is searched and its best answer put in, else it is drawn as `params` says.
    params.max_new_tokens and stop_ids hold for each blank. joined(blank number, answer) gives the ids that go in.
    Raises ValueError as `Blanks` does.
    """
    blanks = Blanks(engine, ids)
    filled: dict[int, FilledBlank] = {}
    answers: list[list[int]] = []
    for blank in blanks.order:
        prompt = blanks.prompt(answers)
        filled[blank] = _answer(engine, prompt, params, n_beams, length_penalty, no_repeat_ngram, min_new_tokens)
        answers.append(joined(blank, list(filled[blank].ids)))
    return blanks.filled(answers), [filled[b] for b in sorted(filled)]


def _answer(
    engine: Engine,
    prompt: list[int],
    params: SamplingParams,
    n_beams: int,
    length_penalty: float,
    no_repeat_ngram: int,
    min_new_tokens: int,
) -> FilledBlank:
    stop = frozenset(params.stop_ids)

    def bare(ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids[:-1] if ids and ids[-1] in stop else ids

    if n_beams > 1:
        beams = engine.beam(
            prompt, n_beams, params.max_new_tokens, length_penalty, no_repeat_ngram, min_new_tokens, stop
        )
        best = beams[0][0]
        candidates = tuple((bare(found), value) for found, value in beams)
        return FilledBlank(bare(best), "stop" if best[-1] in stop else "length", candidates)
    completion = engine.generate(prompt, params)
    answer = bare(completion.token_ids)
    return FilledBlank(answer, completion.finish_reason, ((answer, sum(completion.logprobs)),))
