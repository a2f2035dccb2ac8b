"""Tiny checkpoints in the released layouts, loaded as they lie, against what the originals' own code computed."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from openglm.engine import Engine, fill_blanks
from openglm.model.adapters import apply_adapter
from openglm.model.batch import ForwardBatch, prompt_layout
from openglm.model.load import build_transformer
from openglm.model.opened import OpenedModel, open_model
from openglm.model.transformer import Transformer
from openglm.model.weights import export_weights
from openglm.ops.quant import QuantTensor
from openglm.types import SamplingParams

ATOL = 2e-4

# (set, checkpoint, case, name of the array): logits from token ids alone; prefix, mask and positions are derived.
CASES = [
    *[("glm-130b", rank, case, "logits") for rank in ("mp1", "mp2") for case in ("gmask", "mask", "smask")],
    ("glm-130b", "mp1", "lm_window0_uni", "logits"), ("glm-130b", "mp1", "lm_window1_prefix", "logits"),
    *[("glm-130b", f"mp1-int{b}", case, f"logits_int{b}") for b in (4, 8) for case in ("gmask", "mask", "smask")],
    *[("glm-130b", "mp2-int4", case, "logits_mp2_int4") for case in ("gmask", "mask")],
    *[("chatglm-6b", ".", case, "logits") for case in ("gmask", "mask_multi", "mask_and_gmask", "mid_target")],
    *[("chatglm-6b", f"int{b}", case, f"logits_int{b}") for b in (4, 8) for case in ("gmask", "mask_multi")],
    ("chatglm2-6b", ".", "prompt", "logits"), ("chatglm2-6b", ".", "long", "logits"),
    ("chatglm2-6b", "int4", "prompt", "logits_int4"), ("chatglm2-6b", "int8", "prompt", "logits_int8"),
    ("chatglm3-6b", ".", "prompt", "logits"), ("chatglm3-6b", ".", "chat", "logits"),
    ("chatglm3-6b", "int4", "prompt", "logits_int4"), ("codegeex2-6b", ".", "prompt", "logits"),
    ("glm-4-9b", ".", "prompt", "logits"), ("glm-4-9b", ".", "chat", "logits"), ("glm-4-9b", ".", "long", "logits"),
    ("glm-4v-9b", ".", "text_only", "logits"),
    *[("glm-10b", rank, case, "logits") for rank in ("mp1", "mp2")
      for case in ("gmask", "mask", "two_masks", "train_generation")],
]  # fmt: skip
GREEDY = [
    ("glm-130b", "mp1", "gmask"), ("glm-130b", "mp2", "mask"), ("glm-130b", "mp1", "smask"),
    ("chatglm-6b", ".", "gmask"), ("chatglm-6b", ".", "mask_multi"), ("chatglm2-6b", ".", "prompt"),
    ("chatglm3-6b", ".", "chat"), ("codegeex2-6b", ".", "prompt"), ("glm-4-9b", ".", "prompt"),
    ("glm-4-9b", ".", "chat"),
]  # fmt: skip
PREFIXES = [
    *[("ptuning-v2-chatglm-6b", kind, f"{kind}_{case}") for kind in ("plain", "projection")
      for case in ("gmask", "mask")],
    *[("ptuning-v2-chatglm2-6b", kind, kind) for kind in ("plain", "projection")],
]  # fmt: skip
CHECKPOINTS = sorted({(name, weights) for name, weights, *_ in CASES})


@lru_cache(maxsize=64)
def engine_of(path: Path, adapter: Path | None = None) -> tuple[OpenedModel, Engine]:
    opened = open_model(path)
    if adapter is not None:
        opened = apply_adapter(opened, adapter)
    return opened, Engine(build_transformer(opened, dtype=torch.float32), opened.meta.special_ids)


class Golden:
    """The cases and arrays of one set."""

    def __init__(self, folder: Path) -> None:
        self.cases = json.loads((folder / "cases.json").read_text())
        self.arrays = np.load(folder / "cases.npz")

    def array(self, case: str, *names: str) -> torch.Tensor:
        found = [f"{case}.{n}" for n in names if f"{case}.{n}" in self.arrays]
        return torch.from_numpy(self.arrays[found[0]])

    def ids(self, case: str) -> list[int]:
        return self.array(case, "input_ids", "tokens").reshape(-1).tolist()


@pytest.fixture(scope="session")
def sets(shared_data: Path) -> Path:
    return shared_data / "golden"


@pytest.mark.parametrize(("name", "weights", "case", "array"), CASES)
def test_logits_from_ids(sets: Path, name: str, weights: str, case: str, array: str) -> None:
    golden = Golden(sets / name)
    if f"{case}.{array}" not in golden.arrays:
        pytest.skip(f"the golden set {name} has no array {case}.{array}")
    _, engine = engine_of(sets / name / weights)
    torch.testing.assert_close(engine.logits(golden.ids(case)), golden.array(case, array), rtol=0, atol=ATOL)


@pytest.mark.parametrize(("name", "kind", "case"), PREFIXES)
def test_prefix_tuning(sets: Path, name: str, kind: str, case: str) -> None:
    golden = Golden(sets / name)
    _, engine = engine_of((sets / name / golden.cases["base"]).resolve(), sets / name / kind)
    ids, facts = golden.ids(case), golden.cases["cases"][case]
    torch.testing.assert_close(engine.logits(ids), golden.array(case, "logits"), rtol=0, atol=ATOL)
    assert greedy(engine, ids[: facts["context_length"]], len(facts["greedy"])) == facts["greedy"]


def greedy(engine: Engine, prompt: list[int], n: int) -> list[int]:
    return list(engine.generate(prompt, SamplingParams(max_new_tokens=n, temperature=0.0)).token_ids)


@pytest.mark.parametrize(("name", "weights", "case"), GREEDY)
def test_greedy_continuation_with_cache(sets: Path, name: str, weights: str, case: str) -> None:
    golden = Golden(sets / name)
    facts = golden.cases["cases"][case]
    _, engine = engine_of(sets / name / weights)
    prompt = golden.ids(case)[: facts["context_length"]]
    assert greedy(engine, prompt, len(facts["greedy"])) == facts["greedy"]


def test_layout_rule_gives_the_original_positions_and_mask(sets: Path) -> None:
    for name, weights, case in GREEDY:
        golden = Golden(sets / name)
        opened, engine = engine_of(sets / name / weights)
        ids = golden.ids(case)
        n_prompt = golden.cases["cases"][case]["context_length"]
        layout = prompt_layout(ids[:n_prompt], opened.config, engine.special_ids)
        positions = golden.array(case, "position_ids").view(opened.config.n_axes, -1)
        assert torch.equal(layout.positions(0, len(ids)), positions.long()), (name, case)
        if f"{case}.masked" in golden.arrays:
            seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() | layout.context(len(ids))[None]
            assert torch.equal(~seen, golden.array(case, "masked")), (name, case)


def test_a_start_token_that_was_drawn_opens_no_blank(sets: Path) -> None:
    """The original GLM counts block positions on through it as it generates; a blank's own start restarts them."""
    golden = Golden(sets / "glm-10b")
    opened, engine = engine_of(sets / "glm-10b" / "mp1")
    for case, n_starts in (("gmask", 1), ("two_masks", 2)):
        ids, sop = golden.ids(case), engine.special_ids["<sop>"]
        assert ids.count(sop) == n_starts
        drawn, other = ([*ids, last, 7, 7] for last in (sop, 7))
        layouts = [prompt_layout(row, opened.config, engine.special_ids) for row in (drawn, other)]
        assert torch.equal(*(layout.positions(0, len(drawn)) for layout in layouts))


