"""Best-fit packing of examples into rows of fixed length, with a small buffer of open rows.

The packer holds examples together with a key (which source, epoch, unit and piece an example came from), so that its
whole state is a short list of keys: the stream draws the examples again after a resume.
"""

from __future__ import annotations

from collections import deque

from openglm.data.example import Example

__all__ = ["Key", "Packer"]

Key = tuple[int, int, int, int]  # source, epoch, unit, piece
Row = list[tuple[Key, Example]]


class Packer:
    """Put each example into the open row that it fills best.

    row_len: tokens a row. n_open: rows held open; more of them pack tighter and delay a sample longer.
    min_len: a row with less room than this is closed at once, as nothing fits any more.
    """

    def __init__(self, row_len: int, n_open: int = 32, min_len: int = 1) -> None:
        self.row_len, self.n_open, self.min_len = row_len, n_open, min_len
        self._open: list[Row] = []
        self._free: list[int] = []
        self._ready: deque[Row] = deque()

    def add(self, key: Key, example: Example) -> None:
        """Place one example of at most row_len tokens; closes rows as they fill or as the buffer overflows."""
        size = len(example)
        assert 0 < size <= self.row_len, f"example of {size} tokens for rows of {self.row_len}"
        best = min((i for i, free in enumerate(self._free) if free >= size), key=self._free.__getitem__, default=None)
        if best is None:
            self._open.append([])
            self._free.append(self.row_len)
            best = len(self._open) - 1
        self._open[best].append((key, example))
        self._free[best] -= size
        if self._free[best] < self.min_len:
            self._close(best)
        elif len(self._open) > self.n_open:
            self._close(min(range(len(self._free)), key=self._free.__getitem__))

    def pop(self) -> list[Example] | None:
        """The examples of the next closed row, or None when there is none yet."""
        return [example for _, example in self._ready.popleft()] if self._ready else None

    def _close(self, index: int) -> None:
        self._ready.append(self._open.pop(index))
        self._free.pop(index)

    def keys(self) -> dict[str, list[list[Key]]]:
        """Keys of the examples in open and in closed rows."""
        return {
            "open": [[key for key, _ in row] for row in self._open],
            "ready": [[key for key, _ in row] for row in self._ready],
        }

    def restore(self, open_rows: list[Row], ready_rows: list[Row]) -> None:
        """Take over rows rebuilt from `keys`."""
        self._open = [list(row) for row in open_rows]
        self._free = [self.row_len - sum(len(example) for _, example in row) for row in self._open]
        self._ready = deque(list(row) for row in ready_rows)
