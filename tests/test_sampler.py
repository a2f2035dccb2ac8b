"""openglm.engine.sampler: penalties, bias and minimum length against float64; independence, repetition, faults."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from openglm.engine.sampler import Drawn, Sampler, draw_batch
from openglm.types import Grammar, SamplingParams

VOCAB = 400
PROMPT = [1, 5, 5, 7, 390]


def rows(n: int, seed: int = 0, vocab: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference(logits: torch.Tensor, p: SamplingParams, prompt: list[int], answer: list[int]) -> Any:
    """Adjusted logits by the book, in float64 and one token at a time."""
    out = logits.double().numpy().copy()
    for token in range(len(out)):
        n = answer.count(token)
        if token not in p.stop_ids:
            if n or token in prompt:
                out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
            out[token] -= n * p.frequency_penalty + (n > 0) * p.presence_penalty
        out[token] += dict(p.logit_bias).get(token, 0.0)
        if token in p.stop_ids and len(answer) < p.min_new_tokens:
            out[token] = -math.inf
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.7},
        {"presence_penalty": -0.9},
        {"logit_bias": {2: 3.5, 399: -100.0, 5: 1.0}},
        {"min_new_tokens": 3},
        {"repetition_penalty": 0.8, "frequency_penalty": 0.2, "presence_penalty": 0.5, "logit_bias": {7: -2.0, 9: 4.0},
         "min_new_tokens": 2},
    ],
)  # fmt: skip
def test_adjusted_logits_equal_float64(options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0.0, stop_ids=(1, 3), **options)
    sampler = Sampler(params, PROMPT, VOCAB)
    answer: list[int] = []
    for step, row in enumerate(rows(150, seed=3)):
        expected = reference(row, params, PROMPT, answer)
        np.testing.assert_allclose(sampler.adjusted(row).numpy(), expected, rtol=2e-6, atol=2e-6)
        drawn = sampler.draw(row)
        assert drawn.token_id == expected.argmax()
        assert drawn.logprob == pytest.approx(float(row.double().log_softmax(-1)[drawn.token_id]), abs=1e-5)
        token = [7, 8, 8, 399][step % 4] if step < 8 else drawn.token_id
        sampler.accept(token)
        answer.append(token)


def test_adjusted_logits_equal_transformers() -> None:
    params = SamplingParams(repetition_penalty=1.4, min_new_tokens=4, stop_ids=(11, 12))
    prompt = [20, 21, 22, 20]
    theirs = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.4), MinNewTokensLengthLogitsProcessor(4, 4, [11, 12])]
    )
    sampler, ids = Sampler(params, prompt, VOCAB), list(prompt)
    for row in rows(6, seed=8):
        torch.testing.assert_close(sampler.adjusted(row)[None], theirs(torch.LongTensor([ids]), row[None].clone()))
        ids.append(sampler.draw(row).token_id)
        sampler.accept(ids[-1])


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "top_logprobs": 4, "min_new_tokens": 2, "stop_ids": (3,)},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "top_p": 1.0, "seed": 2},
    {"temperature": 0.9, "top_k": 5, "min_p": 0.01, "seed": 3, "repetition_penalty": 1.2},
    {"temperature": 0.7, "seed": 4, "frequency_penalty": 0.5, "logit_bias": {4: 2.0}, "top_logprobs": 20},
]


def written(indices: list[int], n_steps: int = 12) -> dict[int, list[Drawn]]:
    """What the mixed requests draw when only these of them run; each has logits of its own."""
    samplers = {i: Sampler(SamplingParams(**MIXED[i]), PROMPT, 50_000) for i in indices}
    found: dict[int, list[Drawn]] = {i: [] for i in indices}
    for step in range(n_steps):
        logits = torch.stack([rows(1, 100 * i + step, 50_100)[0] for i in indices])
        for i, drawn in zip(indices, draw_batch(list(samplers.values()), logits), strict=True):
            samplers[i].accept(drawn.token_id)
            found[i].append(drawn)
    return found


def test_a_row_does_not_depend_on_its_company() -> None:
    together = written(list(range(len(MIXED))))
    for i in together:
        assert written([i])[i] == together[i]
    assert written([4, 1])[4] == together[4]
    assert all(d.token_id < 50_000 for drawn in together.values() for d in drawn)


def test_only_accepted_tokens_count() -> None:
    params = SamplingParams(temperature=1.0, top_p=1.0, seed=9, frequency_penalty=1.0)
    sampler, straight = Sampler(params, PROMPT, VOCAB), Sampler(params, PROMPT, VOCAB)
    for row in rows(30, seed=5):
        first = sampler.draw(row)
        for other in rows(3, seed=6):  # guesses that come to nothing
            sampler.draw(other)
        assert sampler.draw(row) == first == straight.draw(row)
        sampler.accept(first.token_id)
        straight.accept(first.token_id)


def test_seeds() -> None:
    def ids(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, top_p=1.0, seed=seed), PROMPT, VOCAB)
        found = []
        for row in rows(20, seed=7, scale=0.5):
            found.append(sampler.draw(row).token_id)
            sampler.accept(found[-1])
        return found

    assert ids(1) == ids(1) != ids(2) and ids(None) != ids(None)


def test_top_logprobs_equal_a_full_sort() -> None:
    for scale in (0.01, 2.0, 30.0):
        row = rows(1, seed=4, scale=scale)[0]
        drawn = Sampler(SamplingParams(temperature=0.0, top_logprobs=20), PROMPT, VOCAB).draw(row)
        expected = row.double().log_softmax(-1).sort(descending=True)
        assert [i for i, _ in drawn.top_logprobs] == expected.indices[:20].tolist()
        assert [v for _, v in drawn.top_logprobs] == pytest.approx(expected.values[:20].tolist(), abs=1e-5)
        assert drawn.top_logprobs[0] == (drawn.token_id, drawn.logprob)


def test_padding_is_never_drawn_nor_counted() -> None:
    logits = torch.cat([torch.zeros(VOCAB), torch.full((100,), 50.0)])
    for temperature in (0.0, 1.0):
        drawn = Sampler(SamplingParams(temperature=temperature, top_logprobs=3, seed=0), PROMPT, VOCAB).draw(logits)
        assert drawn.token_id < VOCAB and drawn.logprob == pytest.approx(-math.log(VOCAB))
        assert all(i < VOCAB for i, _ in drawn.top_logprobs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_logits_end_one_request_only(value: float) -> None:
    logits = rows(3)
    logits[1, 17] = value
    logits[2] = -math.inf
    logits[2, 8] = 0.0
    samplers = [Sampler(SamplingParams(seed=0, logit_bias=bias), PROMPT, VOCAB) for bias in ({}, {}, {8: -math.inf})]
    good, damaged, impossible = draw_batch(samplers, logits)
    assert good.error is None and good == draw_batch(samplers[:1], logits[:1])[0]
    assert damaged.token_id == impossible.token_id == -1 and math.isnan(damaged.logprob)
    assert isinstance(damaged.error, FloatingPointError) and "no token is possible" in str(impossible.error)


def test_what_a_sampler_refuses() -> None:
    with pytest.raises(ValueError, match="logit_bias has token id 400: the vocabulary has 0 to 399"):
        Sampler(SamplingParams(logit_bias={400: 1.0}), PROMPT, VOCAB)
    with pytest.raises(ValueError, match="stop_strings need text"):
        Sampler(SamplingParams(stop_strings=("x",)), PROMPT, VOCAB)
    with pytest.raises(ValueError, match="a grammar needs a tokenizer"):
        Sampler(SamplingParams(grammar=Grammar("json")), PROMPT, VOCAB)


@pytest.mark.parametrize(
    "field,value",
    [
        ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("min_new_tokens", -1), ("min_new_tokens", 300),
        ("temperature", -1.0), ("temperature", math.nan), ("temperature", "hot"), ("temperature", math.inf),
        ("top_k", -1), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.0), ("min_p", -0.1),
        ("repetition_penalty", 0.0), ("frequency_penalty", math.nan), ("presence_penalty", math.inf),
        ("top_logprobs", 21), ("top_logprobs", -1), ("seed", 2**64), ("seed", 0.5), ("seed", "x"),
        ("logit_bias", {1: math.nan}), ("logit_bias", {1: math.inf}), ("logit_bias", {"a": 1}), ("logit_bias", [1]),
        ("stop_ids", ("a",)), ("stop_strings", ("",)), ("stop_strings", "abc"), ("stop_strings", (1,)),
        ("grammar", "json"),
    ],
)  # fmt: skip
def test_parameters_name_the_field_that_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_parameters_are_values() -> None:
    one = SamplingParams(logit_bias={5: 1, 2: -math.inf}, stop_strings=["a"], stop_ids=[3])  # type: ignore[arg-type]
    two = SamplingParams(logit_bias={"2": -math.inf, "5": 1.0}, stop_strings=("a",), stop_ids=(3,))  # type: ignore[dict-item]
    assert one == two and hash(one) == hash(two) and one.logit_bias == ((2, -math.inf), (5, 1.0))
    for kind, text in (("xml", "x"), ("json", "{}"), ("regex", "")):
        with pytest.raises(ValueError, match="grammar"):
            Grammar(kind, text)  # type: ignore[arg-type]