@pytest.mark.parametrize(("name", "case"), [("glm-130b", "choice_mask"), ("glm-130b", "choice_gmask"),
                                            ("glm-10b", "train_bert")])  # fmt: skip
def test_logits_with_given_positions_and_mask(sets: Path, name: str, case: str) -> None:
    golden = Golden(sets / name)
    opened, engine = engine_of(sets / name / "mp1")
    ids = torch.tensor(golden.ids(case))[None]
    positions = golden.array(case, "position_ids").long().view(opened.config.n_axes, 1, -1)
    n = ids.shape[1]
    if f"{case}.masked" in golden.arrays:
        seen = ~golden.array(case, "masked")
    else:
        open_columns = torch.arange(n) < golden.cases["cases"][case]["sep"]
        seen = torch.ones(n, n, dtype=torch.bool).tril() | open_columns[None]
    ours = run_with_mask(engine.model, ForwardBatch(ids, positions), seen)
    torch.testing.assert_close(ours, golden.array(case, "logits"), rtol=0, atol=ATOL)


def run_with_mask(model: Transformer, batch: ForwardBatch, seen: torch.Tensor) -> torch.Tensor:
    """Forward with an arbitrary (T, T) visibility, which multi-choice packing needs."""
    import openglm.model.transformer as module

    original = module.visible
    module.visible = lambda *a, **k: seen[None, None]
    try:
        return model.logits(model(batch))[0]
    finally:
        module.visible = original


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b"])
def test_left_padded_batch_equals_the_original(sets: Path, name: str) -> None:
    golden = Golden(sets / name)
    opened, engine = engine_of(sets / name)
    ids = golden.array("batch_left_pad", "input_ids").long()
    positions = golden.array("batch_left_pad", "position_ids").long()
    positions = positions.transpose(0, 1) if positions.dim() == 3 else positions[None]
    n_pad = torch.tensor([ids.shape[1] - len(row) for row in golden.cases["cases"]["batch_left_pad"]["rows"]])
    index = torch.arange(ids.shape[1])
    segments = (index >= n_pad[:, None]).long() - 1
    context = None
    if opened.config.mask == "prefix":
        context = index < (ids == engine.special_ids["<sop>"]).long().argmax(1)[:, None]
    ours = engine.model.logits(engine.model(ForwardBatch(ids, positions, segments, context)))
    theirs = golden.array("batch_left_pad", "logits")
    torch.testing.assert_close(ours[segments == 0], theirs[segments == 0], rtol=0, atol=ATOL)


