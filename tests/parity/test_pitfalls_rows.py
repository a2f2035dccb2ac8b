"""The family's silent errors, put in one by one: stopping and sampling, padded batches, labels, blanks and packing.

    python -m pytest -q tests/parity/test_pitfalls_rows.py

See test_pitfalls.py. Losses are compared with those of the original code on the golden sets' training cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openglm.data.chat import ChatExamples, ChatOptions
from openglm.data.example import Example, chat_example, collate
from openglm.data.infill import InfillParams, SpecialIds, _blanks, _suffix, infill
from openglm.engine import Engine
from openglm.formats import Rendered
from openglm.model.batch import ForwardBatch
from openglm.model.load import build_transformer
from openglm.train.objectives.base import TensorRows
from openglm.train.objectives.tokens import TokenLoss
from openglm.types import IGNORE, SamplingParams
from tests.parity.test_golden import ATOL, Golden, engine_of
from tests.parity.test_pitfalls import CLEAR, difference

LOSS_ATOL, LOSS_CLEAR = 2e-4, 5e-3  # nats; random weights make mistaken means alike too


@pytest.fixture(scope="session")
def sets(shared_data: Path) -> Path:
    return shared_data / "golden"


# -------------------------------------------------------------------- 8, 17: stopping and sampling


def test_8_a_checkpoint_stops_at_all_its_stop_ids(sets: Path) -> None:
    """The original's answer ends early, at <|user|>, the second of three stop ids."""
    golden, case = Golden(sets / "glm-4-9b"), "rope_ratio_1"
    facts = golden.cases["cases"][case]
    opened, _ = engine_of(sets / "glm-4-9b")
    config = replace(opened.config, rope=replace(opened.config.rope, theta=1e4))
    engine = Engine(build_transformer(replace(opened, config=config), dtype=torch.float32), {})
    prompt = golden.ids(case)[: facts["context_length"]]

    def answer(stop_ids: tuple[int, ...]) -> list[int]:
        params = SamplingParams(max_new_tokens=16, temperature=0.0, stop_ids=stop_ids)
        return list(engine.generate(prompt, params).token_ids)

    assert len(facts["greedy"]) < 16 and answer(opened.meta.stop_ids) == facts["greedy"]
    for wrong in (opened.meta.stop_ids[:1], (2,)):
        assert len(answer(wrong)) == 16


def test_17_rows_beyond_the_vocabulary_are_never_drawn(sets: Path) -> None:
    """These weights are random in the padded rows too, so that one of them wins where it may."""
    golden = Golden(sets / "glm-4-9b")
    facts = golden.cases["cases"]["chat"]
    n_ids = max(golden.cases["special_ids"].values()) + 1
    _, engine = engine_of(sets / "glm-4-9b")
    prompt = golden.ids("chat")[: facts["context_length"]]
    for vocab_size, all_known in ((n_ids, True), (None, False)):
        model = Engine(engine.model, engine.special_ids, vocab_size)
        for temperature in (0.0, 1.5):
            drawn = model.generate(prompt, SamplingParams(max_new_tokens=64, temperature=temperature, seed=0))
            assert (max(drawn.token_ids) < n_ids) == all_known


# -------------------------------------------------------------------- 25: left padding


def see_padding(batch: ForwardBatch, lengths: list[int]) -> ForwardBatch:
    return replace(batch, segments=None)


def frozen_unpadded(batch: ForwardBatch, lengths: list[int]) -> ForwardBatch:
    """Context counted in the padded row, the frozen position in the unpadded one."""
    assert batch.context is not None
    position = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
    position = torch.where(batch.context, position, batch.positions[0].amax(1, keepdim=True))
    return replace(batch, positions=torch.stack([position, batch.positions[1]]))


def blocks_from_the_padding(batch: ForwardBatch, lengths: list[int]) -> ForwardBatch:
    """Block positions counted from an index of the unpadded row, so that part of the context has them."""
    start = torch.tensor(lengths)[:, None] - 1
    block = (torch.arange(batch.ids.shape[1]) - start + 1).clamp(min=0)
    return replace(batch, positions=torch.stack([batch.positions[0], block]))


