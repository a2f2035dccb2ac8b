"""The released THUDM codes as short formulas in float64, over raw tensors in their own names and row orders.

Written from the codes' behaviour, independent of `openglm.model`; test_shapes.py compares with them. `logits` of a row
of ids, with masks and positions by each code's rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
KeysValues = Sequence[tuple[Tensor, Tensor]]  # of each layer, (P, heads, head_dim)


def matrix(state: State, name: str) -> Tensor:
    """A weight, dequantised where it has a scale: INT8, or INT4 where rows are half as wide as the other side says."""
    weight = state[f"{name}.weight"]
    if f"{name}.weight_scale" not in state:
        return weight.double()
    values = weight.to(torch.int16)
    if state.get("bits") is not None and int(state["bits"]) == 4:
        values = torch.stack([values >> 4, ((values & 15) ^ 8) - 8], -1).flatten(-2)
    return values.double() * state[f"{name}.weight_scale"].double()[:, None]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    bias = state.get(f"{name}.bias")
    return x @ matrix(state, name).T + (0 if bias is None else bias.double())


def norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    weight = state[f"{name}.weight"].double()
    if f"{name}.bias" in state:
        return F.layer_norm(x, x.shape[-1:], weight, state[f"{name}.bias"].double(), eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Half-split rotation of all of x (T, heads, dim), inverse frequencies rounded to half."""
    dim = x.shape[-1]
    freq = (1 / 10000 ** (torch.arange(0, dim, 2).float() / dim)).half().double()
    angle = (positions.double()[:, None] * freq)[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, before: tuple[Tensor, Tensor] | None = None) -> Tensor:
    if before is not None:
        k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
        hidden = F.pad(hidden, (len(before[0]), 0))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -math.inf).softmax(-1), v).flatten(1)


def hidden_from(n: int, n_context: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1) & (torch.arange(n) >= n_context)


def chatglm_6b(state: State, c: Mapping[str, Any], ids: list[int], before: KeysValues | None = None) -> Tensor:
    n, eps, heads = len(ids), c.get("layernorm_epsilon", 1e-5), c["num_attention_heads"]
    first_release = "gmask_token_id" not in c
    sop = c["bos_token_id"]
    mask, gmask = c.get("mask_token_id", 150000), c.get("gmask_token_id", 150001)
    kind = (mask if mask in ids else gmask) if first_release else (gmask if gmask in ids else mask)
    start, place = ids.index(sop), ids.index(kind)
    position, block = torch.arange(n), (torch.arange(n) - start + 1).clamp(min=0)
    position[start + 1 if first_release and kind == gmask else start :] = place

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([turned(a, position), turned(b, block)], -1)

    h = state["transformer.word_embeddings.weight"].double()[ids]
    alpha = math.sqrt(2 * 28)
    for i in range(c["num_layers"]):
        p = f"transformer.layers.{i}."
        x = norm(h, state, f"{p}input_layernorm", eps)
        q, k, v = linear(x, state, f"{p}attention.query_key_value").view(n, heads, -1).chunk(3, -1)
        found = attend(rotate(q), rotate(k), v, hidden_from(n, start), None if before is None else before[i])
        h = alpha * x + linear(found, state, f"{p}attention.dense")
        x = norm(h, state, f"{p}post_attention_layernorm", eps)
        up = F.gelu(linear(x, state, f"{p}mlp.dense_h_to_4h"), approximate="tanh")
        h = alpha * x + linear(up, state, f"{p}mlp.dense_4h_to_h")
    return norm(h, state, "transformer.final_layernorm", eps) @ state["transformer.word_embeddings.weight"].double().T


def chatglm2(state: State, c: Mapping[str, Any], ids: list[int], before: KeysValues | None = None) -> Tensor:
    n, eps, heads, dim = len(ids), c.get("layernorm_epsilon", 1e-5), c["num_attention_heads"], c["hidden_size"]
    hd = c.get("kv_channels") or dim // heads
    many = c.get("multi_query_attention", False)
    rotated = hd // 2
    freq = 1 / (10000.0 * c.get("rope_ratio", 1)) ** (torch.arange(0, rotated, 2).double() / rotated)
    angle = (torch.arange(n).double()[:, None] * freq)[:, None]

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., :rotated:2], x[..., 1:rotated:2]
        pairs = torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
        return torch.cat([pairs.flatten(-2), x[..., rotated:]], -1)

    h = state["transformer.embedding.word_embeddings.weight"].double()[ids]
    normed = c.get("apply_residual_connection_post_layernorm", False)
    for i in range(c["num_layers"]):
        p = f"transformer.encoder.layers.{i}."
        x = norm(h, state, f"{p}input_layernorm", eps)
        qkv = linear(x, state, f"{p}self_attention.query_key_value")
        if many:
            groups = c["multi_query_group_num"]
            q, k, v = (part.view(n, -1, hd) for part in qkv.split([heads * hd, groups * hd, groups * hd], -1))
        else:
            q, k, v = qkv.view(n, heads, 3 * hd).chunk(3, -1)
        found = attend(rotate(q), rotate(k), v, hidden_from(n, 0), None if before is None else before[i])
        h = (x if normed else h) + linear(found, state, f"{p}self_attention.dense")
        x = norm(h, state, f"{p}post_attention_layernorm", eps)
        gate, up = linear(x, state, f"{p}mlp.dense_h_to_4h").chunk(2, -1)
        h = (x if normed else h) + linear(F.silu(gate) * up, state, f"{p}mlp.dense_4h_to_h")
    return linear(norm(h, state, "transformer.encoder.final_layernorm", eps), state, "transformer.output_layer")