@pytest.mark.parametrize(("name", "case", "version"), [
    ("chatglm2-6b", "rope_ratio_4", "4.27.1"), ("chatglm3-6b", "rope_ratio_50", "4.30.2"),
    ("glm-4-9b", "rope_ratio_1", "4.40.2"),
])  # fmt: skip
def test_rope_ratio(sets: Path, tmp_path: Path, name: str, case: str, version: str) -> None:
    """ChatGLM2 divides positions by it, later releases multiply the base."""
    golden = Golden(sets / name)
    facts = golden.cases["cases"][case]
    config = json.loads((sets / name / "config.json").read_text())
    assert config["transformers_version"] == version
    for path in (sets / name).iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_ratio": facts["rope_ratio"]}))
    _, engine = engine_of(tmp_path)
    torch.testing.assert_close(engine.logits(golden.ids(case)), golden.array(case, "logits"), rtol=0, atol=ATOL)


@pytest.mark.parametrize("case", ["two_masks", "no_mask"])
def test_fill_loop_of_glm_130b(sets: Path, case: str) -> None:
    facts = Golden(sets / "glm-130b").cases["fill_blanks"][case]
    _, engine = engine_of(sets / "glm-130b" / "mp1")
    special = engine.special_ids
    words = facts["raw"].split() + ([] if "MASK" in facts["raw"] else ["[gMASK]"])
    ids = [special[w] if w in special else int(w) for w in words]
    if words[-1] not in special:
        ids.append(special["</s>"])  # the original ends a context that way, unless it ends in a mask
    params = SamplingParams(max_new_tokens=40, temperature=0.0, stop_ids=tuple(facts["end_tokens"]))
    _, blanks = fill_blanks(engine, ids, params)
    wanted = facts["blanks"][0]
    assert len(blanks) == len(wanted)
    for blank, answer in zip(blanks, wanted, strict=True):
        # The original cuts an answer at a length of the whole row; until then ours is the same.
        ours = [str(i) for i in blank.ids]
        assert ours[: len(answer.split())] == answer.split()
    if case == "two_masks":  # its first answer ends at an end id
        assert [str(i) for i in blanks[0].ids] == wanted[0].split() and blanks[0].finish_reason == "stop"


@pytest.mark.parametrize(("name", "weights"), CHECKPOINTS)
def test_weight_table_out_and_back_is_exact(sets: Path, name: str, weights: str) -> None:
    opened, _ = engine_of(sets / name / weights)
    assert opened.table is not None
    for theirs, weight in export_weights(opened.table, opened.config, opened.weights()):
        original = opened.source.get(theirs)
        if isinstance(weight, QuantTensor):
            assert isinstance(original, QuantTensor)
            assert torch.equal(weight.q, original.q) and torch.equal(weight.scale, original.scale), theirs
        else:
            assert isinstance(original, torch.Tensor)
            assert torch.equal(weight, original), theirs
