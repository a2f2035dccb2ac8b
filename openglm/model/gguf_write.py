"""GGUF models out: llama.cpp loads them. Weights stream through, one tensor at a time.

    python -m openglm convert MODEL model.gguf --format gguf

The table of tensors has one size whatever their types, so space for it is left in front of the bytes and it is written
last: a tensor's type may depend on the weight that comes. A killed process is gone on with after the last tensors that
were safe on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openglm.config import GLMConfig
from openglm.model.checkpoint import CheckpointMeta
from openglm.model.gguf import META_KEY, ROPE_FREQS, SAMPLING, TOP, VECTORS_KEY, family_of
from openglm.model.gguf_file import ARRAY, MAGIC, SCALARS, STRING
from openglm.model.gguf_tokenizer import padded_tokens
from openglm.model.gguf_types import TYPES, encode, kept_type
from openglm.model.weights import export_weights, names_of
from openglm.ops.quant import QuantTensor, Weight
from openglm.ops.rope import inverse_frequencies, llama3_divisors
from openglm.tokenizer.tokenizer import write_file

__all__ = ["FILE_TYPES", "GgufOutput", "architecture_of", "write_gguf"]

ALIGNMENT = 32
BLOCK = 32  # columns that share a scale
VERSION = 3
QUANTISATION_VERSION = 2
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # llama.cpp's numbers for a whole file
NOTE_BYTES = 64 << 20  # written between two notes of progress, each of which waits for the disk


def architecture_of(config: GLMConfig) -> str:
    """The architecture that computes what the config says. Raises ValueError where GGUF has none."""
    wanted = {
        "mask": "causal", "positions": "rope", "norm": "rms", "residual": "stream", "mlp": "swiglu",
        "linear_bias": False,
    }  # fmt: skip
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"GGUF has no architecture with {name} {getattr(config, name)!r}: convert to openglm instead"
            )
    rope = config.rope
    scales = (rope.yarn_factor, rope.position_scale, rope.llama3_factor)
    if rope.freq_dtype != "float32" or sum(x > 1 for x in scales) > 1:
        raise ValueError("GGUF cannot express these rotary frequencies (rounded to half, or scaled twice)")
    if rope.llama3_factor > 1 and (config.sandwich or rope.fraction < 1 or config.qkv_bias):
        raise ValueError("llama.cpp knows the rotary scaling of Llama 3.1 in llama alone: convert to openglm or hf")
    if config.sandwich:
        return "glm4"
    if rope.fraction < 1:
        if config.n_heads * config.head_dim != config.dim:
            raise ValueError(
                f"llama.cpp's chatglm needs heads as wide as the model ({config.dim}), not "
                f"{config.n_heads} x {config.head_dim}: convert to openglm or hf instead"
            )
        return "chatglm"
    return "qwen2" if config.qkv_bias else "llama"


def write_gguf(
    path: str | Path,
    config: GLMConfig,
    meta: CheckpointMeta,
    weights: Iterable[tuple[str, Weight]],
    tokenizer_fields: Mapping[str, Any],
    type: str = "F16",
    chat_template: str | None = None,
) -> None:
    """Write a model. weights: (our name, weight in our order), each once, in any order; the rest: see `GgufOutput`."""
    with GgufOutput(path, config, meta, tokenizer_fields, type, chat_template) as out:
        for name, weight in weights:
            out.add(name, weight)
        out.commit()


class GgufOutput:
    """A GGUF file that is written weight by weight. Used in a `with`: what was not committed is removed at its end.

    identity: what is written from what and how. With it, a process that is killed or interrupted leaves its work, and
    the next one with the same identity goes on from there. done: our names of the weights that need not come again.
    """

    def __init__(
        self,
        path: str | Path,
        config: GLMConfig,
        meta: CheckpointMeta,
        tokenizer_fields: Mapping[str, Any],
        type: str = "F16",
        chat_template: str | None = None,
        identity: Mapping[str, Any] | None = None,
        vectors: str | None = None,
    ) -> None:
        """type: of the matrices: F32, F16, BF16, Q8_0 or Q4_0 (then the output matrix is Q8_0). With Q8_0 and Q4_0 a
        weight that is quantised in a form GGUF has is kept bit for bit (groups of 32; larger ones and whole rows in no
        more bits than asked for), and rows that do not split into groups of 32 become F16. Norms and biases are F32;
        vectors: float16 or bfloat16, which they were and are read as again.
        Raises ValueError for a config that GGUF cannot express. An existing file is replaced by `commit`.
        """
        if type not in FILE_TYPES:
            raise ValueError(f"GGUF files are written as {', '.join(FILE_TYPES)}, not {type}")
        architecture = architecture_of(config)
        self._family = family_of(architecture, fused_up=architecture in ("chatglm", "glm4"))
        self._config, self._type = config, type
        names = [name for theirs in names_of(self._family, config).values() for name in theirs]
        names += [ROPE_FREQS] * (config.rope.llama3_factor > 1)
        fields = _fields(architecture, config, meta, type) | padded_tokens(tokenizer_fields, config.vocab_size)
        if chat_template is not None:
            fields["tokenizer.chat_template"] = chat_template
        if vectors is not None:
            fields[VECTORS_KEY] = vectors
        header = MAGIC + struct.pack("<IQQ", VERSION, len(names), len(fields))
        header += b"".join(_string(key) + _value(value) for key, value in fields.items())
        # Every matrix has two dimensions, everything else one: the table's size is known before its contents.
        table_size = sum(len(_entry(name, (0, 0) if _is_matrix(name) else (0,), 0, 0)) for name in names)
        self._table_at, self._table_size = len(header), table_size
        self._start = -(-(len(header) + table_size) // ALIGNMENT) * ALIGNMENT
        self.path = Path(path)
        kept = identity is not None
        self._partial = self.path.with_name(f".{self.path.name}.{'partial' if kept else f'tmp-{os.getpid()}'}")
        self._notes = self.path.with_name(f".{self.path.name}.progress")
        digest = hashlib.sha256(header).hexdigest()
        self._identity = json.loads(json.dumps({**identity, "header": digest})) if identity is not None else None
        self.done: set[str] = set()
        self._added: list[str] = []
        self._table: dict[str, bytes] = {}
        self._noted = self._start
        if kept:
            self._resume()
        self.continued = bool(self.done)
        self._file = open(self._partial, "r+b" if self.continued else "wb")
        self._file.write(b"" if self.continued else header)
        self._file.truncate(self._noted)
        self._file.seek(self._noted)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        refused = isinstance(error, ValueError) and not self.done
        if self._identity is None or refused:
            self._partial.unlink(missing_ok=True)
            self._notes.unlink(missing_ok=True)

    def add(self, name: str, weight: Weight) -> None:
        """Write one weight, by our name and in our order."""
        for theirs, part in export_weights(self._family, self._config, [(name, weight)]):
            self._write(theirs, part)
        self._added.append(name)
        if self._identity is not None and self._file.tell() - self._noted >= NOTE_BYTES:
            self._note()

    def _write(self, name: str, weight: Weight) -> None:
        weight = _in_blocks(weight, self._type)
        stored = _stored_type(name, weight, self._type, self._config.tie_embeddings)
        offset = self._file.tell() - self._start
        self._table[name] = _entry(name, tuple(weight.shape), TYPES[stored].id, offset)
        for data in encode(stored, weight):
            self._file.write(data)
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))

    def commit(self) -> None:
        """Complete the file and give it its name."""
        rope = self._config.rope
        if rope.llama3_factor > 1:
            plain = inverse_frequencies(self._config.rotary_dim, rope.theta)
            self._write(ROPE_FREQS, llama3_divisors(plain, rope.llama3_factor, rope.llama3_context))
        wanted = {name for theirs in names_of(self._family, self._config).values() for name in theirs}
        assert self._table.keys() - {ROPE_FREQS} == wanted, f"weights not given: {sorted(wanted - self._table.keys())}"
        self._file.seek(self._table_at)
        self._file.write(b"".join(self._table.values()))
        assert self._file.tell() == self._table_at + self._table_size
        self._sync()
        os.replace(self._partial, self.path)
        self._notes.unlink(missing_ok=True)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _note(self) -> None:
        """Note what is written, once it is safe on the disk."""
        self._sync()
        self._noted = self._file.tell()
        self.done.update(self._added)
        table = {name: entry.hex() for name, entry in self._table.items()}
        notes = {"identity": self._identity, "end": self._noted, "done": sorted(self.done), "table": table}
        write_file(self._notes, json.dumps(notes).encode())

    def _resume(self) -> None:
        """Take over what an earlier process with the same identity noted."""
        try:
            notes = json.loads(self._notes.read_text(encoding="utf-8"))
            size = self._partial.stat().st_size
        except (OSError, ValueError):
            return
        if isinstance(notes, dict) and notes.get("identity") == self._identity and size >= notes["end"]:
            self._noted, self.done = notes["end"], set(notes["done"])
            self._table = {name: bytes.fromhex(entry) for name, entry in notes["table"].items()}


def _fields(architecture: str, config: GLMConfig, meta: CheckpointMeta, type: str) -> dict[str, Any]:
    c, a = config, architecture
    fields: dict[str, Any] = {
        "general.architecture": a,
        "general.file_type": FILE_TYPES[type],
        "general.quantization_version": QUANTISATION_VERSION,
        f"{a}.block_count": c.n_layers,
        f"{a}.context_length": c.max_seq_len,
        f"{a}.embedding_length": c.dim,
        f"{a}.feed_forward_length": c.ffn_dim,
        f"{a}.attention.head_count": c.n_heads,
        f"{a}.attention.head_count_kv": c.n_kv_heads,
        f"{a}.attention.key_length": c.head_dim,
        f"{a}.attention.value_length": c.head_dim,
        f"{a}.attention.layer_norm_rms_epsilon": float(c.norm_eps),
        f"{a}.rope.dimension_count": c.rotary_dim,
        f"{a}.rope.freq_base": float(c.rope.theta),
        f"{a}.vocab_size": c.vocab_size,
        META_KEY: json.dumps(asdict(meta), ensure_ascii=False),
    }
    if c.rope.position_scale > 1:
        fields |= {f"{a}.rope.scaling.type": "linear", f"{a}.rope.scaling.factor": float(c.rope.position_scale)}
    if c.rope.yarn_factor > 1:
        fields |= {
            f"{a}.rope.scaling.type": "yarn",
            f"{a}.rope.scaling.factor": float(c.rope.yarn_factor),
            f"{a}.rope.scaling.original_context_length": c.rope.yarn_context,
        }
    for name, key in SAMPLING.items():
        if name in meta.generation:
            fields[key] = int(meta.generation[name]) if name == "top_k" else float(meta.generation[name])
    for kind, stop in zip(("eos", "eot", "eom"), meta.stop_ids, strict=False):
        fields[f"tokenizer.ggml.{kind}_token_id"] = stop
    return fields


# -------------------------------------------------------------------- bytes


def _is_matrix(name: str) -> bool:
    return name.endswith(".weight") and "norm" not in name and name != ROPE_FREQS


def _in_blocks(weight: Weight, type: str) -> Weight:
    """The same numbers with a scale for every 32 columns where more share one; not in more bits than asked for."""
    if not isinstance(weight, QuantTensor) or weight.group_size == BLOCK or weight.group_size % BLOCK:
        return weight
    if type not in ("Q8_0", "Q4_0") or (weight.bits == 8 and type == "Q4_0"):
        return weight
    n = weight.group_size // BLOCK
    minimum = None if weight.minimum is None else weight.minimum.repeat_interleave(n, 1)
    return QuantTensor(weight.q, weight.scale.repeat_interleave(n, 1), minimum)


def _stored_type(name: str, weight: Weight, type: str, tied: bool) -> str:
    if not _is_matrix(name):
        return "F32"
    if type not in ("Q8_0", "Q4_0"):
        return type
    if isinstance(weight, QuantTensor) and (kept := kept_type(weight)) is not None:
        return kept
    if weight.shape[1] % BLOCK:
        return "F16"
    is_head = name == f"{TOP['embed' if tied else 'head']}.weight"
    return "Q8_0" if is_head else type


def _entry(name: str, shape: tuple[int, ...], type_id: int, offset: int) -> bytes:
    return _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], type_id, offset)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A typed value; the items of a list have the first one's type, and its integers are signed."""
    if isinstance(value, list):
        kind = _kind(value[0], signed=True) if value else 5
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        if kind == STRING:
            return head + b"".join(map(_string, value))
        return head + struct.pack(f"<{len(value)}{SCALARS[kind]}", *value)
    kind = _kind(value)
    return struct.pack("<I", kind) + (_string(value) if kind == STRING else struct.pack("<" + SCALARS[kind], value))


def _kind(value: Any, signed: bool = False) -> int:
    if isinstance(value, bool):
        return 7
    if isinstance(value, int):
        return 5 if signed or value < 0 else 4
    if isinstance(value, float):
        return 6
    assert isinstance(value, str), f"GGUF has no type for {value!r}"
    return STRING
