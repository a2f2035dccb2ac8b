"""The structures of csrc/openglm.h, for ctypes; its comments say what the fields mean.

python -m pytest -q tests/test_native.py
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p

__all__ = [
    "Batch", "BurstStruct", "ChunkStruct", "GgufMatrixStruct", "LayerStruct", "LinearStruct", "MatrixStruct",
    "ModelStruct", "NormStruct", "PoolStruct", "SamplingStruct", "StreamStruct",
]  # fmt: skip


class MatrixStruct(Structure):
    _fields_ = [
        ("kind", c_int32), ("group", c_int32), ("rows", c_int64), ("columns", c_int64),
        ("data", c_void_p), ("scale", c_void_p), ("minimum", c_void_p),
    ]  # fmt: skip


class GgufMatrixStruct(Structure):
    _fields_ = [
        ("to", MatrixStruct), ("type", c_char_p), ("blocks", c_void_p), ("order", c_void_p), ("n_mapped", c_int64),
    ]  # fmt: skip


class LinearStruct(Structure):
    _fields_ = [("n_parts", c_int32), ("parts", MatrixStruct * 3), ("bias", c_void_p)]


class NormStruct(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class LayerStruct(Structure):
    _fields_ = [
        *((name, NormStruct) for name in ("norm1", "norm2", "post_norm1", "post_norm2")),
        *((name, LinearStruct) for name in ("qkv", "out", "up", "down")), ("key_centre", c_void_p),
    ]  # fmt: skip


class ModelStruct(Structure):
    _fields_ = [
        *((name, c_int32) for name in (
            "n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size",
            "layer_norm", "normed_residual", "mlp", "axes", "n_frequencies",
        )),
        ("norm_eps", c_float), ("alpha", c_float), ("rope_scale", c_float), ("inv_freq", c_void_p),
        ("embed", MatrixStruct), ("embed_position", MatrixStruct), ("embed_block", MatrixStruct),
        ("layers", POINTER(LayerStruct)), ("norm", NormStruct), ("head", LinearStruct),
    ]  # fmt: skip


class PoolStruct(Structure):
    _fields_ = [
        ("kind", c_int32), ("page_size", c_int32), ("n_pages", c_int64), ("keys", c_void_p), ("values", c_void_p),
    ]  # fmt: skip


class ChunkStruct(Structure):
    _fields_ = [("n_tokens", c_int32), ("start", c_int32), ("n_context", c_int32), ("pages", c_void_p)]


class Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("n_chunks", c_int32), ("n_outputs", c_int32), ("ids", c_void_p),
        ("positions", c_void_p), ("chunks", POINTER(ChunkStruct)), ("outputs", c_void_p), ("logits", c_void_p),
    ]  # fmt: skip


class SamplingStruct(Structure):
    _fields_ = [
        ("temperature", c_double), ("top_p", c_double), ("min_p", c_double), ("top_k", c_int64), ("seed", c_uint64),
    ]  # fmt: skip


class StreamStruct(Structure):
    _fields_ = [
        ("id", c_int64), ("start", c_int32), ("axes", c_int32), ("pages", c_void_p), ("positions", c_void_p),
        ("stride", c_int64), ("sampling", SamplingStruct), ("n_drawn", c_int64), ("stop_ids", c_void_p),
        ("n_stop_ids", c_int64),
    ]  # fmt: skip


class BurstStruct(Structure):
    _fields_ = [
        ("n_streams", c_int32), ("n_steps", c_int32), ("n_ids", c_int64), ("most_seconds", c_double),
        ("streams", POINTER(StreamStruct)), ("wanted", c_void_p), ("ids", c_void_p), ("logprobs", c_void_p),
        ("seconds", c_void_p),
    ]  # fmt: skip
