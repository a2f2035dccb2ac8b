"""KVCache: keys and values of the tokens already seen, one contiguous block a layer. `Cache`: what any cache does."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from openglm.config import GLMConfig
from openglm.ops.attention import attention

__all__ = ["Cache", "KVCache"]


class Cache(Protocol):
    """What `Transformer.forward` asks of a cache. offset: keys in front of the tokens of this pass, for the mask."""

    @property
    def offset(self) -> int: ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Store k, v (B, G, T, D) of the new tokens; what q (B, H, T, D) sees of these and all cached ones."""

    def advance(self, n_tokens: int) -> None:
        """All layers of this pass are done."""


class KVCache:
    """Room for `max_len` tokens of `batch_size` rows of equal length.

    Memory: 2 * n_layers * batch_size * n_kv_heads * max_len * head_dim elements, taken at once.
    prefix: `Transformer.kv_prefix`, put in front of every row; not counted in `length` and `max_len`.
    """

    def __init__(
        self,
        config: GLMConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        prefix: Tensor | None = None,
    ) -> None:
        self.n_prefix = 0 if prefix is None else prefix.shape[-2]
        shape = (2, config.n_layers, batch_size, config.n_kv_heads, self.n_prefix + max_len, config.head_dim)
        self._data = torch.zeros(shape, device=device, dtype=dtype)
        if prefix is not None:
            self._data[..., : self.n_prefix, :] = prefix[:, :, None]
        self.length = 0
        self.max_len = max_len

    @property
    def offset(self) -> int:
        """Keys in front of the next token: the prefix and the cached ones."""
        return self.n_prefix + self.length

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, *self.append(layer, k, v), mask)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, D) of new tokens behind the cached ones; returns views of all, (B, G, offset + T, D).

        `length` moves on only with `advance`, once for all layers.
        """
        start, stop = self.offset, self.offset + k.shape[2]
        assert stop <= self.n_prefix + self.max_len, f"cache of {self.max_len} tokens asked to hold {stop}"
        keys, values = self._data[0, layer, :, :, :stop], self._data[1, layer, :, :, :stop]
        keys[:, :, start:] = k
        values[:, :, start:] = v
        return keys, values

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Forget tokens from `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i]; for beam search. rows: (B,) int64."""
        used = self._data[:, :, :, :, : self.offset]
        used.copy_(used.index_select(2, rows))
