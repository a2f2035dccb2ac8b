"""PagedPool: keys and values of many sequences in pages of one fixed pool. PagedCache: one ragged pass over it.

    python -m pytest -q tests/test_engine_paged.py

A pass holds new tokens of several sequences, laid end to end in one row, so that norms and matrices see one (1, N, D)
input; attention goes sequence by sequence, and for sequences with one new token many at once. New keys and values are
stored first and then read back with the old ones: whatever the pool's dtype rounds off, it makes no difference how a
prompt was cut into pieces.
"""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.model.transformer import Block, Transformer
from openglm.ops.attention import attention, visible
from openglm.ops.kv import from_bytes, spread, to_bytes
from openglm.ops.rope import apply_rope

__all__ = ["PagedCache", "PagedPool", "Span", "key_centres", "lazy_zeros"]

_SINGLE = 1  # a sequence with one new token, as every answer that is being written


class Span(NamedTuple):
    """n new tokens of one sequence behind `start` cached ones; pages: the sequence's, in order.

    n_context: leading tokens that see each other both ways; then start is 0 and n holds them all.
    """

    start: int
    n: int
    pages: Sequence[int]
    n_context: int = 0


class PagedPool:
    """Room for n_pages pages of page_size tokens. dtype int8: in the form of `openglm.ops.kv`, keys spread.

    Elements: 2 * n_layers * n_pages * page_size * n_kv_heads * head_dim, taken at once; see `lazy_zeros`.
    centres: (n_layers, n_kv_heads, head_dim), subtracted from keys that are stored in int8; None: nothing.
    """

    def __init__(
        self, config: GLMConfig, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str = "cpu",
        centres: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.n_pages, self.page_size, self.dtype = n_pages, page_size, dtype
        shape = (config.n_layers, 2, n_pages * page_size, config.n_kv_heads, config.head_dim)
        self._data = lazy_zeros(shape, dtype, device)
        zero = torch.zeros(config.n_layers, 1, 1)
        self._centres = (zero if centres is None else centres).to(device)

    @property
    def n_bytes(self) -> int:
        return self._data.nbytes

    @staticmethod
    def bytes_per_token(config: GLMConfig, dtype: torch.dtype) -> int:
        return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize

    def slots(self, pages: Sequence[int], start: int, stop: int) -> slice | Tensor:
        """Where tokens start to stop - 1 of a sequence lie: a slice where its pages are neighbours, else indices."""
        size = self.page_size
        first, last = start // size, (stop - 1) // size
        if all(pages[i + 1] == pages[i] + 1 for i in range(first, last)):
            base = (pages[first] - first) * size
            return slice(base + start, base + stop)
        table = torch.tensor(pages[first : last + 1]) * size
        return (table[:, None] + torch.arange(size)).flatten()[start - first * size : stop - first * size]

    def write(self, layer: int, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        """k, v: (N, G, D) of the tokens at `slots`."""
        if self.dtype == torch.int8:
            k, v = to_bytes(spread(k.float() - self._centres[layer])), to_bytes(v.float())
        for which, x in enumerate((k, v)):
            self._data[layer, which, slots] = x.to(self.dtype)

    def read(self, layer: int, slots: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values at `slots`, each of their shape with (G, D) behind it."""
        k, v = (self._data[layer, which, slots] for which in (0, 1))
        if self.dtype == torch.int8:
            k, v = spread(from_bytes(k)) + self._centres[layer], from_bytes(v)
        return k.to(dtype), v.to(dtype)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """torch.zeros; on a CPU the system gives the memory page by page as it is written to, and none before."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy's zeros are on huge pages: a token's keys in each of 30 layers would take and clear 60 of 2 MiB.
    kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **kind)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def key_centres(model: Transformer) -> Tensor | None:
    """(n_layers, n_kv_heads, head_dim) float32: the mean of what a bias adds to keys, over the places of the context.

    None without a bias. Scores of one query all move by the same when a constant is taken off every key, which the
    softmax does not see. Biases of Qwen2.5-0.5B reach a length of 279 in a head, nearly all of it in the pairs that
    turn least; INT8 would spend its steps on them.
    """
    config, centres = model.config, []
    for block in model.layers:
        assert isinstance(block, Block)
        bias = getattr(block.attn.qkv, "bias", None)
        if bias is None or config.rope.axes > 1:
            return None
        start, size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        centre = bias.detach().float()[start : start + size].view(config.n_kv_heads, config.head_dim)
        if config.positions == "rope":
            middle = model._inv_freq.float() * (config.max_seq_len / 2)
            mean = model._rope_scale * torch.sinc(middle / math.pi)
            centre = apply_rope(centre, mean * middle.cos(), mean * middle.sin())
        centres.append(centre)
    return torch.stack(centres)


class _Group(NamedTuple):
    """Spans that attend together: one of several tokens, or many of one token.

    rows: their tokens in the pass. slots: their keys, a slice or (S,) for one span, else (B, S), padded with the slot
    of each sequence's first token, so that no one reads what another left. mask: additive or None, as for `attention`.
    """

    n_spans: int
    n_new: int
    rows: slice | Tensor
    slots: slice | Tensor
    mask: Tensor | None


class PagedCache:
    """One pass of spans over a pool. prefix: `Transformer.kv_prefix`, in front of every sequence."""

    offset = 0  # the mask is made here, span by span

    def __init__(
        self, pool: PagedPool, spans: Sequence[Span], prefix: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._pool, self._prefix, self._dtype, self._device = pool, prefix, dtype, device
        self._n_prefix = 0 if prefix is None else prefix.shape[-2]
        places = [pool.slots(span.pages, span.start, span.start + span.n) for span in spans]
        self._new: slice | Tensor = places[0]
        if len(spans) > 1:
            parts = (torch.arange(p.start, p.stop) if isinstance(p, slice) else p for p in places)
            self._new = torch.cat(tuple(parts))
        if isinstance(self._new, Tensor):
            self._new = self._new.to(device)
        self._groups = self._grouped(spans)

    def _grouped(self, spans: Sequence[Span]) -> list[_Group]:
        """Spans of one token go together with those about as long, so that little is padded."""
        singles: defaultdict[int, list[tuple[int, Span]]] = defaultdict(list)
        groups: list[_Group] = []
        row = 0
        for span in spans:
            if span.n == _SINGLE:
                singles[(span.start + 1).bit_length()].append((row, span))
            else:
                groups.append(self._several(row, span))
            row += span.n
        groups += [self._batched(members) for members in singles.values()]
        return groups

    def _several(self, row: int, span: Span) -> _Group:
        n_keys = span.start + span.n
        context = torch.arange(span.n)[None] < span.n_context if span.n_context > 1 else None
        seen = visible(span.n, self._n_prefix + span.start, None, context)
        slots = self._pool.slots(span.pages, 0, n_keys)
        slots = slots if isinstance(slots, slice) else slots.to(self._device)
        return _Group(1, span.n, slice(row, row + span.n), slots, None if seen is None else self._additive(seen))

    def _batched(self, members: Sequence[tuple[int, Span]]) -> _Group:
        if len(members) == 1:
            row, span = members[0]
            return self._several(row, span)
        size = self._pool.page_size
        lengths = torch.tensor([span.start + 1 for _, span in members])
        longest = max(span.start + 1 for _, span in members)
        n_pages = -(-longest // size)
        pages = [list(span.pages[:n_pages]) for _, span in members]
        table = torch.tensor([p + p[:1] * (n_pages - len(p)) for p in pages])
        slots = (table[:, :, None] * size + torch.arange(size)).flatten(1)[:, :longest]
        inside = torch.arange(longest) < lengths[:, None]
        slots = torch.where(inside, slots, slots[:, :1]).to(self._device)
        mask = None
        if not bool(inside.all()):
            seen = torch.nn.functional.pad(inside, (self._n_prefix, 0), value=True)
            mask = self._additive(seen[:, None, None])
        rows = [row for row, _ in members]
        neighbours = rows[-1] - rows[0] == len(rows) - 1
        where = slice(rows[0], rows[-1] + 1) if neighbours else torch.tensor(rows, device=self._device)
        return _Group(len(members), _SINGLE, where, slots, mask)

    def _additive(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(~seen, float("-inf"))
        return mask.to(self._device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q: (1, H, N, D); k, v: (1, G, N, D) of the pass. Returns (1, H, N, D). `mask` is not looked at."""
        self._pool.write(layer, self._new, k[0].transpose(0, 1), v[0].transpose(0, 1))
        if len(self._groups) == 1 and isinstance(self._groups[0].rows, slice):
            return self._attend_group(layer, self._groups[0], q)
        out = torch.empty_like(q)
        for group in self._groups:
            out[:, :, group.rows] = self._attend_group(layer, group, q[:, :, group.rows])
        return out

    def _attend_group(self, layer: int, group: _Group, q: Tensor) -> Tensor:
        keys, values = (x.transpose(-2, -3) for x in self._pool.read(layer, group.slots, q.dtype))
        n, n_heads, n_groups = group.n_spans, q.shape[1], keys.shape[-3]
        keys, values = keys.view(n, *keys.shape[-3:]), values.view(n, *values.shape[-3:])
        if self._prefix is not None:
            in_front = self._prefix[:, layer].to(q.dtype)[:, None].expand(-1, n, -1, -1, -1)
            keys, values = (torch.cat([p, x], dim=2) for p, x in zip(in_front, (keys, values), strict=True))
        if group.n_new > _SINGLE:
            return attention(q, keys, values, group.mask)
        # One query a head: the heads of a group are queries that all see the same keys.
        folded = q[0].transpose(0, 1).unflatten(1, (n_groups, n_heads // n_groups))  # (B, G, H / G, D)
        seen = torch.nn.functional.scaled_dot_product_attention(folded, keys, values, attn_mask=group.mask)
        return seen.flatten(1, 2).transpose(0, 1)[None]

    def advance(self, n_tokens: int) -> None:
        """Nothing to do: how far a sequence has come is its owner's business."""
