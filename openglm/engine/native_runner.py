"""NativeRunner: passes of the engine on the native library, one call each; the same protocol as TorchRunner.

    python -m pytest -q tests/test_native.py tests/test_engine_bursts.py

Takes models on a CPU whose matrices are plain (float32, float16, bfloat16) or packed (`openglm.model.linear`), of
every generation of the family. Each row of logits is computed in an order of its own, so that answers do not depend
on what else runs, bit for bit.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openglm.engine.runner import Burst, Chunk, Decoding, kv_type
from openglm.model.linear import PackedEmbedding, PackedLinear, RowParts
from openglm.model.paged import key_centres, lazy_zeros
from openglm.model.transformer import Block, Transformer
from openglm.ops import native

__all__ = ["NativeRunner", "runs_natively"]


def runs_natively(model: Transformer) -> bool:
    """Whether NativeRunner takes the model: a CPU, the library, no P-Tuning prefix, matrices of kinds it knows."""
    if not native.available() or model.device.type != "cpu" or model.kv_prefix is not None:
        return False
    if model.config.n_heads // model.config.n_kv_heads > native.TILE_ROWS:
        return False
    modules: list[nn.Module] = [model.embed] if model.head is None else [model.embed, model.head]
    for block in model.layers:
        assert isinstance(block, Block)
        modules += [block.attn.qkv, block.attn.out, block.mlp.up, block.mlp.down]
    return all(_known(module) for module in modules)


def _known(module: nn.Module) -> bool:
    if isinstance(module, RowParts):
        return all(_known(part) for part in module.parts)
    if isinstance(module, (PackedLinear, PackedEmbedding)):
        return True
    return type(module) in (nn.Linear, nn.Embedding) and module.weight.dtype in native.KINDS


class NativeRunner:
    """A Transformer that `runs_natively`, with a paged pool of its own.

    page_size: a multiple of 16. kv_dtype: a name of KV_DTYPES; None: float32 for a model of float32 matrices,
    bfloat16 for one of bfloat16, else float16.
    """

    def __init__(self, model: Transformer, n_pages: int, page_size: int = 16, kv_dtype: str | None = None) -> None:
        if page_size % 16:
            raise ValueError(f"page_size must be a multiple of 16 on a CPU, not {page_size}")
        assert runs_natively(model)
        self.model, self.config, self.page_size, self.n_pages = model, model.config, page_size, n_pages
        self._kept: list[Any] = []  # what the pointers of the structures point into
        self._struct = self._model_struct()
        dtype = kv_type(model, kv_dtype or natural_kv_dtype(model))
        c = self.config
        rows = (c.n_layers, n_pages, c.n_kv_heads, page_size)
        self._keys, self._values = (lazy_zeros((*rows, c.head_dim), dtype) for _ in range(2))
        self._pool = native.PoolStruct(
            native.KINDS[dtype], page_size, n_pages, self._keys.data_ptr(), self._values.data_ptr()
        )
        library = native.library()
        assert library is not None
        self._library, self._workspace = library, library.og_workspace_new()
        self._wanted = ctypes.c_int32(0)

    def __del__(self) -> None:
        if hasattr(self, "_workspace"):
            self._library.og_workspace_free(self._workspace)

    @property
    def kv_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        ids = array("q", [i for chunk in chunks for i in chunk.ids])
        positions = chunks[0].positions if len(chunks) == 1 else torch.cat([c.positions for c in chunks], dim=1)
        positions = positions.contiguous()
        outputs, structs, pages = array("i"), (native.ChunkStruct * len(chunks))(), []
        end = 0
        for struct, chunk in zip(structs, chunks, strict=True):
            n = len(chunk.ids)
            end += n
            outputs.extend(range(end - chunk.n_logits, end))
            assert chunk.start + n <= len(chunk.pages) * self.page_size
            pages.append(array("i", chunk.pages))
            struct.n_tokens, struct.start, struct.n_context = n, chunk.start, chunk.n_context
            struct.pages = pages[-1].buffer_info()[0]
        logits = torch.empty(len(outputs), self.config.vocab_size)
        batch = native.Batch(
            end, len(chunks), len(outputs), ids.buffer_info()[0], positions.data_ptr(), structs,
            outputs.buffer_info()[0], logits.data_ptr(),
        )  # fmt: skip
        done = self._library.og_forward(
            ctypes.byref(self._struct), ctypes.byref(self._pool), ctypes.byref(batch), self._workspace
        )
        if not done:
            raise MemoryError(f"no memory for a pass of {end} tokens: lower step_tokens")
        return logits

    def decode(self, sequences: Sequence[Decoding], n_ids: int, n_steps: int, seconds: float) -> Burst:
        """Run and draw, up to n_steps times; what runs and how is the same as step by step. Ids from n_ids on are never
        drawn. No step begins that would end later than `seconds` from now, but one does, and the first step in which a
        sequence draws a stop id or has no numbers is the last, as is the one that runs when `interrupt` is called."""
        n, count = len(sequences), len(sequences) * n_steps
        structs = (native.StreamStruct * n)()
        kept = [self._fill(struct, sequence, n_steps) for struct, sequence in zip(structs, sequences, strict=True)]
        ids, logprobs = array("q", bytes(8 * count)), array("d", bytes(8 * count))
        passed = array("d", bytes(8 * n_steps))
        burst = native.BurstStruct(
            n, n_steps, n_ids, seconds, structs, ctypes.addressof(self._wanted), ids.buffer_info()[0],
            logprobs.buffer_info()[0], passed.buffer_info()[0],
        )  # fmt: skip
        start = time.perf_counter()
        n_done = self._library.og_decode(
            ctypes.byref(self._struct), ctypes.byref(self._pool), ctypes.byref(burst), self._workspace
        )
        self._wanted.value = 0
        del kept
        if not n_done:
            raise MemoryError(f"no memory for a pass of {n} tokens: lower n_parallel")
        rows = [slice(i * n, i * n + n) for i in range(n_done)]
        return Burst(
            [ids[r].tolist() for r in rows], [logprobs[r].tolist() for r in rows],
            [start + s for s in passed[:n_done]],
        )  # fmt: skip

    def interrupt(self) -> None:
        """End `decode` with the step that runs, or the next one with its first. From any thread."""
        self._wanted.value = 1

    def _fill(self, struct: native.StreamStruct, s: Decoding, n_steps: int) -> list[Any]:
        """Returns what the pointers point into."""
        pages, stop_ids, p = array("i", s.pages), array("q", s.stop_ids), s.params
        assert s.start + n_steps <= min(len(pages) * self.page_size, s.positions.shape[1])
        assert s.positions.dtype == torch.int64 and s.positions.stride(1) == 1
        struct.id, struct.start, struct.axes, struct.pages = s.id, s.start, len(s.positions), pages.buffer_info()[0]
        struct.positions, struct.stride = s.positions.data_ptr() + 8 * s.start, s.positions.stride(0)
        struct.sampling = native.SamplingStruct(p.temperature, p.top_p, p.min_p, p.top_k, s.seed % 2**64)
        struct.n_drawn, struct.stop_ids, struct.n_stop_ids = s.n_drawn, stop_ids.buffer_info()[0], len(stop_ids)
        return [pages, stop_ids]

    # ---------------------------------------------------------------- the model as structures

    def _model_struct(self) -> native.ModelStruct:
        c, model = self.config, self.model
        frequencies = self._keep(model._inv_freq.float().contiguous())
        learned = c.positions == "learned"
        centres = key_centres(model)
        pointers = [None] * c.n_layers if centres is None else [x.data_ptr() for x in self._keep(centres)]
        layers = (native.LayerStruct * c.n_layers)(*map(self._layer, model.layers, pointers))
        self._kept.append(layers)
        empty = native.MatrixStruct()
        return native.ModelStruct(
            n_layers=c.n_layers, dim=c.dim, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, head_dim=c.head_dim,
            ffn_dim=c.ffn_dim, vocab_size=c.vocab_size, layer_norm=c.norm == "layer",
            normed_residual=c.residual == "normed", mlp=native.MLPS[c.mlp], axes=c.rope.axes,
            n_frequencies=0 if learned else len(frequencies), norm_eps=c.norm_eps, alpha=c.residual_alpha,
            rope_scale=model._rope_scale, inv_freq=frequencies.data_ptr(), embed=self._matrices(model.embed)[0],
            embed_position=self._matrices(model.embed_position)[0] if learned else empty,
            embed_block=self._matrices(model.embed_block)[0] if learned else empty,
            layers=layers, norm=self._norm(model.norm), head=self._linear(model.head or model.embed),
        )  # fmt: skip

    def _layer(self, block: nn.Module, centre: int | None) -> native.LayerStruct:
        assert isinstance(block, Block)
        gated = self.config.mlp != "gelu"
        return native.LayerStruct(
            self._norm(block.norm1), self._norm(block.norm2), self._norm(block.post_norm1),
            self._norm(block.post_norm2), self._linear(block.attn.qkv), self._linear(block.attn.out),
            self._linear(block.mlp.up, self.config.ffn_dim if gated else None), self._linear(block.mlp.down), centre,
        )  # fmt: skip

    def _linear(self, module: nn.Module, cut: int | None = None) -> native.LinearStruct:
        """cut: rows after which a plain matrix is given as two."""
        matrices = list(self._matrices(module, cut))
        bias = getattr(module, "bias", None)
        pointer = None if bias is None else self._keep(bias.detach().float().contiguous()).data_ptr()
        return native.LinearStruct(len(matrices), (native.MatrixStruct * 3)(*matrices), pointer)

    def _matrices(self, module: nn.Module, cut: int | None = None) -> list[native.MatrixStruct]:
        if isinstance(module, RowParts):
            return [m for part in module.parts for m in self._matrices(part)]
        if isinstance(module, (PackedLinear, PackedEmbedding)):
            self._kept.append(module.matrix)
            assert cut is None, "a gated MLP's matrix is packed in two parts"
            return [module.matrix.struct()]
        assert isinstance(module.weight, Tensor)
        weight = self._keep(module.weight.detach().contiguous())
        return [native.matrix_of(w) for w in ([weight] if cut is None else [weight[:cut], weight[cut:]])]

    def _norm(self, module: nn.Module) -> native.NormStruct:
        if isinstance(module, nn.Identity):
            return native.NormStruct(None, None)
        parts = [getattr(module, name, None) for name in ("weight", "bias")]
        pointers = [None if p is None else self._keep(p.detach().float().contiguous()).data_ptr() for p in parts]
        return native.NormStruct(*pointers)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor


def natural_kv_dtype(model: Transformer) -> str:
    """float32 and bfloat16 for models of such matrices, else float16."""
    kinds = set(_plain_dtypes(model))
    if kinds == {torch.float32}:
        return "float32"
    return "bfloat16" if kinds == {torch.bfloat16} else "float16"


def _plain_dtypes(model: Transformer) -> Iterator[torch.dtype | None]:
    """dtype of every layer's query-key-value matrix, None for a quantised one."""
    for block in model.layers:
        assert isinstance(block, Block)
        module = block.attn.qkv
        yield module.weight.dtype if type(module) is nn.Linear else None
