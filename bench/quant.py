"""What quantisation costs: our forms and llama.cpp's of the same float16 weights, on English and Chinese text.

    python bench/quant.py MODEL ... --peer-python PYTHON   # an interpreter that has llama-cpp-python
    python bench/quant.py --ours int4,int4-gptq            # the bundled model, no peer
    python bench/quant.py smollm2.gguf --shuffle --ours int8,int4 --peer Q4_0,Q4_1,Q4_K_M

MODEL is a checkpoint folder or a GGUF file. Its weights, dequantised to float16, are the source that all sides start
from and are compared with: perplexity, KL divergence in nats a token, and how often the likeliest token is the same.
Ours go through `convert`; llama.cpp quantises a float16 GGUF itself, and its file is read back, so that every row is
computed by the same code in float32 and weights alone make the difference. The last peer type is run in llama.cpp as
well: it rounds activations besides, so the two perplexities are close and not equal.

A GGUF file whose weights lie on a 4-bit grid comes back from any 4-bit form of the same groups as it was, which says
nothing. --shuffle puts the columns of all matrices in another order, with everything that feeds them: the same
function, and groups that mix columns of different grids.
Embedding and head are 8-bit in groups of 32 on both sides, or float16 with --embeddings none.

--keep FOLDER lets what is converted stay there, and takes from there what the same options made: more windows need no
new conversion.

Types of ours are words joined by "-": int4 or int8, g64, g128 or row, symmetric, absmax, mse, gptq or awq; or bf16.
int4 alone is what `openglm convert --quantize int4` does. What perplexity costs is told with the standard error of its
paired difference over the windows, which the same text on both sides makes far smaller than that of the perplexity.
Prints a table for each model, how our types compare with llama.cpp's of up to 5 bits, and one JSON line last.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # without an installation

from openglm.config import GLMConfig
from openglm.convert import convert
from openglm.data.lines import open_lines, read_lines
from openglm.loading import Reference, open_reference, resolve
from openglm.model.batch import ForwardBatch, prompt_layout
from openglm.model.gguf_write import write_gguf
from openglm.model.opened import OpenedModel, open_model
from openglm.model.transformer import Transformer
from openglm.ops.quant import Weight
from openglm.quality.measure import Divergence, divergence
from openglm.quant import QuantSpec

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = (DATA / "eval/wikitext-2/valid.txt", DATA / "corpus/val-zh.jsonl.zst")
OURS = "bf16,int8,int4,int4-absmax,int4-symmetric,int4-symmetric-absmax,int4-g64,int4-g128,int4-row,int4-mse,int4-awq"
PEER = "Q8_0,Q5_0,Q4_1,Q4_0,IQ4_NL,Q4_K_S,Q4_K_M"
WINDOW = 512
EVERY = 4  # of the tokens, one is looked at for KL divergence and agreement; all are for perplexity
MAX_BITS = 5.005  # of llama.cpp's types that ours are compared with
QUANTISE = """
import ctypes, sys
import llama_cpp as peer
source, target, type, kept = sys.argv[1:]
p = peer.llama_model_quantize_default_params()
p.ftype = getattr(peer, "LLAMA_FTYPE_MOSTLY_" + type)
p.nthread = 2
p.token_embedding_type = p.output_tensor_type = getattr(peer, "GGML_TYPE_" + kept)
sys.exit(peer.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(p)))
"""
PERPLEXITY = """
import json, sys
import numpy as np
from llama_cpp import Llama
windows = json.load(open(sys.argv[2]))
model = Llama(sys.argv[1], n_ctx=512, n_batch=512, logits_all=True, verbose=False)
total = n = 0
for ids, first in windows:
    model.reset()
    model.eval(ids)
    logits = np.asarray(model.scores[first - 1 : len(ids) - 1], dtype=np.float64)
    top = logits.max(-1)
    chosen = logits[np.arange(len(logits)), ids[first:]]
    total += float((top + np.log(np.exp(logits - top[:, None]).sum(-1)) - chosen).sum())
    n += len(logits)
print(json.dumps(total / n))
"""


@dataclass(frozen=True)
class Row:
    """One type of one model. block_bits: per weight of the blocks' matrices, scales and minimums counted."""

    side: str
    type: str
    block_bits: float
    n_bytes: int
    perplexity: dict[str, float]
    kl: dict[str, float]
    agreement: dict[str, float]
    nll: dict[str, list[float]]  # nats a token, of each window
    seconds: float

    @property
    def mean_kl(self) -> float:
        return sum(self.kl.values()) / len(self.kl)


def difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """By how many per cent the perplexity of `a` is above that of `b`, and the standard error, by windows in pairs."""
    d = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    ratio = math.exp(float(d.mean()))
    return 100 * (ratio - 1), 100 * ratio * float(d.std()) / len(d) ** 0.5 if len(d) > 1 else math.nan


