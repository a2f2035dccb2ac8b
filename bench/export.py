"""What we write, read by those it is written for: GGUF files by llama.cpp, Hugging Face folders by transformers.

    python bench/export.py [MODEL ...] --peer-python PYTHON   # an interpreter that has llama-cpp-python

Models: checkpoints, besides four tiny ones (chatglm, glm4, llama, qwen2) that are trained here for some seconds on a
few sentences. Each is converted to every type of GGUF that we write, and to Hugging Face's layout. On both sides of
each file: ids of the same texts, stop ids, the chat template rendered to ids, and greedy continuations. Where both
continue differently, our float32 computation says by how many nats it prefers one of the two tokens.
Logits are compared where no side rounds: on F32 files, and for the other types on a copy that the `gguf` library has
dequantised to F32; they are llama.cpp's on that copy, ours on the file itself.

Prints a table in Markdown, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from openglm.chat import ChatModel
    from openglm.tokenizer import Tokenizer

PEER_MODULE = "llama_cpp"
TYPES = {"F32": ("float32", None), "F16": ("float16", None), "Q8_0": (None, "int8"), "Q4_0": (None, "int4")}
N_NEW = 40
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps until the sun comes up again over the hill.",
    "A language model reads a text and says which word comes next; it learned that from all the texts it has seen.",
    "In the village by the sea there lived 12 fishermen, 7 bakers and one old woman who couldn't swim at all.",
    "北京是中华人民共和国的首都，也是全国的政治中心和文化中心。春天来了，公园里到处都是看花的人。",
    "从前，有一个住在山脚下的老人，他每天早上都到河边去打水，晚上回家给孩子们讲故事。",
    "def add(a, b):\n    total = a + b\n    return total\n\n\nprint(add(1, 2))\nprint(add(30, 12))\n",
)
PROMPTS = tuple(sentence[:12] for sentence in SENTENCES)
TEXTS = (*SENTENCES, "  two spaces\n\nand\ttabs", "naïve café 😀", "it's DON'T 1234567", "<|user|> [gMASK] </s>", "")
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Where does the old man live?"}, {"role": "assistant", "content": "在山脚下。"},
    {"role": "user", "content": "And then?"},
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPES: dict[str, dict[str, Any]] = {
    "chatglm": {"rope": {"fraction": 0.5}},
    "glm4": {"rope": {"fraction": 0.5}, "sandwich": True, "qkv_bias": False},
    "llama": {"qkv_bias": False},
    "qwen2": {"rope": {"theta": 1e6}, "tie_embeddings": True},
}


# -------------------------------------------------------------------- the peer, in its own interpreter


def peer_main(request_file: str, reply_file: str) -> None:
    """Runs where llama-cpp-python is: JSON in, JSON out, logits beside it. Imports nothing of ours."""
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    replies, logits = [], {}
    for i, asked in enumerate(request):
        exact: dict[str, Any] = {"type_k": 0, "type_v": 0} if asked["float32"] else {}
        llama = llama_cpp.Llama(asked["path"], n_ctx=512, n_batch=512, n_threads=1, n_threads_batch=1,
                                logits_all=True, verbose=False, **exact)  # fmt: skip
        vocab = llama._model.vocab
        template = llama.metadata.get("tokenizer.chat_template")
        rendered = None
        if template is not None and asked["messages"]:
            chat = Jinja2ChatFormatter(template, eos_token="", bos_token="")
            rendered = llama.tokenize(chat(messages=asked["messages"]).prompt.encode(), add_bos=False, special=True)
        greedy = []
        for j, ids in enumerate(asked["prompts"]):
            llama.reset()
            llama.eval(ids)
            chosen = [int(llama.scores[len(ids) - 1].argmax())]
            while len(chosen) < asked["n_new"]:
                llama.eval(chosen[-1:])
                chosen.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            greedy.append(chosen)
            logits[f"{i}.{j}"] = llama.scores[: len(ids) + len(chosen) - 1].astype(np.float32)
        replies.append({
            "ids": [llama.tokenize(text.encode(), add_bos=False, special=False) for text in asked["texts"]],
            "stop_ids": [t for t in range(llama.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, t)],
            "template": template, "rendered": rendered, "greedy": greedy,
        })  # fmt: skip
    Path(reply_file).write_text(json.dumps(replies), encoding="utf-8")
    np.savez(f"{reply_file}.npz", **logits)


def ask_peer(python: str, request: list[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], Any]:
    """Replies, one for each file, and logits by "file.prompt" of prompt and continuation (all but the last token)."""
    asked, reply = folder / "request.json", folder / "reply.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    command = [python, str(Path(__file__).resolve()), "--peer", str(asked), str(reply)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise SystemExit(f"{python} could not run {PEER_MODULE}: {last}")
    return json.loads(reply.read_text(encoding="utf-8")), np.load(f"{reply}.npz")


# -------------------------------------------------------------------- models


def tiny_tokenizer() -> Tokenizer:
    from openglm.tokenizer.train import train_bpe

    return train_bpe(SENTENCES, 600, at_most=True)


def train_tiny(folder: Path, shape: str, tokenizer: Tokenizer, n_steps: int = 150) -> Path:
    """A checkpoint of ours that knows SENTENCES by heart, as far as `n_steps` go."""
    import torch

    from openglm.config import GLMConfig, RopeConfig
    from openglm.model.batch import ForwardBatch
    from openglm.model.checkpoint import CheckpointMeta, save_checkpoint
    from openglm.model.init import init_weights
    from openglm.model.transformer import Transformer

    fields = {**SHAPES[shape], "rope": RopeConfig(**SHAPES[shape].get("rope", {}))}
    config = GLMConfig(
        vocab_size=-(-tokenizer.vocab_size // 32) * 32, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16,
        ffn_dim=128, max_seq_len=256, **fields,
    )  # fmt: skip
    model = init_weights(Transformer(config), seed=1)
    rows = [tokenizer.encode(f"{a}\n{b}") for a, b in zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True)]
    size = max(map(len, rows))
    targets = torch.tensor([[*row[1:], *[-100] * (size - len(row) + 1)] for row in rows])
    ids = torch.tensor([[*row, *[0] * (size - len(row))] for row in rows])
    batch = ForwardBatch(ids, torch.arange(size).expand(1, *ids.shape))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(n_steps):
        logits = model.logits(model(batch))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
    special = tokenizer.special_ids
    meta = CheckpointMeta(
        special, (special["<|endoftext|>"], special["<|user|>"]), "jinja", tokenizer.kind, {"top_p": 0.9},
        prompt_prefix=(),
    )  # fmt: skip
    save_checkpoint(folder, model, config, meta, {**tokenizer.files, "chat_template.jinja": TEMPLATE.encode()})
    return folder


def write_gguf(source: Path, target: Path, type: str) -> float:
    """Seconds that the conversion took."""
    from openglm.convert import convert
    from openglm.loading import open_reference
    from openglm.quant import QuantSpec

    start = time.perf_counter()
    dtype, bits = TYPES[type]
    convert(open_reference(source), target, "gguf", QuantSpec.parse(bits) if bits else None, dtype)
    return time.perf_counter() - start


# -------------------------------------------------------------------- ours beside theirs


def questions(model: ChatModel, path: Path, float32: bool) -> dict[str, Any]:
    has_template = model.chat_format is not None
    return {
        "path": str(path), "texts": TEXTS, "prompts": [model.tokenizer.encode(p) for p in PROMPTS], "n_new": N_NEW,
        "messages": MESSAGES if has_template else [], "float32": float32,
    }  # fmt: skip


def greedy(model: ChatModel, ids: list[int]) -> list[int]:
    """N_NEW tokens, whatever ends an answer."""
    chosen = model.generate(ids, temperature=0.0, repetition_penalty=1.0, max_new_tokens=N_NEW, stop_ids=())
    return list(chosen.token_ids)


def compare(model: ChatModel, asked: dict[str, Any], reply: dict[str, Any]) -> dict[str, Any]:
    """Of one file that both have read. gaps: of the tokens where continuations part, in nats of our float32 pass."""
    ours = [greedy(model, ids) for ids in asked["prompts"]]
    gaps, same = [], 0
    for ids, mine, theirs in zip(asked["prompts"], ours, reply["greedy"], strict=True):
        n = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), N_NEW)
        same += n
        if n < N_NEW:
            row = np.asarray(model.logits([*ids, *mine[:n]]))[-1]
            gaps.append(float(row[mine[n]] - row[theirs[n]]))
    rendered = None
    if model.chat_format is not None and asked["messages"]:
        from openglm.types import Message

        messages = [Message(**message) for message in MESSAGES]
        rendered = list(model.chat_format.render(messages).ids)
    return {
        "same_ids": sum(model.tokenizer.encode(t) == ids for t, ids in zip(TEXTS, reply["ids"], strict=True)),
        "texts": len(TEXTS),
        "stop_ids": set(model.meta.stop_ids) <= set(reply["stop_ids"]),
        "rendered": None if rendered is None else rendered == reply["rendered"],
        "same": same,
        "tokens": N_NEW * len(ours),
        "gaps": gaps,
    }


def logit_error(model: ChatModel, prompts: list[list[int]], reply: dict[str, Any], logits: Any, file: int) -> float:
    """Largest difference of our float32 logits from llama.cpp's, over prompts and their continuations there."""
    errors = []
    for j, (ids, chosen) in enumerate(zip(prompts, reply["greedy"], strict=True)):
        ours = np.asarray(model.logits([*ids, *chosen[:-1]]))
        errors.append(float(np.abs(ours - logits[f"{file}.{j}"]).max()))
    return max(errors)


