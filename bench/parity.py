"""Our logits beside llama.cpp's on one GGUF file: greedy continuations and perplexity.

    python bench/parity.py model.gguf --peer-python PYTHON   # an interpreter that has llama-cpp-python

llama.cpp continues 20 prompts greedily, token by token. We score prompt and continuation in one pass, by the runner
that serves: as long as our likeliest token is the one it chose, our greedy continuation is the same, and where it is
not, ours diverges from its.
Both sides round activations to 8 bits before they multiply them with quantised weights, and the cache to half, each
in blocks of its own: logits differ, and a close choice may turn. So each first divergence is held against a third
computation, ours in PyTorch with the same dequantised weights, where activations and cache stay float32: by how many
nats it prefers one of the two tokens (the gap), and how far that gap is off on either side (its error). The side whose
error exceeds the gap turned; it did so by rounding if that error is no more than LIMIT times its root mean square over
all positions of all prompts (of the gap between the two likeliest tokens). A divergence that is not of rounding counts
as an error, and the comparison goes on behind llama.cpp's token.
--float32 does it all again on a copy whose weights the `gguf` library has dequantised to float32, with a float32 cache,
where no side rounds anything: what differs there would be a difference in the model, or in dequantising.
Perplexity: windows of WikiText-2's validation text, the same on both sides, each from its second token on.

Prints tables in Markdown, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval" / "wikitext-2" / "valid.txt"
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n",
    "The three most important inventions of the nineteenth century were",
    "To make bread at home, you first need to",
    "A train leaves the station at nine o'clock and travels at sixty kilometres an hour. By noon it has gone",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\n# the mean of each column of a matrix\n",
    "The difference between a virus and a bacterium is that",
    "中国的首都是",
    "从前，有一个住在山脚下的老人，",
    "人工智能的发展历史可以追溯到",
    "水在高山上沸点较低，因为",
    "请用三句话介绍长城：",
    "# 用 Python 写一个快速排序函数\n",
    "春天来了，公园里",
    "学习一门外语最好的方法是",
    "计算机由哪些部分组成？计算机由",
    "李白是唐代著名的",
]
N_NEW = 64
N_TOP = 64  # of the peer's tokens kept at each position
LIMIT = 4.0  # times the root mean square of a side's errors that one of rounding may reach
PEER_MODULE = "llama_cpp"


# -------------------------------------------------------------------- the peer, in its own interpreter


def peer_main(path: str, request_file: str, reply_file: str) -> None:
    """Runs where llama-cpp-python is: request JSON in, arrays out. Imports nothing of ours."""
    from llama_cpp import Llama

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    start = time.perf_counter()
    llama = Llama(
        path, n_ctx=request["n_ctx"], n_batch=request["n_ctx"], n_threads=request["threads"],
        n_threads_batch=request["threads"], logits_all=True, verbose=False,
        **({"type_k": 0, "type_v": 0} if request.get("float32") else {}),
    )  # fmt: skip
    arrays: dict[str, Any] = {}
    for i, (text, ids) in enumerate(zip(request["prompts"], request["ids"], strict=True)):
        arrays[f"tokens{i}"] = np.array(llama.tokenize(text.encode(), add_bos=False, special=False))
        llama.reset()
        llama.eval(ids)
        best = [top_of(row) for row in llama.scores[: len(ids)]]
        arrays[f"first{i}"] = llama.scores[len(ids) - 1].astype(np.float32)
        chosen = [int(best[-1][0][0])]
        while len(chosen) < N_NEW and chosen[-1] not in request["stop_ids"]:
            llama.eval([chosen[-1]])
            best.append(top_of(llama.scores[llama.n_tokens - 1]))
            chosen.append(int(best[-1][0][0]))
        arrays |= {f"chosen{i}": np.array(chosen), f"ids{i}": np.array([ids for ids, _ in best])}
        arrays[f"logprobs{i}"] = np.array([logprobs for _, logprobs in best])
    nll = []
    for window in request["windows"]:
        llama.reset()
        llama.eval(window)
        nll.append(sum_nll(np.asarray(llama.scores[: len(window)], dtype=np.float32), window))
    np.savez(reply_file, nll=np.array(nll), seconds=np.array(time.perf_counter() - start), **arrays)


def top_of(logits: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The N_TOP likeliest ids, best first, and their log-probabilities."""
    best = np.argsort(-logits)[:N_TOP]
    return best, log_softmax(logits)[best]


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def sum_nll(logits: np.ndarray[Any, Any], ids: list[int]) -> float:
    """Negative log likelihood in nats of ids[1:], from logits (len(ids), vocab)."""
    rows = zip(logits[:-1], ids[1:], strict=True)
    return -sum(float(log_softmax(row)[target]) for row, target in rows)