# -------------------------------------------------------------------- the same function with other columns


def shuffled(opened: OpenedModel, seed: int = 0) -> OpenedModel:
    """The model with the residual stream, each MLP's channels and each value head's channels in another order."""
    c = opened.config
    g = torch.Generator().manual_seed(seed)
    stream, channels = torch.randperm(c.dim, generator=g), torch.randperm(c.ffn_dim, generator=g)
    halves = channels if c.mlp == "gelu" else torch.cat([channels, channels + c.ffn_dim])
    within = torch.randperm(c.head_dim, generator=g)
    per_head = torch.arange(c.n_heads)[:, None] * c.head_dim + within
    first = (c.n_heads + c.n_kv_heads) * c.head_dim  # of the value rows
    values = torch.cat([torch.arange(first), first + per_head[: c.n_kv_heads].flatten()])
    rows = {"attn.qkv": values, "attn.out": stream, "mlp.up": halves, "mlp.down": stream}
    columns = {"attn.out": per_head.flatten(), "mlp.down": channels}

    def change(name: str, weight: Weight) -> Weight:
        w = weight if isinstance(weight, Tensor) else weight.dequantise()
        part = ".".join(name.split(".")[2:-1]) if name.startswith("layers.") else ""
        if w.dim() == 2:
            w = w[:, columns.get(part, stream)]
            return w[rows[part]] if part else w
        return w[rows.get(part, stream)]

    return replace(opened, change=change)


# -------------------------------------------------------------------- measuring


def dense(opened: OpenedModel, config: GLMConfig) -> Transformer:
    """The model in float32, everything dequantised."""
    model = Transformer(config, device="meta")
    state = {}
    for name in opened.names():
        weight = opened.get_parts(name)
        state[name] = weight.float() if isinstance(weight, Tensor) else weight.dequantise(torch.float32)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


class Measure:
    """The source's hidden states on windows of texts, which other models of its shape are compared with."""

    def __init__(self, source: Reference, texts: dict[str, str], n_windows: int) -> None:
        assert source.tokenizer is not None
        self.config, self.special_ids = source.opened.config, source.meta.special_ids
        self.head = tuple(source.meta.text_head(self.special_ids))
        self.windows = {
            name: cut(source.tokenizer.encode(text), self.head, self.config, n_windows)
            for name, text in texts.items()
        }
        self.model = dense(source.opened, self.config)
        self.hidden: dict[str, list[Tensor]] = {name: [] for name in texts}
        self.nll: dict[str, list[float]] = {name: [] for name in texts}
        for name, pieces in self.windows.items():
            for ids, first in tqdm(pieces, desc=f"source, {name}", delay=10, leave=False):
                states = self.states(self.model, ids, first)
                self.nll[name].append(nll(self.model, states, ids[first:]))
                self.hidden[name].append(states[::EVERY].clone())
        self.model.layers = nn.ModuleList()  # the head alone is needed from here on

    @torch.inference_mode()
    def states(self, model: Transformer, ids: list[int], first: int) -> Tensor:
        """(tokens, dim) from which ids[first:] are predicted."""
        layout = prompt_layout(ids, self.config, self.special_ids)
        context = layout.context(len(ids))[None] if layout.n_context > 1 else None
        batch = ForwardBatch(torch.tensor([ids]), layout.positions(0, len(ids))[:, None], context=context)
        return model(batch)[0, first - 1 : -1]

    @torch.inference_mode()
    def of(self, opened: OpenedModel) -> tuple[dict[str, Divergence], dict[str, list[float]]]:
        """By text: KL divergence and agreement on every EVERYth token, and nats a token of each window."""
        model = dense(opened, self.config)
        found: dict[str, Divergence] = {}
        nlls: dict[str, list[float]] = {}
        for name, pieces in self.windows.items():
            found[name], nlls[name] = Divergence(), []
            for (ids, first), hidden in zip(pieces, self.hidden[name], strict=True):
                states = self.states(model, ids, first)
                nlls[name].append(nll(model, states, ids[first:]))
                rows = self.model.logits(hidden), model.logits(states[::EVERY])
                found[name] += divergence(*rows, torch.tensor(ids[first:])[::EVERY])
        return found, nlls


@torch.inference_mode()
def nll(model: Transformer, states: Tensor, targets: list[int]) -> float:
    """Mean, in nats a token; logits of 128 tokens at a time."""
    total = 0.0
    for some, part in zip(states.split(128), torch.tensor(targets).split(128), strict=True):
        total += float(nn.functional.cross_entropy(model.logits(some), part, reduction="sum"))
    return total / len(targets)


