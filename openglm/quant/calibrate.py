"""Calibration: text runs through the model one block at a time, and each block is quantised by what its matrices see.

    python -m openglm convert MODEL OUT --format openglm --quantize int4
    python -m openglm convert MODEL OUT --format openglm --quantize int4 --calibration text.txt

Only one block's weights are in memory, and the hidden states of the text. What a matrix sees comes from the quantised
ones before it, in its own block too. For GPTQ the text runs through the unrounded model beside, and a matrix first
moves some of the way to the one that gives, of what it sees, what it should give of what it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openglm.model.batch import ForwardBatch, prompt_layout
from openglm.model.opened import OpenedModel
from openglm.model.transformer import Block, Transformer
from openglm.ops.quant import QuantTensor, Weight, floats
from openglm.quant.awq import Inputs, scale_block
from openglm.quant.gptq import gptq
from openglm.quant.moments import Moments
from openglm.quant.rounding import quantise
from openglm.quant.spec import QuantSpec

__all__ = ["Calibration", "own_texts", "windows"]

MATRICES = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")  # in the order that they run in
N_TOKENS, WINDOW = 16384, 512  # of the text, and of each piece of it
PASS_TOKENS = 2048  # through a block at once
SAMPLE = 512  # inputs of a matrix kept for AWQ


def own_texts() -> list[str]:
    """The text that comes with the package, English and Chinese (openglm/assets/calibration)."""
    folder = Path(__file__).resolve().parents[1] / "assets" / "calibration"
    return [(folder / name).read_text(encoding="utf-8") for name in ("en.txt", "zh.txt")]


def windows(texts: Sequence[Sequence[int]], head: Sequence[int], context: int, n_tokens: int = N_TOKENS) -> Tensor:
    """(n, width) ids: pieces of the texts, evenly spread over each, `head` in front of every one.

    Raises ValueError when the texts have too few tokens.
    """
    width = min(WINDOW, context)
    body = width - len(head)
    per_text = max(1, n_tokens // width // len(texts))
    found: list[list[int]] = []
    for ids in texts:
        n = min(per_text, len(ids) // body)
        starts = [round(i * (len(ids) - body) / max(1, n - 1)) for i in range(n)]
        found += [[*head, *ids[start : start + body]] for start in starts]
    if not found:
        raise ValueError(f"a text for calibration has {max(map(len, texts))} tokens: give one of {body} or more")
    return torch.tensor(found)


class Calibration:
    """The blocks' tensors as they are stored, one block after the other.

    ids: (n, T) from `windows`; special_ids: for the layout of prefix models. A block that lies before the last one
    asked for starts it all over.
    """

    def __init__(self, opened: OpenedModel, spec: QuantSpec, ids: Tensor, special_ids: dict[str, int]) -> None:
        assert spec.calibrated and ids.dim() == 2
        self.opened, self.spec, self.ids, self.special_ids = opened, spec, ids, special_ids
        self.layer = -1
        self.tensors: dict[str, Weight] = {}
        self.passes: list[tuple[Tensor, Any, Tensor | None]] = []  # hidden states, rotary angles and mask
        self.true: list[Tensor] = []  # hidden states of the unrounded model, for GPTQ

    def weight(self, name: str) -> Weight:
        """A tensor below `layers.` by our name: a QuantTensor, or float32."""
        _, layer, leaf = name.split(".", 2)
        if int(layer) < self.layer:
            self.layer = -1
        while self.layer < int(layer):
            self._next()
        return self.tensors[leaf]

    def dtype(self, name: str) -> torch.dtype:
        """As what is not quantised is stored: as in the source, where it is floating-point there."""
        weight = self.opened.get(name)
        return weight.dtype if isinstance(weight, Tensor) else torch.bfloat16

    @torch.inference_mode()
    def _next(self) -> None:
        if self.layer < 0:
            self.passes = list(self._embedded())
            self.true = [h for h, _, _ in self.passes] if self.spec.method == "gptq" else []
        self.layer += 1
        prefix = f"layers.{self.layer}."
        names = [name.removeprefix(prefix) for name in self.opened.names() if name.startswith(prefix)]
        state = {leaf: floats(self.opened.get(prefix + leaf)).float() for leaf in names}
        true, block = _block(self.opened, state), _block(self.opened, state)
        if self.spec.method == "awq":
            inputs = {f"{name}.weight": self._inputs(block, name) for name in MATRICES}
            scale_block(state, self.opened.config, inputs, self.spec)
        self.tensors = dict(state)
        for name in MATRICES:
            leaf = f"{name}.weight"
            part = self.spec.of(prefix + leaf, tuple(state[leaf].shape))
            assert part is not None
            try:
                found = self._by_gptq(true, block, name, part) if part.method == "gptq" else quantise(state[leaf], part)
            except ValueError as error:
                raise ValueError(f"{prefix}{leaf}: {error}") from None
            self.tensors[leaf], state[leaf] = found, found.dequantise()
            block.load_state_dict(state, assign=True)
        if self.true:
            self.true = [true(h, rope, mask) for h, (_, rope, mask) in zip(self.true, self.passes, strict=True)]
        self.passes = [(block(h, rope, mask), rope, mask) for h, rope, mask in self.passes]

    def _by_gptq(self, true: Block, block: Block, name: str, spec: QuantSpec) -> QuantTensor:
        """A matrix of a block whose earlier ones are rounded; true: the block as it was."""
        weight = true.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        moments = Moments(weight)
        for h, (rounded, rope, mask) in zip(self.true, self.passes, strict=True):
            moments.add(_seen(block, name, rounded, rope, mask), _seen(true, name, h, rope, mask))
        return gptq(moments.compensated(), moments.hessian, spec, n_inputs=moments.n)

    def _inputs(self, block: Block, name: str) -> Inputs:
        """Of a matrix of a block that is not rounded yet, for AWQ."""
        rows, totals, n = [], [], 0
        for h, rope, mask in self.passes:
            x = _seen(block, name, h, rope, mask)
            totals.append(x.abs().sum(0))
            rows.append(x[::4].clone())
            n += len(x)
        sample = torch.cat(rows)
        return Inputs(torch.stack(totals).sum(0) / n, sample[:: -(-len(sample) // SAMPLE)])

    def _embedded(self) -> Iterator[tuple[Tensor, Any, Tensor | None]]:
        """What the first block is called with, for each pass. Of the embedding, only rows that the text has."""
        model = Transformer(replace(self.opened.config, n_layers=1), device="meta")
        tokens, numbers = self.ids.unique(return_inverse=True)
        for name in self.opened.names():
            if name.startswith("embed"):
                path, leaf = name.rsplit(".", 1)
                table = self.opened.get(name)
                if name == "embed.weight":
                    table = table[tokens] if isinstance(table, Tensor) else table.take_rows(tokens)
                setattr(model.get_submodule(path), leaf, nn.Parameter(floats(table).float(), False))
        recorder = _Recorder()
        model.layers[0], model.norm = recorder, nn.Identity()
        step = max(1, PASS_TOKENS // self.ids.shape[1])
        for ids, rows in zip(self.ids.split(step), numbers.split(step), strict=True):
            layouts = [prompt_layout(row.tolist(), model.config, self.special_ids) for row in ids]
            positions = torch.stack([layout.positions(0, ids.shape[1]) for layout in layouts], dim=1)
            context = torch.stack([layout.context(ids.shape[1]) for layout in layouts])
            model(ForwardBatch(rows, positions, context=context if bool(context.any()) else None))
            yield recorder.called


class _Recorder(nn.Module):
    """Stands for a block; keeps what it is called with."""

    def forward(self, h: Tensor, rope: Any, mask: Tensor | None = None, cache: None = None) -> Tensor:
        self.called = h, rope, mask
        return h


class _Reached(Exception):
    """A block has come to the matrix that was asked for."""


def _seen(block: Block, name: str, h: Tensor, rope: Any, mask: Tensor | None) -> Tensor:
    """(tokens, columns): what a matrix of the block sees. What lies behind it is not run."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].reshape(-1, args[0].shape[-1]))
        raise _Reached

    hook = block.get_submodule(name).register_forward_pre_hook(stop)
    try:
        block(h, rope, mask)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


def _block(opened: OpenedModel, state: dict[str, Tensor]) -> Block:
    with torch.device("meta"):
        block = Block(opened.config, 0)
    block.load_state_dict(state, assign=True)
    return block.requires_grad_(False).eval()
