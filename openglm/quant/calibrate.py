"""Calibration: text runs through the model one block at a time, and each block is quantised by what its matrices see.

    python -m openglm convert MODEL OUT --format openglm --quantize int4
    python -m openglm convert MODEL OUT --format openglm --quantize int4 --calibration text.txt

Only one block's weights are in memory, and the hidden states of the text. A block's inputs come from the quantised
blocks before it, so that it makes up for their error as far as it can.
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
from openglm.ops.quant import Weight, floats
from openglm.quant.awq import Inputs, scale_block
from openglm.quant.gptq import gptq
from openglm.quant.rounding import quantise
from openglm.quant.spec import QuantSpec

__all__ = ["Calibration", "own_texts", "windows"]

MATRICES = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
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
        self.layer += 1
        prefix = f"layers.{self.layer}."
        names = [name.removeprefix(prefix) for name in self.opened.names() if name.startswith(prefix)]
        state = {leaf: floats(self.opened.get(prefix + leaf)).float() for leaf in names}
        block = _block(self.opened, state)
        seen = {f"{name}.weight": _Seen(self.spec.method == "gptq") for name in MATRICES}
        hooks = [block.get_submodule(n).register_forward_pre_hook(seen[f"{n}.weight"].take) for n in MATRICES]
        for h, rope, mask in self.passes:
            block(h, rope, mask)
        for hook in hooks:
            hook.remove()
        if self.spec.method == "awq":
            scale_block(state, self.opened.config, {name: s.inputs() for name, s in seen.items()}, self.spec)
        self.tensors = dict(state)
        for name in list(seen):
            s = seen.pop(name)  # a second moment is large: it goes as soon as it has served
            part = self.spec.of(prefix + name, tuple(state[name].shape))
            assert part is not None
            try:
                if s.hessian is None:
                    found = quantise(state[name], part)
                else:
                    found = gptq(state[name], s.hessian, part, n_inputs=s.n)
            except ValueError as error:
                raise ValueError(f"{prefix}{name}: {error}") from None
            self.tensors[name], state[name] = found, found.dequantise()
        block.load_state_dict(state, assign=True)
        self.passes = [(block(h, rope, mask), rope, mask) for h, rope, mask in self.passes]

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


class _Seen:
    """Inputs of one matrix: their second moment for GPTQ, their mean and a sample for AWQ."""

    def __init__(self, second_moment: bool) -> None:
        self.second_moment = second_moment
        self.hessian: Tensor | None = None
        self.total: Tensor | None = None
        self.rows: list[Tensor] = []
        self.n = 0

    def take(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        self.n += len(x)
        if self.second_moment:
            self.hessian = x.t() @ x if self.hessian is None else self.hessian.addmm_(x.t(), x)
            return
        total = x.abs().sum(0)
        self.total = total if self.total is None else self.total + total
        self.rows.append(x[::4].clone())

    def inputs(self) -> Inputs:
        assert self.total is not None
        rows = torch.cat(self.rows)
        return Inputs(self.total / self.n, rows[:: -(-len(rows) // SAMPLE)])


def _block(opened: OpenedModel, state: dict[str, Tensor]) -> Block:
    with torch.device("meta"):
        block = Block(opened.config, 0)
    block.load_state_dict(state, assign=True)
    return block.requires_grad_(False).eval()
