"""openglm.engine: cached decoding against recomputation, beam search against a plain one, stops, limits, blanks."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openglm.config import GLMConfig, RopeConfig
from openglm.engine import BeamSearch, Engine, fill_blanks, score, sliding_windows
from openglm.model.batch import ForwardBatch, prompt_layout
from openglm.model.init import init_weights
from openglm.model.load import build_transformer
from openglm.model.opened import open_model
from openglm.model.transformer import Transformer
from openglm.types import SamplingParams

SPECIALS = {"[MASK]": 40, "[gMASK]": 41, "[sMASK]": 42, "<sop>": 43, "<eop>": 44}
SHAPE: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "head_dim": 8,
    "ffn_dim": 48,
    "max_seq_len": 48,
    "vocab_size": 48,
}
CONFIGS = {
    "causal": GLMConfig(**SHAPE, n_kv_heads=2, rope=RopeConfig(fraction=0.5)),
    "two-axes": GLMConfig(**SHAPE, n_kv_heads=2, rope=RopeConfig(axes=2), mask="prefix", tie_embeddings=True),
    "one-axis": GLMConfig(**SHAPE, n_kv_heads=4, norm="layer", residual="normed", residual_alpha=2.0, mlp="geglu",
                          linear_bias=True, mask="prefix", tie_embeddings=True),
}  # fmt: skip
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
PROMPTS = {
    "plain": [3, 9, 27, 14],
    "gmask": [41, 43, 5, 6, 7],
    "mask": [3, 4, 40, 5, 6, 43],
    "gmask-behind": [3, 4, 5, 41, 43],
}


def build(kind: str, vocab_size: int | None = None) -> Engine:
    model = init_weights(Transformer(CONFIGS[kind]), seed=1, std=0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
    return Engine(model, SPECIALS, vocab_size)


def recomputed(engine: Engine, prompt: list[int], n_new: int) -> list[int]:
    """Greedy continuation without a cache, positions and context built by hand from the layout of the prompt."""
    layout = prompt_layout(prompt, engine.config, SPECIALS)
    ids = list(prompt)
    for _ in range(n_new):
        context = layout.context(len(ids))[None]
        batch = ForwardBatch(torch.tensor([ids]), layout.positions(0, len(ids))[:, None], context=context)
        with torch.no_grad():
            logits = engine.model.logits(engine.model(batch))[0, -1]
        ids.append(int(logits[: engine.vocab_size].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_cached_decoding_equals_recomputation(kind: str, prompt: str) -> None:
    engine = build(kind)
    completion = engine.generate(PROMPTS[prompt], GREEDY)
    assert list(completion.token_ids) == recomputed(engine, PROMPTS[prompt], 12)
    assert completion.finish_reason == "length"
    # The log-probabilities told while decoding are those of one pass over everything.
    ids = [*PROMPTS[prompt], *completion.token_ids]
    expected = engine.logprobs(ids, len(PROMPTS[prompt]))
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)


def test_logprobs_equal_a_plain_loop() -> None:
    engine = build("two-axes", vocab_size=45)
    ids = [3, 4, 40, 5, 43, 9, 10, 11]
    rows = engine.logits(ids)
    assert rows.shape == (8, 48) and rows.dtype == torch.float32
    expected = [float(rows[t - 1, :45].double().log_softmax(-1)[ids[t]]) for t in range(5, 8)]
    assert engine.logprobs(ids, 5).tolist() == pytest.approx(expected, abs=1e-4)


def test_seeds() -> None:
    engine = build("two-axes")
    params = SamplingParams(max_new_tokens=20, temperature=1.5, top_p=1.0, seed=5)
    first = engine.generate([3, 4], params).token_ids
    assert first == engine.generate([3, 4], params).token_ids
    assert first != engine.generate([3, 4], dataclasses.replace(params, seed=6)).token_ids
    unseeded = {engine.generate([3, 4], dataclasses.replace(params, seed=None)).token_ids for _ in range(3)}
    assert len(unseeded) == 3


def test_stop_ids_end_the_answer_and_are_its_last_token() -> None:
    engine = build("causal")
    free = engine.generate([3, 4], GREEDY).token_ids
    stop = free[4]
    stopped = engine.generate([3, 4], dataclasses.replace(GREEDY, stop_ids=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free[: free.index(stop) + 1]
    steps = list(engine.stream([3, 4], dataclasses.replace(GREEDY, stop_ids=(stop,))))
    assert [s.finish_reason for s in steps] == [None] * (len(steps) - 1) + ["stop"]


def test_the_context_ends_the_answer() -> None:
    engine = build("two-axes")
    completion = engine.generate([3] * 40, dataclasses.replace(GREEDY, max_new_tokens=100))
    assert len(completion.token_ids) == 8 and completion.finish_reason == "length"


@pytest.mark.parametrize(
    "prompt,words",
    [([3] * 48, "48"), ([3] * 60, "60 tokens but"), ([], "empty"), ([48], "0 to 47"), ([-1], "-1")],
)
def test_bad_prompts_are_one_line(prompt: list[int], words: str) -> None:
    engine = build("causal")
    for call in (lambda: engine.stream(prompt, GREEDY), lambda: engine.beam(prompt, 2)):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_padded_rows_of_the_vocabulary_are_never_drawn() -> None:
    engine = build("causal", vocab_size=10)
    hot = SamplingParams(max_new_tokens=40, temperature=50.0, top_p=1.0, seed=0)
    assert max(engine.generate([3], hot).token_ids) < 10
    assert all(max(ids) < 10 for ids, _ in engine.beam([3], 3, 6))
    assert max(build("causal").generate([3], hot).token_ids) >= 10


def test_repetition_penalty_reaches_the_draw() -> None:
    engine = build("causal")
    strong = dataclasses.replace(GREEDY, max_new_tokens=30, repetition_penalty=1e4)
    ids = engine.generate([3, 4], strong).token_ids
    assert len(set(ids)) == 30 and not {3, 4} & set(ids)
    # A stop id in the prompt is not punished, or answers could not end.
    stop = engine.generate([3, 4], GREEDY).token_ids[0]
    again = engine.generate([stop, 3, 4], dataclasses.replace(strong, stop_ids=(stop,)))
    free = engine.generate([stop, 3, 4], dataclasses.replace(strong, repetition_penalty=1.0))
    assert again.finish_reason == "stop" or stop not in free.token_ids[:1]


def test_nan_weights_are_an_error() -> None:
    engine = build("causal")
    with torch.no_grad():
        engine.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="no numbers"):
        engine.generate([3], GREEDY)


# -------------------------------------------------------------------- beam search


def next_logprobs(engine: Engine, ids: list[int], banned: set[int]) -> list[float]:
    layout = prompt_layout(ids, engine.config, SPECIALS)
    batch = ForwardBatch(
        torch.tensor([ids]), layout.positions(0, len(ids))[:, None], context=layout.context(len(ids))[None]
    )
    with torch.no_grad():
        logits = engine.model.logits(engine.model(batch))[0, -1].clone()
    logits[engine.vocab_size :] = float("-inf")
    logits[sorted(banned)] = float("-inf")
    return logits.log_softmax(-1).tolist()


def plain_beam(
    engine: Engine, prompt: list[int], n: int, steps: int, penalty: float, ngram: int, least: int, stops: set[int]
) -> list[tuple[tuple[int, ...], float]]:
    """The same search said plainly: no cache, no tensors, every n-gram listed."""

    def norm(score: float, length: int) -> float:
        return score / ((5 + length) / 6) ** penalty

    alive: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[tuple[tuple[int, ...], float]] = []
    for step in range(1, steps + 1):
        pool = []
        for answer, total in alive:
            banned = set(stops) if step <= least else set()
            ids = [*prompt, *answer]
            if ngram:
                for end in range(len(prompt), len(ids)):
                    gram = ids[end - ngram + 1 : end + 1]
                    if len(gram) == ngram and gram[:-1] == ids[len(ids) - ngram + 1 :]:
                        banned.add(gram[-1])
            pool += [((*answer, t), total + lp) for t, lp in enumerate(next_logprobs(engine, ids, banned))]
        pool = sorted(pool, key=lambda c: -c[1])[: (max(1, len(stops)) + 1) * n]
        alive = []
        for answer, total in pool:
            if answer[-1] in stops:
                finished.append((answer, norm(total, step)))
            elif len(alive) < n:
                alive.append((answer, total))
            else:
                break
        finished = sorted(finished, key=lambda c: -c[1])[:n]
        if len(finished) == n and finished[-1][1] >= norm(max(s for _, s in alive), step):
            return finished
    return sorted([*finished, *((a, norm(s, steps)) for a, s in alive)], key=lambda c: -c[1])[:n]


@pytest.mark.parametrize("kind,prompt", [("causal", "plain"), ("two-axes", "mask"), ("one-axis", "gmask-behind")])
@pytest.mark.parametrize("penalty,ngram,least,stops", [(0.0, 0, 0, ()), (0.7, 2, 0, (1, 17)), (1.0, 3, 4, (5, 30, 31))])
def test_beam_equals_a_plain_search(
    kind: str, prompt: str, penalty: float, ngram: int, least: int, stops: tuple[int, ...]
) -> None:
    engine = build(kind, vocab_size=40)
    got = engine.beam(PROMPTS[prompt], 3, 9, penalty, ngram, least, stops)
    expected = plain_beam(engine, PROMPTS[prompt], 3, 9, penalty, ngram, least, set(stops))
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    assert [value for _, value in got] == pytest.approx([value for _, value in expected], abs=1e-4)


def test_a_wide_beam_finds_the_best_of_all_sequences() -> None:
    engine = build("causal", vocab_size=5)
    best_ids, best = engine.beam([3, 4], 125, 4)[0]
    totals = {
        ids: float(engine.logprobs([3, 4, *ids], 2).sum()) for ids in itertools.product(range(5), repeat=4)
    }  # 625 sequences, scored each in one pass
    assert best == pytest.approx(max(totals.values()), abs=1e-4)
    assert totals[best_ids] == pytest.approx(best, abs=1e-4)


def test_beam_search_survives_when_every_token_is_banned() -> None:
    search = BeamSearch([1], n_beams=2, max_new_tokens=9, no_repeat_ngram=1)
    while not search.done:
        rows, tokens = search.last_step() if search._length else (None, None)
        search.advance(torch.zeros(2, 3))
    assert sorted(search.results()[0][0]) == [0, 1, 2]


def test_golden_beam_of_glm_130b(shared_data: Path) -> None:
    """Ids that GLM-130B's own beam search found with a tiny random checkpoint (see the notes beside the data)."""
    folder = shared_data / "golden" / "glm-130b"
    case = json.loads((folder / "cases.json").read_text())["fill_blanks"]["beam"]
    opened = open_model(folder / "mp1")
    special = opened.meta.special_ids
    engine = Engine(build_transformer(opened, dtype=torch.float32), special)
    prompt = [special["[gMASK]"] if word == "[gMASK]" else int(word) for word in case["raw"].split()]
    n_new = case["out_seq_length"] - len(prompt) - 1
    beams = (case["num_beams"], n_new, case["length_penalty"], case["no_repeat_ngram_size"], case["min_gen_length"])
    found = engine.beam([*prompt, special["<sop>"]], *beams, case["end_tokens"])
    assert [" ".join(map(str, ids)) for ids, _ in found] == [blank for (blank,) in case["blanks"]]
    # The same through the strategy, which puts the best answer in.
    params = SamplingParams(max_new_tokens=n_new, temperature=0.0, stop_ids=tuple(case["end_tokens"]))
    ids, _ = fill_blanks(engine, prompt, params, *beams[:1], *beams[2:])
    assert " ".join(map(str, ids)) == case["answers"][0]