def over_ranks(
    ranks: Sequence[State], x: Tensor, column: str, row: str, between: Callable[[Tensor], Tensor]
) -> Tensor:
    """A column-parallel and a row-parallel layer as the ranks compute them: parts are summed, then the bias."""
    bare = [{k: v for k, v in rank.items() if k != f"{row}.bias"} for rank in ranks]
    parts = [linear(between(linear(x, rank, column)), rank, row) for rank in bare]
    return torch.stack(parts).sum(0) + ranks[0][f"{row}.bias"].double()


def glm_130b(ranks: Sequence[State], args: Mapping[str, Any], ids: list[int]) -> Tensor:
    n, eps, special = len(ids), args["layernorm_epsilon"], args["special_ids"]
    hd = args["hidden_size"] // args["num_attention_heads"]
    start = ids.index(special["sop"])
    blank = next((special[m] for m in ("[MASK]", "[sMASK]") if special[m] in ids[:start]), None)
    position = torch.arange(n)
    if blank is not None:
        position[start:] = ids.index(blank)

    def attention(x: Tensor) -> Tensor:
        q, k, v = x.view(n, -1, 3 * hd).chunk(3, -1)
        return attend(turned(q, position), turned(k, position), v, hidden_from(n, start))

    def geglu(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a * F.gelu(b)

    embed = torch.cat([rank["transformer.word_embeddings.weight"] for rank in ranks]).double()
    h, alpha = embed[ids], math.sqrt(2 * args["num_layers"])
    for i in range(args["num_layers"]):
        p = f"transformer.layers.{i}."
        x = norm(h, ranks[0], f"{p}input_layernorm", eps)
        h = alpha * x + over_ranks(ranks, x, f"{p}attention.query_key_value", f"{p}attention.dense", attention)
        x = norm(h, ranks[0], f"{p}post_attention_layernorm", eps)
        h = alpha * x + over_ranks(ranks, x, f"{p}mlp.dense_h_to_4h", f"{p}mlp.dense_4h_to_h", geglu)
    return norm(h, ranks[0], "transformer.final_layernorm", eps) @ embed.T


def glm_2021(ranks: Sequence[State], args: Mapping[str, Any], ids: list[int]) -> Tensor:
    n, eps, special = len(ids), args.get("layernorm_epsilon", 1e-5), args["special_ids"]
    hd = args["hidden_size"] // args["num_attention_heads"]
    starts = [i for i, token in enumerate(ids) if token == special["sop"]]
    masks = {special[name] for name in ("MASK", "gMASK", "sMASK")}
    places = [i for i, token in enumerate(ids[: starts[0]]) if token in masks]
    position, block = torch.arange(n), torch.zeros(n, dtype=torch.long)
    for start, place in zip(starts, places, strict=False):  # a further <sop> is a token that was drawn
        position[start:], block[start:] = place, torch.arange(1, n - start + 1)

    def attention(x: Tensor) -> Tensor:
        q, k, v = (part.view(n, -1, hd) for part in x.chunk(3, -1))
        return attend(q, k, v, hidden_from(n, starts[0]))

    embed = torch.cat([rank["word_embeddings.weight"] for rank in ranks]).double()
    tables = [ranks[0][f"transformer.{name}embeddings.weight"].double() for name in ("position_", "block_position_")]
    h = embed[ids] + tables[0][position] + tables[1][block]
    for i in range(args["num_layers"]):
        p = f"transformer.layers.{i}."
        x = norm(h, ranks[0], f"{p}input_layernorm", eps)
        h = h + over_ranks(ranks, x, f"{p}attention.query_key_value", f"{p}attention.dense", attention)
        x = norm(h, ranks[0], f"{p}post_attention_layernorm", eps)
        h = h + over_ranks(ranks, x, f"{p}mlp.dense_h_to_4h", f"{p}mlp.dense_4h_to_h",
                           lambda up: F.gelu(up, approximate="tanh"))  # fmt: skip
    return norm(h, ranks[0], "transformer.final_layernorm", eps) @ embed.T