# -------------------------------------------------------------------- ours


def compare(args: argparse.Namespace) -> dict[str, Any]:
    import openglm

    model = openglm.load(args.model, device="cpu")
    ids = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
    text = args.text.read_text(encoding="utf-8")[: 8 * args.tokens]
    stream = model.tokenizer.encode(text)[: args.tokens]
    windows = [stream[i : i + args.window] for i in range(0, len(stream) - 1, args.window)]
    request = {
        "prompts": PROMPTS, "ids": ids, "windows": windows, "stop_ids": list(model.meta.stop_ids),
        "n_ctx": max(args.window, 256), "threads": args.threads,
    }  # fmt: skip
    peer = ask_peer(args, request)
    plain = measure(model, ids, windows, peer)
    del model
    result: dict[str, Any] = {"model": Path(args.model).name, **plain}
    if args.float32:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "float32.gguf"
            write_float32_copy(args.model, copy)
            model = openglm.load(copy, device="cpu")
            result["float32_copy"] = measure(
                model, ids, windows, ask_peer(args, request | {"float32": True}, str(copy))
            )
    return result


def write_float32_copy(source: str, target: Path) -> None:
    """The same metadata, and every tensor as the `gguf` library dequantises it; one at a time in memory."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.close()


def served_logits(model: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """(T, vocab_size) float32 from the runner that answers requests, with its rounding and its cache."""
    import torch

    from openglm.engine.runner import Chunk

    runner, n = model.engine.runner, len(ids)
    pages = range(-(-n // runner.page_size))
    return np.asarray(runner.run([Chunk(ids, 0, torch.arange(n)[None], pages, n_logits=n)]))


def measure(
    model: Any, ids: list[list[int]], windows: list[list[int]], peer: dict[str, np.ndarray[Any, Any]]
) -> dict[str, Any]:
    rows = [compare_prompt(model, i, ids[i], peer) for i in range(len(PROMPTS))]
    errors = {side: np.concatenate([row.pop(f"{side}_errors") for row in rows]) for side in ("our", "peer")}
    noise = {side: rms(values) for side, values in errors.items()}
    for row in rows:
        judge(row, noise)
    n_tokens = sum(len(window) - 1 for window in windows)
    ours = sum(sum_nll(served_logits(model, window), window) for window in windows) / n_tokens
    theirs = float(peer["nll"].sum()) / n_tokens
    split = [row for row in rows if "gap" in row]
    return {
        "rows": rows,
        "same_prompt_ids": sum(row["same_ids"] for row in rows),
        "same_first_token": sum(row["same"] > 0 for row in rows),
        "prompts": len(rows),
        "identical": sum(row["same"] == row["tokens"] for row in rows),
        "divergences": len(split),
        "by_rounding": sum(row["by_rounding"] for row in split),
        "agreement": sum(row["agreed"] for row in rows) / sum(row["compared"] for row in rows),
        "before_first": sum(row["same"] for row in rows) / sum(row["tokens"] for row in rows),
        "same_text": sum(row["same_text"] for row in rows) / sum(row["tokens"] for row in rows),
        "our_error_rms": noise["our"],
        "peer_error_rms": noise["peer"],
        "our_error_max": float(np.abs(errors["our"]).max()),
        "peer_error_max": float(np.abs(errors["peer"]).max()),
        "positions": len(errors["our"]),
        "perplexity": float(np.exp(ours)),
        "peer_perplexity": float(np.exp(theirs)),
        "perplexity_ratio": float(np.exp(ours - theirs)),
        "perplexity_tokens": n_tokens,
    }


def compare_prompt(model: Any, i: int, ids: list[int], peer: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """One prompt: where our likeliest token is not llama.cpp's, and the errors of both sides at every position."""
    chosen, top, theirs = peer[f"chosen{i}"], peer[f"ids{i}"], peer[f"logprobs{i}"]
    text = [*ids, *chosen[:-1].tolist()]
    logits = served_logits(model, text)
    ours, exact = log_softmax(logits), log_softmax(model.logits(text))
    first = len(ids) - 1
    two = np.argpartition(-exact, 2, -1)[:, :2]
    gaps = [pair_gap(values, two[:, 0], two[:, 1]) for values in (exact, ours)]
    peer_gaps = np.array([of_peer(top[t], theirs[t], *two[t]) for t in range(len(text))])
    known = np.isfinite(peer_gaps)
    same = ours[first:].argmax(-1) == chosen
    return {
        "prompt": PROMPTS[i], "same_ids": ids == peer[f"tokens{i}"].tolist(), "tokens": len(chosen),
        "same": int(np.append(same, False).argmin()), "same_text": int(same.sum()),
        "first_token_rms": rms(logits[first] - peer[f"first{i}"]), "spread": float(peer[f"first{i}"].std()),
        "our_errors": (gaps[1] - gaps[0])[known], "peer_errors": (peer_gaps - gaps[0])[known],
        "found": [
            (int(step), divergence(ours[at], exact[at], top[at], theirs[at], model.tokenizer))
            for step in np.flatnonzero(~same) for at in [first + step]
        ],
    }  # fmt: skip


