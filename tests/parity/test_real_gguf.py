"""A real GGUF file, where it has been fetched: ids and greedy tokens that llama.cpp itself gave for it.

The continuations are those of llama.cpp 0.3.36 (Python) on the same weights written as float32, where it rounds no
activations; bench/parity.py compares whole sets. The file is SmolLM2-135M-Instruct in Q4_1.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import openglm
from openglm.chat import ChatModel

FILE = Path.home() / ".cache" / "openglm-real" / "smollm2.gguf"
CASES: list[tuple[str, list[int], list[int]]] = [
    ("The capital of France is", [
        504, 3575, 282, 4649, 314,
    ], [
        7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42,
        33, 34, 42, 37, 35, 30, 2,
    ]),
    ("def fibonacci(n):\n", [
        1604, 3987, 46477, 24, 94, 727, 198,
    ], [
        198, 1604, 3987, 46477, 24, 94, 727, 472, 585, 304, 10204, 216, 33, 42, 448, 1003, 304, 472, 1745, 42,
        448, 1003, 3987, 46477, 24, 94, 731, 216, 33, 25, 1232, 3987,
    ]),
    ("Dear Sir or Madam,\n\nI am writing to", [
        35097, 8957, 355, 7473, 332, 28, 198, 198, 57, 744, 2385, 288,
    ], [
        346, 1834, 28, 198, 198, 57, 744, 2385, 288, 346, 1834, 28, 198, 198, 57, 744, 2385, 288, 346, 1834, 28,
        198, 198, 57, 744, 2385, 288, 346, 1834, 28, 198, 198,
    ]),
    ("中国的首都是", [
        28589, 23022, 138, 11567, 180, 116, 240, 180, 38466, 27830,
    ], [
        22924, 18645, 231, 178, 139, 232, 7906, 138, 11567, 178, 139, 232, 7906, 138, 11567, 178, 139, 232,
        7906, 138, 11567, 178, 139, 232, 7906, 138, 11567, 178, 139, 232, 7906, 138,
    ]),
    ("# 用 Python 写一个快速排序函数\n", [
        19, 216, 23088, 5905, 13223, 224, 243, 43340, 41467, 121, 24838, 249, 33185, 236, 24024, 233, 26217,
        138, 18265, 198,
    ], [
        3725, 5367, 198, 1604, 2365, 79, 14628, 24, 2110, 727, 472, 585, 3858, 24, 2110, 25, 10204, 216, 33, 42,
        448, 1003, 2418, 472, 30230, 79, 3888, 446, 464, 24, 4152, 24,
    ]),
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> ChatModel:
    if not FILE.is_file():
        pytest.skip("needs smollm2.gguf in ~/.cache/openglm-real, which is not here")
    return openglm.load(FILE, device="cpu")


@pytest.mark.parametrize(("prompt", "ids", "continuation"), CASES, ids=range(len(CASES)))
def test_tokens_of_llama_cpp(model: ChatModel, prompt: str, ids: list[int], continuation: list[int]) -> None:
    assert model.tokenizer.encode(prompt) == ids
    # One pass over all of it: each token must be the likeliest behind those before it.
    logits = model.logits([*ids, *continuation[:-1]])[len(ids) - 1 :]
    assert logits.argmax(-1).tolist() == continuation


def test_it_answers_in_its_own_format(model: ChatModel) -> None:
    assert model.meta.chat_format == "chatml" and model.meta.stop_ids
    answer = model.chat([{"role": "user", "content": "What is 2+2? Answer with a number."}], temperature=0.0,
                        max_new_tokens=12)  # fmt: skip
    assert "4" in answer.content