# -------------------------------------------------------------------- blanks


def test_blanks_are_filled_left_to_right_and_put_back() -> None:
    engine = build("two-axes")
    params = SamplingParams(max_new_tokens=4, temperature=0.0, stop_ids=(44,))
    ids, blanks = fill_blanks(engine, [3, 40, 4, 42, 5, 41], params)
    first = engine.generate([3, 40, 4, 42, 5, 43], params).token_ids  # [gMASK] waits for its turn outside
    second = engine.generate([3, *first, 4, 42, 5, 43], params).token_ids
    third = engine.generate([3, *first, 4, *second, 5, 41, 43], params).token_ids
    assert [b.ids for b in blanks] == [first, second, third]
    assert ids == [3, *first, 4, *second, 5, *third]


def test_the_stop_id_of_a_blank_is_not_put_in() -> None:
    engine = build("two-axes")
    free = engine.generate([3, 40, 43], GREEDY).token_ids
    params = dataclasses.replace(GREEDY, stop_ids=(free[1],))
    expected = free[: free.index(free[1])]
    for n_beams in (1, 3):
        ids, (blank,) = fill_blanks(engine, [3, 40], params, n_beams)
        assert free[1] not in ids and ids == [3, *blank.ids]
        assert len(blank.candidates) == n_beams and blank.candidates[0][0] == blank.ids
        if n_beams == 1:
            assert blank.ids == expected and blank.finish_reason == "stop"


