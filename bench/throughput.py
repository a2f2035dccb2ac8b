"""Many requests at once: our engine, llama.cpp and transformers on the same GGUF file and the same requests.

    python bench/throughput.py model.gguf --peer-python PYTHON   # an interpreter that has llama-cpp-python

32 requests are there at the start: prompts of 64 to 512 tokens cut out of a text, answers of 32 to 256 tokens, greedy,
no end before that. Every side runs in a process of its own and is timed from there, the model being loaded, to the
last token:

    openglm         one Engine as `openglm.load` makes it, all requests submitted at once
    llama.cpp       one request after the other, as the server of its Python package works
    llama.cpp slots llama_decode over many sequences: what its C++ server does, without a server; for every number of
                    slots in --slots, the best counts
    transformers    the file read by `from_pretrained(gguf_file=...)`, bfloat16, padded batches of requests with answers
                    about as long; for every size in --batches, the best counts

Prints a table, and one JSON line last.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval" / "wikitext-2" / "valid.txt"
STEP_TOKENS = 512  # tokens of a pass, here and there
Requests = list[dict[str, Any]]  # {"ids": prompt, "n_new": tokens to draw}, and "got" with the ids that were drawn


class Clock:
    """Seconds since the start; of each request when its first token was there."""

    def __init__(self, requests: Requests) -> None:
        self.first: list[float | None] = [None] * len(requests)
        self.start = time.perf_counter()

    def token(self, number: int) -> None:
        if self.first[number] is None:
            self.first[number] = time.perf_counter() - self.start

    def result(self, requests: Requests) -> dict[str, Any]:
        seconds = time.perf_counter() - self.start
        assert all(len(r["got"]) == r["n_new"] for r in requests)
        return {"seconds": seconds, "first_s": self.first, "got": [r["got"] for r in requests]}


# -------------------------------------------------------------------- the sides


def openglm_side(path: str, requests: Requests, threads: int, setting: int) -> dict[str, Any]:
    import openglm
    from openglm.types import SamplingParams

    engine = openglm.load(path, device="cpu").engine
    engine.generate(requests[0]["ids"][:32], SamplingParams(max_new_tokens=2, temperature=0.0))
    engine.forget()
    numbers: dict[int, int] = {}
    clock = Clock(requests)
    for number, request in enumerate(requests):
        params = SamplingParams(max_new_tokens=request["n_new"], temperature=0.0)
        numbers[engine.add_request(request["ids"], params)] = number
        request["got"] = []
    while engine.has_work:
        for step in engine.step():
            assert step.error is None
            number = numbers[step.request_id]
            clock.token(number)
            requests[number]["got"].append(step.token_id)
    return clock.result(requests)


def llama_side(path: str, requests: Requests, threads: int, setting: int) -> dict[str, Any]:
    from llama_cpp import Llama

    longest = max(len(r["ids"]) + r["n_new"] for r in requests)
    llama = Llama(
        path, n_ctx=longest + 8, n_batch=STEP_TOKENS, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    llama.eval(requests[0]["ids"][:32])
    clock = Clock(requests)
    for number, request in enumerate(requests):
        llama.reset()
        llama.eval(request["ids"])
        request["got"] = got = []
        while True:
            logits = llama._ctx.get_logits_ith(-1)
            got.append(int(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),)).argmax()))
            clock.token(number)
            if len(got) == request["n_new"]:
                break
            llama.eval(got[-1:])
    return clock.result(requests)


def slots_side(path: str, requests: Requests, threads: int, setting: int) -> dict[str, Any]:
    """Continuous batching: next tokens of all answers, and pieces of prompts up to a full batch."""
    import llama_cpp as api

    api.llama_log_set(SILENT, None)
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    longest = max(len(r["ids"]) + r["n_new"] for r in requests)
    params.n_seq_max, params.n_ctx = setting, setting * -(-longest // 256) * 256
    params.n_batch = params.n_ubatch = STEP_TOKENS
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(model, params)
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(STEP_TOKENS, 0, 1)
    waiting, free = list(range(len(requests))), list(range(setting))
    running: dict[int, int] = {}  # request: slot
    n_done = dict.fromkeys(waiting, 0)  # prompt tokens that were run
    clock = Clock(requests)
    for request in requests:
        request["got"] = []
    while waiting or running:
        while waiting and free:
            running[waiting.pop(0)] = free.pop(0)
        rows = fill_batch(batch, requests, running, n_done)
        assert api.llama_decode(context, batch) == 0
        for number, at in rows:
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, at), shape=(n_vocab,))
            request = requests[number]
            request["got"].append(int(logits.argmax()))
            clock.token(number)
            if len(request["got"]) == request["n_new"]:
                slot = running.pop(number)
                api.llama_memory_seq_rm(api.llama_get_memory(context), slot, -1, -1)
                free.append(slot)
    return clock.result(requests)


def fill_batch(
    batch: Any, requests: Requests, running: dict[int, int], n_done: dict[int, int]
) -> list[tuple[int, int]]:
    """(request, place in the batch) of everything that logits are wanted for."""
    batch.n_tokens, rows = 0, []

    def put(token: int, position: int, slot: int, wanted: bool) -> None:
        at = batch.n_tokens
        batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
        batch.seq_id[at][0], batch.logits[at] = slot, wanted
        batch.n_tokens += 1

    for number, slot in running.items():
        request = requests[number]
        if request["got"]:
            rows.append((number, batch.n_tokens))
            put(request["got"][-1], len(request["ids"]) + len(request["got"]) - 1, slot, True)
    for number, slot in running.items():
        ids = requests[number]["ids"]
        while n_done[number] < len(ids) and batch.n_tokens < STEP_TOKENS:
            last = n_done[number] == len(ids) - 1
            if last:
                rows.append((number, batch.n_tokens))
            put(ids[n_done[number]], n_done[number], slot, last)
            n_done[number] += 1
    return rows


def transformers_side(path: str, requests: Requests, threads: int, setting: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

    torch.set_num_threads(threads)
    file = Path(path)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # no end before the length that was asked for
    order = sorted(range(len(requests)), key=lambda i: (requests[i]["n_new"], len(requests[i]["ids"])))

    class Watch(LogitsProcessor):
        """Sees every token's logits: the first ones are there when it is first called."""

        def __init__(self, numbers: list[int]) -> None:
            self.numbers = numbers

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            for number in self.numbers:
                clock.token(number)
            return scores

    def run(numbers: list[int], n_new: int) -> Any:
        width = max(len(requests[i]["ids"]) for i in numbers)
        ids = torch.zeros(len(numbers), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(numbers):
            prompt = torch.tensor(requests[i]["ids"])
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        watch = LogitsProcessorList([Watch(numbers)])
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=0, logits_processor=watch
        )
        return made[:, width:].tolist()

    clock = Clock(requests)
    with torch.inference_mode():
        run(order[:1], 2)
        clock = Clock(requests)
        for first in range(0, len(order), setting):
            numbers = order[first : first + setting]
            answers = run(numbers, max(requests[i]["n_new"] for i in numbers))
            for i, answer in zip(numbers, answers, strict=True):
                requests[i]["got"] = answer[: requests[i]["n_new"]]
    return clock.result(requests)