PADDED = [
    *[(name, see_padding) for name in ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b")],
    ("chatglm-6b", frozen_unpadded), ("chatglm-6b", blocks_from_the_padding),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mistake"), PADDED)
def test_25_left_padding(
    sets: Path, name: str, mistake: Callable[[ForwardBatch, list[int]], ForwardBatch]
) -> None:
    """Counting positions from the padding on is no mistake in a rotary model: only distances count there."""
    golden = Golden(sets / name)
    opened, engine = engine_of(sets / name)
    ids, wanted = golden.array("batch_left_pad", "input_ids").long(), golden.array("batch_left_pad", "logits")
    positions = golden.array("batch_left_pad", "position_ids").long()
    lengths = [len(row) for row in golden.cases["cases"]["batch_left_pad"]["rows"]]
    segments = (torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]).long() - 1
    context = None
    if opened.config.mask == "prefix":
        context = torch.arange(ids.shape[1]) < (ids == engine.special_ids["<sop>"]).long().argmax(1)[:, None]
    batch = ForwardBatch(ids, positions.movedim(-2, 0) if positions.dim() == 3 else positions[None], segments, context)

    def error(batch: ForwardBatch) -> float:
        return difference(engine.model.logits(engine.model(batch))[segments == 0], wanted[segments == 0])

    assert error(batch) <= ATOL
    assert error(mistake(batch, lengths)) > CLEAR


def test_25_learned_positions_count_from_the_first_token(sets: Path) -> None:
    golden, case, n_pad = Golden(sets / "glm-10b"), "gmask", 3
    _, engine = engine_of(sets / "glm-10b" / "mp1")
    ids, positions = torch.tensor(golden.ids(case)), golden.array(case, "position_ids").long()
    n = len(ids)
    index = torch.arange(n + n_pad) - n_pad
    context = index < golden.cases["cases"][case]["sep"]
    padded = torch.nn.functional.pad(positions, (n_pad, 0))
    batch = ForwardBatch(
        torch.cat([ids.new_zeros(n_pad), ids])[None], padded[:, None], (index >= 0).long()[None] - 1,
        context[None],
    )  # fmt: skip

    def error(batch: ForwardBatch) -> float:
        return difference(engine.model.logits(engine.model(batch))[0, n_pad:], golden.array(case, "logits"))

    assert error(batch) <= ATOL
    shifted = torch.stack([padded[0] + n_pad, padded[1]])
    assert error(replace(batch, positions=shifted[:, None])) > CLEAR


# -------------------------------------------------------------------- 21: labels and blanks


def loss_of(engine: Engine, *rows: Sequence[Example]) -> tuple[float, float]:
    """(sum of weighted losses, sum of weights) of packed rows."""
    row_len = max(sum(len(example) for example in row) for row in rows)
    found = TokenLoss().loss(engine.model, TensorRows.from_rows(collate(rows, row_len, 0)))
    return float(found.loss), float(found.normaliser)


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b"])
def test_21_labels_are_the_next_tokens(sets: Path, name: str) -> None:
    golden = Golden(sets / name)
    _, engine = engine_of(sets / name)
    ids, answer = np.array(golden.ids("sft_loss"), np.int32), golden.array("sft_loss", "labels").numpy() != IGNORE

    def error(example: Example) -> float:
        loss, n = loss_of(engine, [example])
        return abs(loss / n - golden.cases["cases"]["sft_loss"]["loss"])

    def relabelled(targets: NDArray[np.int32]) -> Example:
        return replace(right, targets=targets)

    right = chat_example(ids, answer, 0, False)
    assert error(right) <= LOSS_ATOL
    here, last = np.where(answer, ids, IGNORE).astype(np.int32), right.targets.copy()
    last[-1] = IGNORE
    header = np.where(np.append(answer[2:], True), ids[1:], IGNORE).astype(np.int32)
    for wrong in (here[:-1], np.append(right.targets[1:], np.int32(IGNORE)), last, header):
        assert error(relabelled(wrong)) > LOSS_CLEAR


class InOrder:
    """A random generator whose permutations are none."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rng, name)

    def permutation(self, n: int) -> NDArray[np.int64]:
        return np.arange(n)


def original_example(golden: Golden, case: str, names: dict[str, int]) -> Example:
    """Our example of a training case's text and spans, in the case's order."""
    facts = golden.cases["cases"][case]
    specials, text = SpecialIds.from_names(names), np.array(facts["text"])
    starts, ends = np.array(facts["spans"]).T
    if facts["task"] == "generation":
        return _suffix(text, int(ends[0] - starts[0]), "gmask", specials, "2d", True)
    return _blanks(text, starts, ends - starts, specials.mask, "mask", InOrder(), specials)  # type: ignore[arg-type]


def no_restart(example: Example) -> Example:
    block = np.where(example.context, 0, np.cumsum(~example.context)).astype(np.int32)
    return replace(example, positions=np.stack([example.positions[0], block]))


def runs_on(example: Example) -> Example:
    index = np.arange(len(example), dtype=np.int32)
    return replace(example, positions=np.stack([index, example.positions[1]]))


def no_end(example: Example) -> Example:
    """<eop> is no target."""
    eop = example.targets[-1]
    return replace(example, targets=np.where(example.targets == eop, IGNORE, example.targets).astype(np.int32))


def sees_answers(example: Example) -> Example:
    return replace(example, context=np.ones(len(example), np.bool_))


@pytest.mark.parametrize(("case", "mistake"), [
    *[("train_bert", mistake) for mistake in (no_restart, runs_on, no_end, sees_answers)],
    *[("train_generation", mistake) for mistake in (runs_on, no_end, sees_answers)],
])  # fmt: skip
def test_21_blanks(sets: Path, case: str, mistake: Callable[[Example], Example]) -> None:
    golden = Golden(sets / "glm-10b")
    _, engine = engine_of(sets / "glm-10b" / "mp1")
    facts = golden.cases["cases"][case]
    right = original_example(golden, case, engine.special_ids)
    assert right.ids.tolist() == golden.ids(case)
    assert np.array_equal(right.positions, golden.array(case, "position_ids").numpy())
    targets = [t if m else IGNORE for t, m in zip(facts["targets"], facts["loss_mask"], strict=True)]
    assert right.targets.tolist() == targets

    def error(example: Example) -> float:
        return abs(loss_of(engine, [example])[0] - facts["masked_loss_sum"])

    assert error(right) <= LOSS_ATOL
    assert error(mistake(right)) > LOSS_CLEAR


def test_21_spans_come_in_shuffled_order() -> None:
    window, specials = np.arange(10, 110), SpecialIds(0, 1, 2, 3, 4)

    def ascending(rng: Any) -> bool:
        example = infill(window, "mask", rng, specials, InfillParams(), ends_document=False)
        blanks = example.positions[0, example.ids == specials.sop]
        assert len(blanks) > 2
        return bool((np.diff(blanks) > 0).all())

    assert sum(ascending(np.random.default_rng(seed)) for seed in range(20)) < 10
    assert all(ascending(InOrder(seed)) for seed in range(20))


# -------------------------------------------------------------------- 26: packing


@pytest.mark.parametrize(("name", "weights", "cases"), [
    ("chatglm2-6b", ".", ("prompt", "sft_loss")), ("glm-4-9b", ".", ("prompt", "chat")),
    ("chatglm-6b", ".", ("gmask", "mid_target")), ("glm-130b", "mp1", ("gmask", "lm_window1_prefix")),
])  # fmt: skip
def test_26_documents_of_a_row_do_not_see_each_other(
    sets: Path, name: str, weights: str, cases: tuple[str, ...]
) -> None:
    golden = Golden(sets / name)
    opened, engine = engine_of(sets / name / weights)
    prefix = opened.config.mask == "prefix"
    examples = []
    for case in cases:
        ids = np.array([*golden.ids(case), 0], np.int32)
        n_context = golden.ids(case).index(engine.special_ids["<sop>"]) if prefix else 0
        examples.append(chat_example(ids, np.ones(len(ids), np.bool_), n_context, opened.config.n_axes == 2))
    # What follows the second document is padding.
    rows = TensorRows.from_rows(collate([examples], sum(map(len, examples)) + 5, 0))
    wanted = torch.cat([golden.array(case, "logits") for case in cases])

    def error(batch: ForwardBatch) -> float:
        return difference(engine.model.logits(engine.model(batch))[0, : len(wanted)], wanted)

    batch = rows.forward_batch(opened.config)
    assert error(batch) <= ATOL
    assert error(replace(batch, segments=None)) > CLEAR


def test_26_every_sequence_counts_the_same(sets: Path) -> None:
    """With `loss_weighting: sequence`: the loss of packed rows is the mean of the sequences' mean losses."""
    golden = Golden(sets / "chatglm2-6b")
    _, engine = engine_of(sets / "chatglm2-6b")
    texts = [golden.ids("prompt"), golden.ids("long")[:30], golden.ids("sft_loss")]
    starts = [len(texts[0]) - 3, 3, len(texts[2]) - 8]  # answers of 3, 27 and 8 tokens
    rendered = [
        Rendered(ids, [i >= start for i in range(len(ids))]) for ids, start in zip(texts, starts, strict=True)
    ]  # fmt: skip
    means = [-float(engine.logprobs(ids, start).mean()) for ids, start in zip(texts, starts, strict=True)]

    def error(weighting: Literal["token", "sequence"]) -> float:
        options = ChatOptions(row_len=64, loss_weighting=weighting)
        a, b, c = ChatExamples(rendered, options, -1, Counter())
        loss, normaliser = loss_of(engine, [a, b], [c])
        return abs(loss / normaliser - float(np.mean(means)))

    assert error("sequence") <= LOSS_ATOL
    assert error("token") > LOSS_CLEAR
