"""A converted model beside its source, on text: perplexity, KL divergence, agreement, and where the error is.

    python -m openglm convert MODEL OUT --format openglm --quantize int4 --report quality.html --text en.txt zh.txt

Both models are held at once and compute in float32 on PyTorch's operators, so that the weights alone make the
difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from openglm.loading import Reference
from openglm.model.batch import ForwardBatch, prompt_layout
from openglm.model.load import build_transformer
from openglm.model.opened import OpenedModel
from openglm.model.transformer import Transformer
from openglm.ops.quant import floats

__all__ = ["Divergence", "Quality", "TextQuality", "compare_models", "divergence", "logits_of", "windows"]

WINDOW = 512
MAX_TOKENS = 8192  # of each text, evenly spread over it
BINS = 48
MATRICES = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")


@dataclass(frozen=True)
class Divergence:
    """Sums over n tokens: nll of the source and of the other in nats, KL(source || other), tokens of one top."""

    n: int = 0
    source_nll: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    same: int = 0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def divergence(source: Tensor, other: Tensor, targets: Tensor) -> Divergence:
    """Of two models' logits (n, vocab) for targets (n,). float32, summed in float64."""
    p, q = source.float().log_softmax(-1), other.float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    at = targets[:, None]
    return Divergence(
        len(targets), -float(p.gather(1, at).double().sum()), -float(q.gather(1, at).double().sum()),
        float(kl.double().sum()), int((p.argmax(-1) == q.argmax(-1)).sum()),
    )  # fmt: skip


@dataclass(frozen=True)
class TextQuality:
    """One text. Perplexities by token; kl_divergence: mean, in nats a token; top1_agreement: 0 to 1."""

    name: str
    tokens: int
    source_perplexity: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float


@dataclass(frozen=True)
class Histogram:
    """Share of weights in each of BINS equal bins from low to high."""

    name: str
    low: float
    high: float
    source: tuple[float, ...]
    converted: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """All that a report shows.

    hidden_error: relative error of the hidden states behind each block. weight_error: relative error of each kind of
    matrix by block; empty where scales were folded into other weights (AWQ), which then differ without being wrong.
    """

    source: str
    converted: str
    source_bytes: int
    n_bytes: int
    texts: tuple[TextQuality, ...]
    hidden_error: tuple[float, ...]
    weight_error: Mapping[str, tuple[float, ...]]
    histograms: tuple[Histogram, ...]

    def summary(self) -> dict[str, Any]:
        """Without the histograms, for --json."""
        value = asdict(self)
        del value["histograms"]
        return value


def compare_models(source: Reference, converted: Reference, texts: Mapping[str, str]) -> Quality:
    """Measure a converted model on texts by name. Raises ValueError: no tokenizer, too short a text."""
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise ValueError(f"{source.opened.path} has no tokenizer to read text with: leave out --report")
    models = [build_transformer(r.opened, dtype=torch.float32) for r in (source, converted)]
    track = _Track(*models)
    special_ids = source.meta.special_ids
    found = []
    for name, text in texts.items():
        pieces = list(windows(tokenizer.encode(text), source, name))
        total = Divergence()
        for ids, first in tqdm(pieces, desc=name, unit="window", delay=2, leave=False):
            rows = [logits_of(model, ids, special_ids, first) for model in models]
            track.add()
            total += divergence(rows[0], rows[1], torch.tensor(ids[first:]))
        found.append(
            TextQuality(
                name, total.n, _exp(total.source_nll / total.n), _exp(total.nll / total.n), total.kl / total.n,
                total.same / total.n,
            )
        )  # fmt: skip
    weight_error, histograms = _weights(source.opened, converted.opened)
    before, after = (sum(n for _, _, n in reference.opened.stored()) for reference in (source, converted))
    return Quality(
        source.opened.path.name, converted.opened.path.name, before, after, tuple(found), track.relative(),
        weight_error, histograms,
    )  # fmt: skip


