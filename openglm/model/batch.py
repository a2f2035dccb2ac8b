"""ForwardBatch: what one forward pass gets, as an explicit argument; and the layout rule of a prompt.

GLM's rule (GLM-130B paper, section 2.2; ChatGLM-6B release): tokens before the start-of-piece token <sop> are
context and see each other in both directions; from <sop> on a token sees the context and what precedes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openglm.config import GLMConfig

__all__ = ["ForwardBatch", "PromptLayout", "prompt_layout"]


@dataclass(frozen=True)
class ForwardBatch:
    """Input of `Transformer.forward`.

    ids: (B, T) int64.
    positions: (axes, B, T) int64; axes as in RopeConfig.
    segments: (B, T) integer or None. A token sees only tokens of its own segment; None: one segment a row.
    context: (B, T) bool or None. True: visible to the whole segment, also to earlier tokens; None: causal.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor | None = None
    context: Tensor | None = None

    def to(self, device: torch.device | str) -> ForwardBatch:
        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        return ForwardBatch(self.ids.to(device), self.positions.to(device), move(self.segments), move(self.context))


@dataclass(frozen=True)
class PromptLayout:
    """Where context ends and how positions run on, derived from a prompt's ids; see `prompt_layout`.

    n_context: tokens of bidirectional context (0 for causal models).
    mask_index: index of the mask token being filled, where frozen positions stay.
    frozen: positions stop at mask_index from <sop> on.
    later: (index of <sop>, mask index) of further answers in the same row, as the original GLM writes them.
    own_sop: <sop> itself has its own index yet.
    """

    axes: int
    n_context: int
    mask_index: int
    frozen: bool
    later: tuple[tuple[int, int], ...] = ()
    own_sop: bool = False

    def positions(self, start: int, stop: int) -> Tensor:
        """(axes, stop - start) int64 positions of tokens start..stop-1."""
        index = torch.arange(start, stop)
        n_own = self.n_context + 1 if self.own_sop else self.n_context
        position = torch.where(index < n_own, index, self.mask_index) if self.frozen else index
        if self.axes == 1:
            return position[None]
        block = (index - self.n_context + 1).clamp(min=0)
        for first, mask_index in self.later:
            position = torch.where(index < first, position, mask_index)
            block = torch.where(index < first, block, index - first + 1)
        return torch.stack([position, block])

    def context(self, n_tokens: int) -> Tensor:
        """(n_tokens,) bool, True on the bidirectional context."""
        return torch.arange(n_tokens) < self.n_context


def prompt_layout(ids: Sequence[int], config: GLMConfig, special_ids: Mapping[str, int]) -> PromptLayout:
    """Layout of a prompt by the family's rule.

    Causal models count 0..n-1. Prefix models: context ends before the first <sop>. With two axes (ChatGLM-6B) the
    position freezes at the [gMASK], else at the first [MASK] or [sMASK], and block positions count from 1 at <sop>.
    With one axis (GLM-130B) they freeze at the first [MASK], else at the first [sMASK]; with [gMASK] alone they run on.
    The original GLM (learned positions) answers several blanks in one row: its k-th <sop> goes with the k-th mask, and
    one more than there are masks is a token like others.
    A prompt without <sop> is all causal from its first token.
    """
    axes = config.n_axes
    if config.mask == "causal":
        return PromptLayout(axes, 0, 0, False)
    tokens = list(ids)
    sop = special_ids.get("<sop>")
    if sop is None or sop not in tokens:
        return PromptLayout(axes, 0, 0, axes == 2)
    n_context = tokens.index(sop)
    if config.positions == "learned":
        return _original_layout(tokens, n_context, sop, special_ids)
    found = {name: tokens.index(special_ids[name]) for name in ("[MASK]", "[sMASK]", "[gMASK]")
             if name in special_ids and special_ids[name] in tokens[:n_context]}  # fmt: skip
    blanks = {name: index for name, index in found.items() if name != "[gMASK]"}
    first_release = config.sop_position == "index"
    if "[gMASK]" in found and not (blanks and (axes == 1 or first_release)):
        return PromptLayout(axes, n_context, found["[gMASK]"], axes == 2, own_sop=first_release)
    if blanks:
        mask_index = next(iter(blanks.values())) if axes == 1 else min(blanks.values())
        return PromptLayout(axes, n_context, mask_index, True)
    return PromptLayout(axes, n_context, max(n_context - 1, 0), axes == 2)


def _original_layout(tokens: list[int], n_context: int, sop: int, special_ids: Mapping[str, int]) -> PromptLayout:
    masks = {special_ids[name] for name in ("[gMASK]", "[MASK]", "[sMASK]") if name in special_ids}
    places = [i for i, token in enumerate(tokens[:n_context]) if token in masks] or [max(n_context - 1, 0)]
    starts = [i for i, token in enumerate(tokens) if token == sop]
    later = tuple(zip(starts[1:], places[1:], strict=False))  # a <sop> beyond them is a token that was drawn
    return PromptLayout(2, n_context, places[0], True, later)
