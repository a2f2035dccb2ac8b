"""openglm.engine.blocks: 10,000 random operations against a plain model of who holds what; sharing; who leaves."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

from openglm.engine import blocks as blocks_module
from openglm.engine.blocks import BlockManager

SIZE = 4
PURE = ("blocks", "request", "scheduler", "stream")


def filled(manager: BlockManager, ids: list[int]) -> list[int]:
    """Pages of a sequence that was run alone: matched, allocated, registered."""
    pages = manager.match(ids)
    n_shared = len(pages)
    new = manager.allocate(manager.pages_for(len(ids)) - n_shared)
    assert new is not None
    pages += new
    manager.register(pages, ids, n_shared, len(ids))
    return pages


class Oracle:
    """What each page holds, said plainly: the tokens in it, and all tokens before it."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.content: dict[int, tuple[int, ...]] = {}  # page -> all tokens from the start of its sequence to its end

    def write(self, pages: list[int], ids: list[int], first: int) -> None:
        for i in range(first, len(pages)):
            self.content[pages[i]] = tuple(ids[: (i + 1) * SIZE])

    def check_shared(self, pages: list[int], ids: list[int]) -> None:
        for i, page in enumerate(pages):
            assert self.content[page] == tuple(ids[: (i + 1) * SIZE]), f"page {page} holds something else"


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_random_operations_lose_and_mix_up_nothing(share: bool, seed: int) -> None:
    """Sequences come, grow, are shared, end; every page's content stays what its holders wrote."""
    rng = random.Random(seed)
    manager = BlockManager(40, SIZE, share)
    oracle = Oracle(manager)
    live: list[tuple[list[int], list[int], int]] = []  # pages, ids, pages in the tree
    n_matched = n_refused = 0
    for number in range(10_000):
        choice = rng.random()
        if choice < 0.45:
            ids = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]  # two tokens: beginnings often agree
            pages = manager.match(ids)
            oracle.check_shared(pages, ids)
            assert len(pages) * SIZE < len(ids)
            n_matched += len(pages)
            new = manager.allocate(manager.pages_for(len(ids)) - len(pages))
            if new is None:
                manager.release(pages)
                n_refused += 1
            else:
                assert not set(new) & {p for other, _, _ in live for p in other}, "a page was given out twice"
                oracle.write(pages + new, ids, len(pages))
                live.append((pages + new, ids, len(pages)))
        elif choice < 0.8 and live:
            pages, ids, n_shared = live.pop(rng.randrange(len(live)))
            grown = ids + [rng.randrange(2) for _ in range(rng.randrange(0, 6))]
            new = manager.allocate(manager.pages_for(len(grown)) - len(pages))
            if new is not None:
                pages, ids = pages + new, grown
                oracle.write(pages, ids, len(ids) // SIZE if not new else len(pages) - len(new))
            oracle.write(pages, ids, n_shared)
            n_shared = manager.register(pages, ids, n_shared, len(ids))
            oracle.check_shared(pages[: len(ids) // SIZE], ids)
            live.append((pages, ids, n_shared))
        elif live:
            pages, _, _ = live.pop(rng.randrange(len(live)))
            manager.release(pages)
        elif choice > 0.99:
            manager.forget()
        if number % 5 == 0:
            manager.check_integrity([pages for pages, _, _ in live])
    assert n_refused > 100 and (n_matched > 100) == share
    for pages, _, _ in live:
        manager.release(pages)
    manager.check_integrity([])
    assert manager.n_free == 40
    manager.forget()
    manager.check_integrity([])
    assert sorted(manager.allocate(40) or []) == list(range(40))


def test_a_known_beginning_is_shared_and_one_token_is_left_over() -> None:
    manager = BlockManager(10, SIZE)
    first = filled(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert manager.match([1, 2, 3, 4, 5, 6, 7, 8]) == first[:1]  # not all 8: there must be a token to run
    assert manager.match([1, 2, 3, 4, 5, 6, 7, 8, 0]) == first[:2]
    assert manager.match([1, 2, 3, 4, 5, 6, 0, 8, 0]) == first[:1]
    assert manager.match([5, 6, 7, 8, 9]) == []  # the same page after another beginning is another page
    manager.check_integrity([first, first[:1], first[:2], first[:1]])


def test_two_that_computed_the_same_page_end_with_one() -> None:
    manager = BlockManager(10, SIZE)
    ids = [1, 2, 3, 4, 5, 6, 7, 8]
    first, second = manager.allocate(2), manager.allocate(2)
    assert first is not None and second is not None
    manager.register(first, ids, 0, 8)
    assert manager.register(second, ids, 0, 8) == 2
    assert second == first and manager.n_free == 8
    manager.check_integrity([first, second])


def test_the_longest_idle_leaves_first_and_an_end_before_its_beginning() -> None:
    manager = BlockManager(4, SIZE)
    old, new = [1] * 8, [2] * 8
    for ids in (old, new):
        manager.release(filled(manager, ids))
    assert manager.n_idle == manager.n_free == 4
    manager.release(manager.match([*old, 0]))  # used again: now `new` is the longest idle
    taken = manager.allocate(1)
    assert taken is not None
    for ids, n_pages in ((old, 2), (new, 1)):
        found = manager.match([*ids, 0])
        assert len(found) == n_pages
        manager.release(found)
    manager.check_integrity([taken])


def test_too_few_pages_take_nothing() -> None:
    manager = BlockManager(3, SIZE)
    held = manager.allocate(2)
    assert held is not None
    assert manager.allocate(2) is None and manager.n_free == 1
    manager.check_integrity([held])
    with pytest.raises(ValueError, match="0 pages of 4"):
        BlockManager(0, SIZE)


def test_the_check_finds_what_is_wrong() -> None:
    """Lost pages, pages that are free and held, wrong counts and a damaged tree do not pass."""
    ids = [1, 2, 3, 4, 5, 6, 7, 8]

    def damaged(kind: str) -> BlockManager:
        manager = BlockManager(6, SIZE)
        pages = filled(manager, ids)
        if kind == "lost":
            manager._free.pop()
        elif kind == "free and held":
            manager._free.append(pages[0])
        elif kind == "count":
            manager._holders[pages[0]] += 1
        elif kind == "tree":
            manager._tree.popitem()
        elif kind == "order":
            manager.release(pages)
            manager._idle.move_to_end(pages[1])
            pages = []
        with pytest.raises(AssertionError):
            manager.check_integrity([pages] if pages else [])
        return manager

    for kind in ("lost", "free and held", "count", "tree", "order"):
        damaged(kind)


@pytest.mark.parametrize("name", PURE)
def test_pure_python(name: str) -> None:
    source = (Path(blocks_module.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    found = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert found <= {"__future__", "collections", "dataclasses", "typing", "openglm"}
    assert "openglm.model" not in source