SIDES: dict[str, Callable[[str, Requests, int, int], dict[str, Any]]] = {
    "openglm": openglm_side, "llama.cpp": llama_side, "llama.cpp slots": slots_side, "transformers": transformers_side,
}  # fmt: skip
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)

# -------------------------------------------------------------------- one after the other


def make_requests(model: str, text: Path, n: int) -> Requests:
    from openglm.loading import open_reference

    tokenizer = open_reference(Path(model)).tokenizer
    assert tokenizer is not None
    rng = random.Random(0)
    sizes = [(rng.randint(64, 512), rng.randint(32, 256)) for _ in range(n)]
    ids = tokenizer.encode(text.read_text(encoding="utf-8")[: 16 * sum(size for size, _ in sizes)])
    requests, start = [], 0
    for size, n_new in sizes:
        requests.append({"ids": ids[start : start + size], "n_new": n_new})
        start += size
    assert start <= len(ids), f"{text} is too short"
    return requests


def run_side(python: str, name: str, model: str, requests: Requests, threads: int, setting: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        asked, reply = Path(folder) / "requests.json", Path(folder) / "reply.json"
        asked.write_text(json.dumps(requests), encoding="utf-8")
        command = [python, __file__, "--side", name, model, str(asked), str(reply), str(threads), str(setting)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        result: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
    return result


def figures(requests: Requests, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one side at one setting; medians over its runs."""
    n_in, n_out = sum(len(r["ids"]) for r in requests), sum(r["n_new"] for r in requests)
    seconds = statistics.median(run["seconds"] for run in runs)
    first = statistics.median(statistics.median(run["first_s"]) for run in runs)
    return {
        "seconds": round(seconds, 2), "output_tok_s": round(n_out / seconds, 1),
        "total_tok_s": round((n_in + n_out) / seconds, 1), "median_first_s": round(first, 2),
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        name, model, asked, reply, *numbers = sys.argv[2:]
        found = SIDES[name](model, json.loads(Path(asked).read_text(encoding="utf-8")), *map(int, numbers))
        Path(reply).write_text(json.dumps(found), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(description="throughput of many requests beside llama.cpp and transformers")
    parser.add_argument("model", help="a .gguf file")
    parser.add_argument("--peer-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--text", type=Path, default=TEXT, help="UTF-8 text that prompts are cut out of")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, in turns; medians count")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    o = parser.parse_args()
    import torch

    threads = torch.get_num_threads()
    requests = make_requests(o.model, o.text, o.requests)
    settings = {"llama.cpp slots": o.slots, "transformers": o.batches}
    plan = [(name, setting) for name in SIDES if name in o.sides for setting in settings.get(name, [0])]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {each: [] for each in plan}
    for _ in range(o.rounds):
        for name, setting in plan:
            python = o.peer_python if name.startswith("llama") else sys.executable
            runs[name, setting].append(run_side(python, name, o.model, requests, threads, setting))
    print_table(Path(o.model).name, threads, requests, runs)


def print_table(
    model: str, threads: int, requests: Requests, runs: dict[tuple[str, int], list[dict[str, Any]]]
) -> None:
    result: dict[str, Any] = {"model": model, "threads": threads, "requests": len(requests)}
    result["prompt_tokens"] = sum(len(r["ids"]) for r in requests)
    result["output_tokens"] = sum(r["n_new"] for r in requests)
    print(f"{'':<22}{'seconds':>9}{'output tok/s':>14}{'all tok/s':>11}{'median first token, s':>23}")
    for (name, setting), found in runs.items():
        row = figures(requests, found) | ({"setting": setting} if setting else {})
        if name not in result or row["seconds"] < result[name]["seconds"]:
            result[name] = row
        label = f"{name}, {setting}" if setting else name
        print(f"{label:<22}{row['seconds']:>9.1f}{row['output_tok_s']:>14.1f}{row['total_tok_s']:>11.1f}"
              f"{row['median_first_s']:>23.2f}")  # fmt: skip
    if "openglm" in result:
        peers = [name for name in SIDES if name in result and name != "openglm"]
        result["ratios"] = {p: round(result[p]["seconds"] / result["openglm"]["seconds"], 2) for p in peers}
        print("as fast as: " + ", ".join(f"{name} {ratio}x" for name, ratio in result["ratios"].items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
