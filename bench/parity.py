"""Our logits beside llama.cpp's on one GGUF file: greedy continuations and perplexity.

    python bench/parity.py model.gguf --peer-python PYTHON   # an interpreter that has llama-cpp-python

llama.cpp continues 20 prompts greedily, token by token. We score prompt and continuation in one pass: as long as our
likeliest token is the one it chose, our greedy continuation is the same, and where it is not, ours diverges from its.
At each divergence the table shows how far apart the two tokens lie on either side.
llama.cpp rounds activations to 8 bits before it multiplies them with quantised weights, and its cache to half; we do
neither. So everything is compared twice: on the file, and on a copy of it with the same weights as float32 (and a
float32 cache), where llama.cpp rounds nothing: what differs there would be a difference in the model.
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
N_TOP = 64  # of the peer's logits kept at each step
PEER_MODULE = "llama_cpp"


# -------------------------------------------------------------------- the peer, in its own interpreter


def peer_main(path: str, request_file: str, reply_file: str) -> None:
    """Runs where llama-cpp-python is: request JSON in, arrays out. Imports nothing of ours."""
    from llama_cpp import Llama

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    start = time.perf_counter()
    llama = Llama(
        path, n_ctx=request["n_ctx"], n_batch=request["n_ctx"], n_threads=request["threads"], logits_all=True,
        verbose=False, **({"type_k": 0, "type_v": 0} if request.get("float32") else {}),
    )  # fmt: skip
    arrays: dict[str, Any] = {}
    for i, (text, ids) in enumerate(zip(request["prompts"], request["ids"], strict=True)):
        arrays[f"tokens{i}"] = np.array(llama.tokenize(text.encode(), add_bos=False, special=False))
        llama.reset()
        llama.eval(ids)
        chosen, top_ids, top_logits = [], [], []
        for step in range(N_NEW):
            row = llama.scores[llama.n_tokens - 1].astype(np.float32)
            if step == 0:
                arrays[f"first{i}"] = row.copy()
            best = np.argsort(-row)[:N_TOP]
            chosen.append(int(best[0]))
            top_ids.append(best)
            top_logits.append(row[best])
            if chosen[-1] in request["stop_ids"]:
                break
            llama.eval([chosen[-1]])
        arrays |= {f"chosen{i}": np.array(chosen), f"ids{i}": np.array(top_ids), f"logits{i}": np.array(top_logits)}
    nll = []
    for window in request["windows"]:
        llama.reset()
        llama.eval(window)
        nll.append(sum_nll(np.asarray(llama.scores[: len(window)], dtype=np.float32), window))
    np.savez(reply_file, nll=np.array(nll), seconds=np.array(time.perf_counter() - start), **arrays)


def sum_nll(logits: np.ndarray[Any, Any], ids: list[int]) -> float:
    """Negative log likelihood in nats of ids[1:], from logits (len(ids), vocab)."""
    total = 0.0
    for row, target in zip(logits[:-1], ids[1:], strict=True):
        row = row.astype(np.float64)
        top = row.max()
        total += top + float(np.log(np.exp(row - top).sum())) - row[target]
    return total


# -------------------------------------------------------------------- ours


def compare(args: argparse.Namespace) -> dict[str, Any]:
    import openglm
    from openglm.convert import convert
    from openglm.loading import open_reference

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
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "float32.gguf"
        convert(open_reference(Path(args.model)), copy, "gguf", dtype="float32")
        exact = measure(model, ids, windows, ask_peer(args, request | {"float32": True}, str(copy)))
    return {"model": Path(args.model).name, **plain, "float32_copy": exact}


def measure(
    model: Any, ids: list[list[int]], windows: list[list[int]], peer: dict[str, np.ndarray[Any, Any]]
) -> dict[str, Any]:
    rows, gaps = [], []
    for i, prompt in enumerate(PROMPTS):
        chosen = peer[f"chosen{i}"].tolist()
        logits = np.asarray(model.logits([*ids[i], *chosen[:-1]]))[len(ids[i]) - 1 :]
        same = logits.argmax(-1) == np.array(chosen)
        n_same = len(chosen) if same.all() else int(same.argmin())
        row = {
            "prompt": prompt, "same_ids": ids[i] == peer[f"tokens{i}"].tolist(), "tokens": len(chosen), "same": n_same,
            "first_token_rms": rms(logits[0] - peer[f"first{i}"]), "spread": float(peer[f"first{i}"].std()),
        }  # fmt: skip
        if n_same < len(chosen):
            row |= divergence(logits[n_same], peer[f"ids{i}"][n_same], peer[f"logits{i}"][n_same], model.tokenizer)
            gaps.append(max(row["our_gap"], row["peer_gap"]))
        rows.append(row)
    n_tokens = sum(len(window) - 1 for window in windows)
    ours = sum(sum_nll(np.asarray(model.logits(window)), window) for window in windows) / n_tokens
    theirs = float(peer["nll"].sum()) / n_tokens
    total = sum(row["tokens"] for row in rows)
    return {
        "rows": rows,
        "same_prompt_ids": all(row["same_ids"] for row in rows),
        "same_first_token": sum(row["same"] > 0 for row in rows),
        "prompts": len(rows),
        "agreement": sum(row["same"] for row in rows) / total,
        "identical": sum(row["same"] == row["tokens"] for row in rows),
        "largest_gap": max(gaps, default=0.0),
        "perplexity": float(np.exp(ours)),
        "peer_perplexity": float(np.exp(theirs)),
        "perplexity_ratio": float(np.exp(ours - theirs)),
        "perplexity_tokens": n_tokens,
    }


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
    ours: np.ndarray[Any, Any], peer_ids: np.ndarray[Any, Any], peer_logits: np.ndarray[Any, Any], tokenizer: Any
) -> dict[str, Any]:
    """The two tokens, and how much each side prefers its own over the other's (nan: not in the peer's top)."""
    mine, theirs = int(ours.argmax()), int(peer_ids[0])
    found = np.flatnonzero(peer_ids == mine)
    return {
        "our_token": tokenizer.decode([mine], skip_special=False),
        "peer_token": tokenizer.decode([theirs], skip_special=False),
        "our_gap": float(ours[mine] - ours[theirs]),
        "peer_gap": float(peer_logits[0] - peer_logits[found[0]]) if len(found) else float("nan"),
    }


def rms(values: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def show(title: str, result: dict[str, Any]) -> None:
    print(f"\n## {title}\n")
    print("| prompt | same / tokens | logits apart (spread) | ours, theirs at the divergence | our gap | their gap |")
    print("| --- | ---: | ---: | --- | ---: | ---: |")
    for row in result["rows"]:
        head = json.dumps(row["prompt"][:24], ensure_ascii=False).replace("|", "\\|")
        cells = [head, f"{row['same']} / {row['tokens']}", f"{row['first_token_rms']:.3f} ({row['spread']:.2f})"]
        if "our_gap" in row:
            pair = json.dumps([row["our_token"], row["peer_token"]], ensure_ascii=False).replace("|", "\\|")
            cells += [pair, f"{row['our_gap']:.3f}", f"{row['peer_gap']:.3f}"]
        else:
            cells += ["", "", ""]
        print("| " + " | ".join(cells) + " |")
    r = result
    print(
        f"\nSame ids for all prompts: {'yes' if r['same_prompt_ids'] else 'NO'}. Same first token: "
        f"{r['same_first_token']} of {r['prompts']}. Tokens before the first divergence: {100 * r['agreement']:.1f} %; "
        f"{r['identical']} continuations identical; largest gap at a divergence {r['largest_gap']:.3f}.\n"
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
    args = parser.parse_args(argv)
    result = compare(args)
    show(f"{result['model']}: llama.cpp on the file itself", result)
    show(f"{result['model']}: llama.cpp on the same weights as float32", result["float32_copy"])
    for part in (result, result["float32_copy"]):
        del part["rows"]
    print(json.dumps(result))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # without an installation
    main()