def windows(ids: Sequence[int], reference: Reference, name: str) -> Iterator[tuple[list[int], int]]:
    """(ids, first scored): pieces of a text, evenly spread, behind what stands in front of any text."""
    head = reference.meta.text_head(reference.meta.special_ids)
    body = min(WINDOW, reference.opened.config.max_seq_len) - len(head)
    if len(ids) < 2:
        raise ValueError(f"{name} has too few tokens to compare models on: give a longer text")
    n = min(max(1, MAX_TOKENS // body), -(-len(ids) // body))
    for i in range(n):
        start = round(i * max(0, len(ids) - body) / max(1, n - 1))
        yield [*head, *ids[start : start + body]], max(1, len(head))


@torch.inference_mode()
def logits_of(model: Transformer, ids: Sequence[int], special_ids: Mapping[str, int], first: int) -> Tensor:
    """(len(ids) - first, vocab) float32 logits that predict ids[first:], laid out as a prompt of these ids."""
    layout = prompt_layout(ids, model.config, special_ids)
    context = layout.context(len(ids))[None] if layout.n_context > 1 else None
    batch = ForwardBatch(torch.tensor([ids]), layout.positions(0, len(ids))[:, None], context=context)
    return model.logits(model(batch)[0, first - 1 : -1])


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))


class _Track:
    """Hidden states behind each block of two models that are given the same tokens."""

    def __init__(self, source: Transformer, other: Transformer) -> None:
        self.kept: list[list[Tensor]] = [[], []]
        self.error: list[float] = [0.0] * len(source.layers)
        self.size: list[float] = [0.0] * len(source.layers)
        for which, model in enumerate((source, other)):
            for block in model.layers:
                block.register_forward_hook(self._hook(which))

    def _hook(self, which: int) -> Any:
        def keep(module: nn.Module, args: Any, h: Tensor) -> None:
            self.kept[which].append(h)

        return keep

    def add(self) -> None:
        for i, (a, b) in enumerate(zip(*self.kept, strict=True)):
            self.error[i] += float((a - b).square().sum())
            self.size[i] += float(a.square().sum())
        self.kept[0].clear()
        self.kept[1].clear()

    def relative(self) -> tuple[float, ...]:
        return tuple(math.sqrt(e / s) if s else 0.0 for e, s in zip(self.error, self.size, strict=True))


# -------------------------------------------------------------------- weights


def _weights(source: OpenedModel, converted: OpenedModel) -> tuple[dict[str, tuple[float, ...]], tuple[Histogram, ...]]:
    """Relative error of each kind of matrix by block, and histograms of the first block's, the middle and the last."""
    n = source.config.n_layers
    errors: dict[str, list[float]] = {name: [] for name in MATRICES}
    folded, histograms = False, []
    for layer in range(n):
        for norm in ("norm1", "norm2"):
            a, b = (floats(m.get(f"layers.{layer}.{norm}.weight")).float() for m in (source, converted))
            folded |= float((a - b).abs().max()) > 0.01 * float(a.abs().max())
        for name in MATRICES:
            a, b = (floats(m.get(f"layers.{layer}.{name}.weight")).float() for m in (source, converted))
            errors[name].append(float((a - b).norm() / a.norm().clamp(min=1e-20)))
            if layer in (0, n // 2, n - 1) and name in ("attn.qkv", "mlp.down"):
                histograms.append(_histogram(f"layers.{layer}.{name}", a, b))
    return {} if folded else {name: tuple(values) for name, values in errors.items()}, tuple(histograms)


def _histogram(name: str, a: Tensor, b: Tensor) -> Histogram:
    """Over four standard deviations either side; what lies outside is counted in the outermost bins."""
    reach = 4 * float(a.std()) or 1.0
    counts = [torch.histc(w.clamp(-reach, reach), BINS, -reach, reach).div_(w.numel()).tolist() for w in (a, b)]
    return Histogram(name, -reach, reach, tuple(counts[0]), tuple(counts[1]))