def test_fill_wants_a_blank_and_a_model_that_can() -> None:
    with pytest.raises(ValueError, match=r"put \[MASK\]"):
        fill_blanks(build("two-axes"), [3, 4], GREEDY)
    with pytest.raises(ValueError, match="use generate"):
        fill_blanks(build("causal"), [3, 40], GREEDY)


# -------------------------------------------------------------------- scoring


@pytest.mark.parametrize("n,width,stride", [(1, 5, 5), (5, 5, 2), (6, 5, 2), (23, 7, 3), (23, 7, 7), (100, 30, 1)])
def test_windows_score_every_token_once(n: int, width: int, stride: int) -> None:
    windows = sliding_windows(n, width, stride)
    scored = [t for start, stop, first in windows for t in range(first, stop)]
    assert scored == list(range(n))
    assert all(stop - start <= width and start <= first < stop for start, stop, first in windows)
    assert all(first - start == width - stride for start, stop, first in windows[1:-1])


@pytest.mark.parametrize("kind,head", [("causal", []), ("two-axes", [41, 43])])
def test_score_equals_a_plain_loop(kind: str, head: list[int]) -> None:
    engine = build(kind)
    ids = [int(i) for i in torch.randint(0, 40, (50,), generator=torch.Generator().manual_seed(0))]
    got = score(engine, ids, head, window=20, stride=6)
    total, n_scored, width = 0.0, 0, 20 - len(head)
    for t in range(0 if head else 1, len(ids)):
        # The first window that reaches token t is the one that scores it.
        start = next(s for s in range(0, len(ids), 6) if s + width > t)
        row = engine.logits([*head, *ids[start : t + 1]])[-2].double()
        total -= float(row[ids[t]] - row.exp().sum().log())
        n_scored += 1
    assert got.n_tokens == n_scored
    assert got.nll == pytest.approx(total, rel=1e-5)


def test_score_refuses_windows_that_do_not_fit() -> None:
    engine = build("two-axes")
    with pytest.raises(ValueError, match="between 2 and the context of 48"):
        score(engine, [3] * 9, [41, 43], window=49)
    with pytest.raises(ValueError, match="stride must be between 1 and 18"):
        score(engine, [3] * 9, [41, 43], window=20, stride=20)
    with pytest.raises(ValueError, match="too few"):
        score(engine, [3], [], window=20, stride=10)
