"""BeamSearch: the state of one beam search, fed logits and asked which rows to continue. Runs no model.

Scores are summed log-probabilities divided by ((5 + n) / 6) ** length_penalty, n the answer's tokens with the stop
token (Wu et al. 2016, equation 14). Stepping, the n-gram rule and the stopping rule follow GLM-130B's strategy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Beam", "BeamSearch"]

Beam = tuple[tuple[int, ...], float]  # ids of an answer with the stop id that ended it, and its score


class BeamSearch:
    """Search for n_beams answers of at most max_new_tokens.

    no_repeat_ngram: no n-gram comes twice in an answer (its first tokens may reach back into the prompt); 0 is off.
    min_new_tokens: no stop id is taken before that many tokens.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        n_beams: int,
        max_new_tokens: int,
        length_penalty: float = 0.0,
        no_repeat_ngram: int = 0,
        min_new_tokens: int = 0,
        stop_ids: Iterable[int] = (),
    ) -> None:
        if n_beams < 1:
            raise ValueError(f"n_beams must be at least 1, not {n_beams}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if no_repeat_ngram < 0 or min_new_tokens < 0:
            raise ValueError("no_repeat_ngram and min_new_tokens must be 0 (off) or more")
        self.n_beams, self.max_new_tokens = n_beams, max_new_tokens
        self.length_penalty, self.no_repeat_ngram = length_penalty, no_repeat_ngram
        self.min_new_tokens, self.stop_ids = min_new_tokens, frozenset(stop_ids)
        self._tail = list(prompt_ids)[max(0, len(prompt_ids) - max(no_repeat_ngram - 1, 0)) :]
        self._alive: list[tuple[int, ...]] = [()]
        self._scores: list[float] = [0.0]  # summed log-probabilities of the alive
        self._rows: list[int] = [0]  # row that each alive answer was continued from
        self._finished: list[Beam] = []  # best first
        self._length = 0
        self.done = False

    def advance(self, logits: Tensor) -> None:
        """Take one step. logits: (rows, V) float32, row i behind alive answer i; surplus rows are not looked at."""
        assert not self.done
        logits = logits[: len(self._alive)].clone()
        if self._length < self.min_new_tokens and self.stop_ids:
            logits[:, sorted(self.stop_ids)] = float("-inf")
        for row, answer in enumerate(self._alive):
            banned = self._banned(answer)
            if banned:
                logits[row, banned] = float("-inf")
        logprobs = logits.log_softmax(-1)
        total = logprobs + torch.tensor(self._scores, device=logits.device)[:, None]
        n_looked_at = min((max(1, len(self.stop_ids)) + 1) * self.n_beams, total.numel())
        scores, flat = total.flatten().topk(n_looked_at)
        self._select(scores.tolist(), flat.tolist(), logits.shape[1])

    def _select(self, scores: list[float], flat: list[int], vocab_size: int) -> None:
        alive: list[tuple[int, ...]] = []
        kept_scores, rows = [], []
        self._length += 1
        for score, index in zip(scores, flat, strict=True):
            if score == float("-inf") or score != score:
                break
            row, token = divmod(index, vocab_size)
            answer = (*self._alive[row], token)
            if token in self.stop_ids:
                self._finish(answer, score)
            elif len(alive) < self.n_beams:
                alive.append(answer)
                kept_scores.append(score)
                rows.append(row)
            else:
                break
        if not alive and not self._finished:  # every token is banned: what there is, is the answer
            for cut_short, score in zip(self._alive, self._scores, strict=True):
                self._finish(cut_short, score)
        self._alive, self._scores, self._rows = alive, kept_scores, rows
        if self._length == self.max_new_tokens or not alive:
            self.done = True
        elif len(self._finished) == self.n_beams:  # no alive answer, as it stands, beats the worst finished one
            self.done = self._finished[-1][1] >= self._penalised(max(kept_scores), self._length)

    def last_step(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(rows, tokens), each (n_beams,) int64: rows to continue and their tokens; spare ones repeat the first."""
        missing = self.n_beams - len(self._alive)
        rows = self._rows + self._rows[:1] * missing
        tokens = [answer[-1] for answer in self._alive] + [self._alive[0][-1]] * missing
        return torch.tensor(rows, device=device), torch.tensor(tokens, device=device)

    def results(self) -> list[Beam]:
        """Best first. Answers that never met a stop id compete when the search ran out of tokens."""
        assert self.done
        if self._length == self.max_new_tokens:
            for answer, score in zip(self._alive, self._scores, strict=True):
                self._finish(answer, score)
        return list(self._finished)

    def _penalised(self, score: float, length: int) -> float:
        return score / ((5.0 + length) / 6.0) ** self.length_penalty

    def _finish(self, answer: tuple[int, ...], score: float) -> None:
        self._finished.append((answer, self._penalised(score, len(answer))))
        self._finished.sort(key=lambda beam: -beam[1])  # stable: of equals the earlier stays first
        del self._finished[self.n_beams :]

    def _banned(self, answer: tuple[int, ...]) -> list[int]:
        """Tokens that would repeat an n-gram of the answer."""
        n = self.no_repeat_ngram
        if n == 0 or len(self._tail) + len(answer) < n:
            return []
        ids = (*self._tail, *answer)
        ending = ids[len(ids) - n + 1 :]
        return [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == ending]