def gguf_rows(source: Path, python: str, folder: Path) -> list[dict[str, Any]]:
    import openglm
    from bench.parity import write_float32_copy

    rows, request = [], []
    for type in TYPES:
        path, copy = folder / f"{type}.gguf", folder / f"{type}-copy.gguf"
        seconds = write_gguf(source, path, type)
        rows.append({"format": f"GGUF {type}", "bytes": path.stat().st_size, "seconds": seconds})
        if type != "F32":
            write_float32_copy(str(path), copy)
        model = openglm.load(path, device="cpu")
        asked = questions(model, path, type == "F32")
        request += [asked, {**asked, "path": str(path if type == "F32" else copy), "float32": True}]
    replies, logits = ask_peer(python, request, folder)
    for i, (type, row) in enumerate(zip(TYPES, rows, strict=True)):
        model = openglm.load(folder / f"{type}.gguf", device="cpu")
        row |= compare(model, request[2 * i], replies[2 * i])
        row["logits"] = logit_error(model, request[2 * i]["prompts"], replies[2 * i + 1], logits, 2 * i + 1)
        for name in (f"{type}.gguf", f"{type}-copy.gguf"):
            (folder / name).unlink(missing_ok=True)
    return rows


def hf_row(source: Path, folder: Path) -> dict[str, Any]:
    """transformers on the folder that we write, in float32."""
    import torch
    import transformers

    import openglm
    from openglm.convert import convert
    from openglm.loading import open_reference

    start = time.perf_counter()
    found = convert(open_reference(source), folder / "hf", "hf")
    row: dict[str, Any] = {"format": "Hugging Face", "bytes": found.n_bytes, "seconds": time.perf_counter() - start}
    model = openglm.load(folder / "hf", device="cpu", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    asked = questions(model, folder / "hf", True)
    pieces = [tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in TEXTS]
    reply: dict[str, Any] = {"ids": pieces, "stop_ids": theirs.generation_config.eos_token_id or [], "greedy": []}
    if model.chat_format is not None:
        chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
        reply["rendered"] = tokenizer(chat, add_special_tokens=False)["input_ids"]
    errors = []
    for ids in asked["prompts"]:
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([ids]), max_new_tokens=N_NEW, do_sample=False, eos_token_id=None)[0]
            logits = theirs(whole[None, :-1]).logits[0]
        reply["greedy"].append(whole[len(ids) :].tolist())
        errors.append(float(np.abs(np.asarray(logits) - np.asarray(model.logits(whole[:-1].tolist()))).max()))
    return row | compare(model, asked, reply) | {"logits": max(errors)}


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    print("| model | format | MB | written in | same ids | stop ids | chat | greedy tokens | gaps, nats | logits |")
    print("| --- | --- | ---: | ---: | ---: | --- | --- | ---: | --- | ---: |")
    for name, rows in results.items():
        for r in rows:
            chat = {None: "none", True: "same", False: "NOT the same"}[r["rendered"]]
            cells = [
                name, r["format"], f"{r['bytes'] / 1e6:.1f}", f"{r['seconds']:.1f} s",
                f"{r['same_ids']} of {r['texts']}",
                "known" if r["stop_ids"] else "NOT known", chat, f"{r['same']} of {r['tokens']}",
                ", ".join(f"{gap:+.3f}" for gap in r["gaps"]), f"{r['logits']:.1e}",
            ]  # fmt: skip
            print("| " + " | ".join(cells) + " |")


def main(argv: list[str] | None = None) -> None:
    if argv is None and sys.argv[1:2] == ["--peer"]:
        peer_main(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="checkpoints, besides the tiny ones trained here")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    args = parser.parse_args(argv)
    results: dict[str, list[dict[str, Any]]] = {}
    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {shape: train_tiny(folder / shape, shape, tokenizer) for shape in SHAPES}
        sources |= {path.name: path for path in args.models}
        for label, source in sources.items():
            work = folder / f"out-{label}"
            work.mkdir()
            results[label] = [*gguf_rows(source, args.peer_python, work), hf_row(source, work)]
    show(results)
    print(json.dumps(results))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # without an installation
    main()
