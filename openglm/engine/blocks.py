"""BlockManager: who holds which page of the fixed key-value pool, and which pages a new prompt can share. Pure Python.

    python -m pytest -q tests/test_engine_blocks.py

A page holds `page_size` tokens of one sequence. Full pages can be shared: they form a tree whose edges are a page's
tokens (a radix tree cut at page borders), so a page stands for its own tokens and all before them, and a prompt walks
down from the root as far as its tokens lead. Only full pages are in the tree and no one writes to a full page again:
nothing is ever copied. A page without a holder that is in the tree stays there until its room is needed; the one that
was let go longest ago leaves first, and always a page before the page it continues.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["BlockManager"]

_ROOT = 0
_Key = tuple[int, tuple[int, ...]]  # node of the page before, tokens of this page


class BlockManager:
    """Pages 0 to n_pages - 1. share: keep full pages for later prompts (not for prefix-bidirectional models)."""

    def __init__(self, n_pages: int, page_size: int, share: bool = True) -> None:
        if n_pages < 1 or page_size < 1:
            raise ValueError(f"a pool needs pages and tokens in them, not {n_pages} pages of {page_size} tokens")
        self.n_pages, self.page_size, self.share = n_pages, page_size, share
        self._free = list(range(n_pages - 1, -1, -1))  # a stack: neighbours are given out together
        self._holders = [0] * n_pages
        self._node = [_ROOT] * n_pages  # node number of a page in the tree; numbers are never used twice
        self._key: list[_Key | None] = [None] * n_pages
        self._tree: dict[_Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the tree, held by no one; longest idle first
        self._last_node = _ROOT

    @property
    def n_free(self) -> int:
        """Pages that `allocate` could give: unused ones, and idle ones of the tree."""
        return len(self._free) + len(self._idle)

    @property
    def n_idle(self) -> int:
        """Pages kept for later prompts only."""
        return len(self._idle)

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def match(self, ids: Sequence[int]) -> list[int]:
        """Pages of the longest known beginning of ids, now held by the caller too. At least one token is left over."""
        pages: list[int] = []
        node, size = _ROOT, self.page_size
        for start in range(0, (len(ids) - 1) // size * size if self._tree else 0, size):
            page = self._tree.get((node, tuple(ids[start : start + size])))
            if page is None:
                break
            self._hold(page)
            pages.append(page)
            node = self._node[page]
        return pages

    def allocate(self, n: int) -> list[int] | None:
        """n pages of unknown content, held by the caller alone; None, and nothing taken, when there are not so many."""
        if n > self.n_free:
            return None
        while len(self._free) < n:
            self._evict()
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def register(self, pages: list[int], ids: Sequence[int], first: int, n_tokens: int) -> int:
        """Put a sequence's pages from number `first` on into the tree, as far as n_tokens fill them.

        Where the tree already has such a page, the own one is let go and the known one takes its place in `pages`.
        Returns how many leading pages are in the tree now.
        """
        if not self.share:
            return 0
        size = self.page_size
        for i in range(first, n_tokens // size):
            key = (self._node[pages[i - 1]] if i else _ROOT, tuple(ids[i * size : (i + 1) * size]))
            known = self._tree.get(key)
            if known is None:
                self._last_node += 1
                self._node[pages[i]], self._key[pages[i]] = self._last_node, key
                self._tree[key] = pages[i]
            else:
                assert known != pages[i], "a page is put into the tree once"
                self._hold(known)
                self.release([pages[i]])
                pages[i] = known
        return max(first, n_tokens // size)

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page. The last ones of a sequence become idle first, and so leave first."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} is let go more often than it was taken"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._key[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def forget(self) -> None:
        """Empty the tree, as after a change of weights; pages that are held stay with their holders."""
        while self._idle:
            self._evict()
        self._tree.clear()
        self._node, self._key = [_ROOT] * self.n_pages, [None] * self.n_pages

    def _hold(self, page: int) -> None:
        if self._holders[page] == 0:
            del self._idle[page]
        self._holders[page] += 1

    def _evict(self) -> None:
        page, _ = self._idle.popitem(last=False)
        key = self._key[page]
        assert key is not None
        del self._tree[key]
        self._node[page], self._key[page] = _ROOT, None
        self._free.append(page)

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """AssertionError unless every page is in exactly one place and held as often as `held`, all holders' pages."""
        counts = Counter(page for pages in held for page in pages)
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        for page in range(self.n_pages):
            places = (page in free) + (page in idle) + (self._holders[page] > 0)
            assert places == 1, f"page {page} is in {places} places"
            assert self._holders[page] == counts[page], (
                f"page {page}: {counts[page]} hold it, {self._holders[page]} known"
            )
            key = self._key[page]
            assert (key is None) == (self._node[page] == _ROOT)
            assert key is None or self._tree.get(key) == page, f"page {page} and the tree disagree"
            assert page not in free or key is None, f"free page {page} is in the tree"
            assert page not in idle or key is not None, f"idle page {page} is not in the tree"
        assert len(self._tree) == sum(key is not None for key in self._key)
        assert self.share or not self._tree
        self._check_tree()

    def _check_tree(self) -> None:
        """Whatever continues a page is held only with it, and leaves before it."""
        page_of = {self._node[page]: page for page in self._tree.values()}
        assert len(page_of) == len(self._tree), "two pages have one node number"
        rank = {page: i for i, page in enumerate(self._idle)}
        for (before, tokens), page in self._tree.items():
            assert len(tokens) == self.page_size
            if before == _ROOT:
                continue
            parent = page_of[before]
            assert page in rank or parent not in rank, f"page {page} is held without page {parent} before it"
            assert parent not in rank or rank[page] < rank[parent], f"page {parent} would leave before page {page}"