def judge(row: dict[str, Any], noise: dict[str, float]) -> None:
    """Say of each divergence which side turned and whether by rounding; count tokens up to the first one that is.

    agreed of compared: those tokens; divergences that are not of rounding are compared but did not agree.
    """
    row["agreed"], row["compared"], last = 0, 0, -1
    for step, found in row.pop("found"):
        errors = {side: abs(found[f"{side}_error"]) for side in noise}
        found["turned"] = [side for side, error in errors.items() if error > abs(found["gap"])]
        found["times_rms"] = max(errors[side] / noise[side] for side in found["turned"])
        found["by_rounding"] = found["times_rms"] <= LIMIT
        row["agreed"] += step - last - 1
        row["compared"] += step - last - 1
        last = step
        if "gap" not in row:
            row |= found
        if found["by_rounding"]:
            return
        row["compared"] += 1
    row["agreed"] += row["tokens"] - last - 1
    row["compared"] += row["tokens"] - last - 1


def pair_gap(values: np.ndarray[Any, Any], a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    at = np.arange(len(values))
    return np.asarray(values[at, a] - values[at, b])


def of_peer(ids: np.ndarray[Any, Any], logprobs: np.ndarray[Any, Any], a: int, b: int) -> float:
    """How much the peer prefers a to b; infinite where one is not in its top."""
    places = [np.flatnonzero(ids == token) for token in (a, b)]
    return float(logprobs[places[0][0]] - logprobs[places[1][0]]) if all(map(len, places)) else float("inf")


def ask_peer(
    args: argparse.Namespace, request: dict[str, Any], model: str | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        asked, reply = Path(folder) / "request.json", Path(folder) / "reply.npz"
        asked.write_text(json.dumps(request), encoding="utf-8")
        script = str(Path(__file__).resolve())
        command = [args.peer_python, script, "--peer", model or args.model, str(asked), str(reply)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise SystemExit(f"{args.peer_python} could not run {PEER_MODULE}: {last}")
        with np.load(reply) as arrays:
            return dict(arrays)


def divergence(
    ours: np.ndarray[Any, Any], exact: np.ndarray[Any, Any], peer_ids: np.ndarray[Any, Any],
    theirs: np.ndarray[Any, Any], tokenizer: Any,
) -> dict[str, Any]:  # fmt: skip
    """The two tokens; how much the unrounded model prefers ours to llama.cpp's, and how far each side is off that."""
    mine, other = int(ours.argmax()), int(peer_ids[0])
    gap = float(exact[mine] - exact[other])
    return {
        "our_token": tokenizer.decode([mine], skip_special=False),
        "peer_token": tokenizer.decode([other], skip_special=False),
        "gap": gap,
        "our_error": float(ours[mine] - ours[other]) - gap,
        "peer_error": of_peer(peer_ids, theirs, mine, other) - gap,
    }


def rms(values: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def show(title: str, result: dict[str, Any]) -> None:
    print(f"\n## {title}\n")
    print("| prompt | same / tokens | ours, theirs | gap unrounded | our error | their error | turned | rounding |")
    print("| --- | ---: | --- | ---: | ---: | ---: | --- | --- |")
    for row in result["rows"]:
        head = json.dumps(row["prompt"][:24], ensure_ascii=False).replace("|", "\\|")
        cells = [head, f"{row['same']} / {row['tokens']}"]
        if "gap" in row:
            pair = json.dumps([row["our_token"], row["peer_token"]], ensure_ascii=False).replace("|", "\\|")
            cells += [pair, f"{row['gap']:+.3f}", f"{row['our_error']:+.3f}", f"{row['peer_error']:+.3f}"]
            turned = " and ".join({"our": "ours", "peer": "theirs"}[side] for side in row["turned"])
            cells += [f"{turned}, {row['times_rms']:.1f} rms", "yes" if row["by_rounding"] else "NO"]
        else:
            cells += [""] * 6
        print("| " + " | ".join(cells) + " |")
    r = result
    print(
        f"\nSame ids of the prompt: {r['same_prompt_ids']} of {r['prompts']}. Same first token: "
        f"{r['same_first_token']} of {r['prompts']}. {r['identical']} continuations identical, {r['divergences']} "
        f"diverge, {r['by_rounding']} of these by rounding. Up to the first divergence by rounding "
        f"{100 * r['agreement']:.1f} % of the tokens are the same; {100 * r['before_first']:.1f} % of all lie before "
        f"the first divergence; behind the same text {100 * r['same_text']:.1f} % of all are the same.\n"
        f"Error of the gap between the two likeliest tokens at {r['positions']} positions, rms and largest: ours "
        f"{r['our_error_rms']:.2g} and {r['our_error_max']:.2g}, llama.cpp's {r['peer_error_rms']:.2g} and "
        f"{r['peer_error_max']:.2g}.\n"
        f"Perplexity over {r['perplexity_tokens']} tokens: ours {r['perplexity']:.4f}, llama.cpp "
        f"{r['peer_perplexity']:.4f} (ratio {r['perplexity_ratio']:.4f})."
    )


def main(argv: list[str] | None = None) -> None:
    if argv is None and sys.argv[1:2] == ["--peer"]:
        peer_main(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--text", type=Path, default=TEXT, help="UTF-8 text for perplexity")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text, from its start")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp")
    parser.add_argument("--float32", action="store_true", help="also on a float32 copy, which takes its memory")
    args = parser.parse_args(argv)
    result = compare(args)
    parts = [(f"{result['model']}: the file itself", result)]
    if args.float32:
        parts.append((f"{result['model']}: the same weights as float32", result["float32_copy"]))
    for title, part in parts:
        show(title, part)
        del part["rows"]
    print(json.dumps(result))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # without an installation
    main()