def cut(ids: list[int], head: tuple[int, ...], config: GLMConfig, n: int) -> list[tuple[list[int], int]]:
    """n windows, evenly spread, with the number of the first token that is scored in each."""
    body = min(WINDOW, config.max_seq_len) - len(head)
    if len(ids) < n * body:
        raise SystemExit(f"a text has {len(ids)} tokens, {n} windows want {n * body}: give a longer one, or fewer")
    starts = [round(i * (len(ids) - body) / max(1, n - 1)) for i in range(n)]
    return [([*head, *ids[s : s + body]], max(1, len(head))) for s in starts]


def row(side: str, type: str, opened: OpenedModel, measure: Measure, seconds: float) -> Row:
    found, nlls = measure.of(opened)
    gc.collect()
    sizes = [(name, n) for name, _, n in opened.stored()]
    weights = sum(math.prod(s) for n, s in shapes_of(measure.config).items() if n.startswith("layers.") and len(s) == 2)
    blocks = sum(n for name, n in sizes if name.startswith("layers.") and ".norm" not in name and "bias" not in name)
    return Row(
        side, type, 8 * blocks / weights, sum(n for _, n in sizes),
        {name: perplexity(values) for name, values in nlls.items()},
        {name: d.kl / d.n for name, d in found.items()}, {name: d.same / d.n for name, d in found.items()}, nlls,
        seconds,
    )  # fmt: skip


def perplexity(nlls: list[float]) -> float:
    return math.exp(sum(nlls) / len(nlls))


def shapes_of(config: GLMConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in Transformer(config, device="meta").state_dict().items()}


# -------------------------------------------------------------------- both sides


def spec_of(type: str, embeddings: str) -> QuantSpec:
    """From words such as int4-g64-gptq."""
    name, *words = type.split("-")
    group = next((w.removeprefix("g") for w in words if w == "row" or w[1:].isdecimal()), None)
    method = next((w for w in words if w in ("absmax", "mse", "gptq", "awq")), None)
    if unknown := set(words) - {group, f"g{group}", method, "symmetric"}:
        raise SystemExit(f"unknown words in the type {type}: {', '.join(sorted(unknown))}")
    return QuantSpec.parse(name, group, "symmetric" in words, method, embeddings, embeddings)


def ours(type: str, source: Reference, folder: Path, o: argparse.Namespace) -> OpenedModel:
    if folder.exists():  # kept
        pass
    elif type == "bf16":
        convert(source, folder, dtype="bfloat16")
    else:
        spec = spec_of(type, o.embeddings)
        convert(source, folder, spec=spec, calibration=o.calibration_texts if spec.calibrated else ())
    return open_model(folder)


def peer_file(type: str, gguf: Path, target: Path, config: GLMConfig, o: argparse.Namespace) -> OpenedModel:
    if not target.exists():
        partial = target.with_suffix(".partial")
        kept = "Q8_0" if o.embeddings == "int8" else "F16"
        run_peer(o.peer_python, QUANTISE, str(gguf), str(partial), type, kept)
        partial.rename(target)
    return replace(open_model(target), config=config)


def run_peer(python: str, code: str, *arguments: str) -> str:
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return done.stdout.strip()


def write_peer_source(source: Reference, path: Path) -> bool:
    """A float16 GGUF of the weights. Returns whether llama.cpp can run it: it has no prefix models."""
    config = source.opened.config
    if config.mask == "causal":
        if not path.exists():
            convert(source, path, "gguf", dtype="float16")
        return True
    carrier = replace(config, mask="causal", rope=replace(config.rope, axes=1))
    write_gguf(path, carrier, source.meta, source.opened.weights(), {})
    return False


