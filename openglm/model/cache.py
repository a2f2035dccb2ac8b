"""KVCache: keys and values of the tokens already seen, one contiguous block a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from openglm.config import GLMConfig

__all__ = ["KVCache"]


class KVCache:
    """Room for `max_len` tokens of `batch_size` rows of equal length.

    Memory: 2 * n_layers * batch_size * n_kv_heads * max_len * head_dim elements, taken at once.
    """

    def __init__(
        self,
        config: GLMConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (2, config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim)
        self._data = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.max_len = max_len

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, D) of new tokens behind the cached ones; returns views of all, (B, G, length + T, D).

        `length` moves on only with `advance`, once for all layers.
        """
        stop = self.length + k.shape[2]
        assert stop <= self.max_len, f"cache of {self.max_len} tokens asked to hold {stop}"
        keys, values = self._data[0, layer, :, :, :stop], self._data[1, layer, :, :, :stop]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Forget tokens from `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i]; for beam search. rows: (B,) int64."""
        used = self._data[:, :, :, :, : self.length]
        used.copy_(used.index_select(2, rows))