def compare(model: str | None, o: argparse.Namespace) -> dict[str, Any]:
    found = open_reference(Path(resolve(model)))
    name = found.opened.path.stem + (" shuffled" if o.shuffle else "")
    if o.shuffle:
        found = replace(found, opened=shuffled(found.opened))
    rows: list[Row] = []
    result: dict[str, Any] = {"model": name}
    types = [("ours", t) for t in o.ours] + [("llama.cpp", t) for t in o.peer if o.peer_python]
    with tempfile.TemporaryDirectory() as temporary:
        folder = o.keep / name.replace(" ", "-") if o.keep else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "source").exists():
            convert(found, folder / "source", dtype="float16")
        source = open_reference(folder / "source")
        measure = Measure(source, o.texts, o.windows)
        runs = bool(o.peer_python) and write_peer_source(source, folder / "f16.gguf")
        for side, type in tqdm(types, desc=name, unit="type"):
            start, out = time.perf_counter(), folder / f"{type}{'' if side == 'ours' else '.gguf'}"
            try:
                if side == "ours":
                    opened = ours(type, source, out, o)
                else:
                    opened = peer_file(type, folder / "f16.gguf", out, source.opened.config, o)
            except ValueError as error:  # such as groups that do not fit this model
                tqdm.write(f"{name}: no {type}: {error}", file=sys.stderr)
                continue
            rows.append(row(side, type, opened, measure, time.perf_counter() - start))
            tqdm.write(json.dumps(asdict(rows[-1])), file=sys.stderr)
            if runs and side == "llama.cpp" and type == o.peer[-1]:
                text, windows = next(iter(measure.windows.items()))
                (folder / "windows.json").write_text(json.dumps(windows))
                there = run_peer(o.peer_python, PERPLEXITY, str(out), str(folder / "windows.json"))
                result["run_by_llama.cpp"] = {"type": type, "text": text, "perplexity": math.exp(float(there))}
        n_bytes = sum(n for _, _, n in source.opened.stored())
    show(name, n_bytes, measure.nll, rows, result.get("run_by_llama.cpp"))
    return result | {"source": {"n_bytes": n_bytes, "nll": measure.nll}, "rows": [asdict(r) for r in rows]}


def show(
    name: str, n_bytes: int, source: dict[str, list[float]], rows: list[Row], check: dict[str, Any] | None
) -> None:
    texts = list(source)
    print(f"\n## {name}: {n_bytes / 2**20:,.0f} MiB in float16, perplexity "
          + ", ".join(f"{perplexity(source[t]):.3f} on {t}" for t in texts) + "\n")  # fmt: skip
    print("| | bits | MiB | " + " | ".join(f"perplexity, {t} | KL, {t}" for t in texts) + " | same top token |")
    print("|---|---|---|" + "---|" * (2 * len(texts)) + "---|")
    for r in sorted(rows, key=lambda r: r.mean_kl):
        cost = [f"{r.perplexity[t]:.3f} ({percent(r.nll[t], source[t])}) | {r.kl[t]:.5f}" for t in texts]
        same = sum(r.agreement.values()) / len(texts)
        print(f"| {r.side} {r.type} | {r.block_bits:.2f} | {r.n_bytes / 2**20:,.0f} | {' | '.join(cost)} "
              f"| {100 * same:.1f} % |")  # fmt: skip
    peers = [r for r in rows if r.side == "llama.cpp" and r.block_bits <= MAX_BITS]
    for r in (r for r in rows if r.side == "ours" and r.block_bits <= MAX_BITS and peers):
        for t in texts:
            best = min(peers, key=lambda p: p.perplexity[t])
            print(f"ours {r.type} against {best.type}, llama.cpp's best here of up to 5 bits, on {t}: "
                  f"{percent(r.nll[t], best.nll[t])} perplexity")  # fmt: skip
    if check is not None:
        print(f"\nllama.cpp's own perplexity with {check['type']} on {check['text']}: {check['perplexity']:.3f}")


def percent(a: list[float], b: list[float]) -> str:
    return "{:+.2f} ± {:.2f} %".format(*difference(a, b))


def read_text(path: Path, n_characters: int) -> str:
    """The first characters of a plain text, or of the documents of a JSONL file."""
    if ".jsonl" not in path.name:
        return path.read_text(encoding="utf-8")[:n_characters]
    texts, n = [], 0
    with path.open("rb") as raw:
        for line in read_lines(open_lines(raw, path.name)):
            texts.append(json.loads(line)["text"])
            n += len(texts[-1])
            if n > n_characters:
                break
    return "\n\n".join(texts)[:n_characters]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: the bundled model")
    parser.add_argument("--ours", default=OURS, help="types, separated by commas")
    parser.add_argument("--peer", default=PEER, help="types of llama.cpp")
    parser.add_argument("--peer-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--embeddings", choices=("int8", "none"), default="int8", help="and head, both sides")
    parser.add_argument("--shuffle", action="store_true", help="columns in another order first")
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens, of each text")
    parser.add_argument("--keep", type=Path, help="a folder where what is converted stays, and is taken from next time")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS, help=".txt or .jsonl[.zst]")
    parser.add_argument("--calibration", type=Path, nargs="+", help="likewise, for gptq and awq")
    o = parser.parse_args()
    o.ours, o.peer = ([t for t in words.split(",") if t] for words in (o.ours, o.peer))
    o.texts = {path.name.partition(".")[0]: read_text(path, 400_000) for path in o.text}
    o.calibration_texts = [read_text(path, 200_000) for path in o.calibration or ()]
    results = [compare(model, o) for model in o.models or [None]]
    print(json.dumps({"windows": o.windows, "embeddings": o.embeddings, "models": results}))


if __name__ == "__main__":
    main()
