"""The verbs that look and change nothing: inspect, inspect prompt, data check, doctor.

    python -m openglm inspect random:glm-4-9b
    python -m openglm doctor

Each verb has three parts: NAME_options adds its options, NAME_value computes what --json prints, NAME_print shows it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openglm.loading import Reference
    from openglm.model.opened import OpenedModel

__all__: list[str] = []

# What each optional package gives; none is needed for the bundled model.
EXTRAS = {
    "pyarrow": "reads .parquet (pip install 'openglm[data]')",
    "datasets": "reads hub data sets by id (pip install 'openglm[data]')",
    "xgrammar": "holds answers to a JSON schema or regular expression (pip install 'openglm[grammar]')",
    "ipykernel": "the agent's Python tool, and functions as tools (pip install 'openglm[agent]')",
    "mcp": "tools of MCP servers, and OpenGLM's own for others (pip install 'openglm[mcp]')",
    "tensorboard": "training curves for tensorboard: true (pip install 'openglm[tensorboard]')",
}
CPU_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "asimddp", "bf16", "i8mm"
)  # fmt: skip
FAMILY_NAMES = {
    "openglm": "our own format",
    "random": "none: random weights",
    "glm-130b": "GLM-130B, model-parallel shards (SAT)",
    "glm-10b": "the original GLM, model-parallel shards",
    "chatglm-6b": "ChatGLM-6B, as released",
    "chatglm2": "ChatGLM2, ChatGLM3, CodeGeeX or GLM-4, as released",
    "hf-glm": "Hugging Face glm",
    "hf-glm4": "Hugging Face glm4",
    "hf-llama": "Hugging Face llama or qwen2",
    "gguf": "GGUF",
}


# -------------------------------------------------------------------- inspect


def inspect_options(p: argparse.ArgumentParser) -> None:
    text = "checkpoint folder, .gguf file or random:PRESET (default: the bundled model)"
    p.add_argument("model", nargs="?", help=text)
    p.add_argument("--adapter", metavar="DIR", help="a LoRA (PEFT) or P-Tuning v2 folder to put on top")
    p.epilog = "`openglm inspect prompt MODEL MESSAGES.json` shows a conversation as the model sees it."


def inspect_value(o: argparse.Namespace) -> dict[str, Any]:
    from openglm.loading import open_reference, resolve
    from openglm.model.cost import kv_bytes_per_token, n_parameters, parameters_by_part
    from openglm.presets import PRESETS
    from openglm.quant.random_model import open_random

    source = resolve(o.model)
    opened = open_random(source) if isinstance(source, str) else open_reference(source, o.adapter).opened
    config, meta, family = opened.config, opened.meta, opened.family
    n_bytes, dtypes = stored_bytes(opened)
    vision = opened.vision_bytes()
    same = [name for name, known in PRESETS.items() if known == config]
    return {
        "model": str(source),
        "family": family,
        "preset": same[0] if same else None,
        "parameters": n_parameters(config),
        "parameters_by_part": parameters_by_part(config),
        "precision": sorted(dtypes, key=lambda kind: -dtypes[kind]),
        "bytes_by_precision": dtypes,
        "weight_bytes": sum(n_bytes.values()),
        "weight_bytes_by_part": n_bytes,
        "adapters": [str(folder) for folder in opened.adapters],
        "prefix_tokens": 0 if opened.kv_prefix is None else opened.kv_prefix.shape[3],
        "vision_tensors": len(vision),
        "vision_bytes": sum(vision.values()),
        "context": config.max_seq_len,
        "kv_bytes_per_token": kv_bytes_per_token(config, 4.0 if list(dtypes) == ["float32"] else 2.0),
        "config": config.to_dict(),
        "tokenizer": meta.tokenizer,
        "special_ids": meta.special_ids,
        "stop_ids": list(meta.stop_ids),
        "chat_format": meta.chat_format,
        "generation": meta.generation,
        "description": meta.description,
    }


def inspect_print(value: dict[str, Any]) -> None:
    config = value["config"]
    mask = "prefix (context before <sop> is seen in both directions)" if config["mask"] == "prefix" else "causal"
    names = {i: name for name, i in value["special_ids"].items()}
    rows = [
        ("model", value["model"]),
        ("family", FAMILY_NAMES[value["family"]]),
        ("shape", f"{value['preset'] or 'of its own'}: {config['n_layers']} layers, dim {config['dim']}, "
                  f"{config['n_heads']} heads ({config['n_kv_heads']} of keys and values) of {config['head_dim']}, "
                  f"mlp {config['ffn_dim']}, vocabulary {config['vocab_size']:,}"),
        ("block", f"{config['norm']} norm{' (sandwich)' if config['sandwich'] else ''}, {config['residual']} residual, "
                  f"{config['mlp']}, {_positions(config)}"),
        ("mask", mask),
        ("context", f"{value['context']:,} tokens, {_size(value['kv_bytes_per_token'])} of cache each"),
        ("parameters", f"{value['parameters']:,}"),
        ("precision", ", ".join(f"{kind} {_size(value['bytes_by_precision'][kind])}" for kind in value["precision"])),
        ("bytes", f"{_size(value['weight_bytes'])}: " + ", ".join(
            f"{part} {_size(n)}" for part, n in value["weight_bytes_by_part"].items() if n)),
        *[("adapter", f"LoRA of {folder}, added to the weights as they are read") for folder in value["adapters"]],
        *[("adapter", f"P-Tuning v2 prefix of {value['prefix_tokens']} tokens")
          for _ in range(value["prefix_tokens"] > 0)],
        *[("vision", f"{value['vision_tensors']} tensors, {_size(value['vision_bytes'])}, which are not loaded")
          for _ in range(value["vision_tensors"] > 0)],
        ("tokenizer", value["tokenizer"] or "none: takes token ids only"),
        ("stop ids", " ".join(f"{i}={names.get(i, '?')}" for i in value["stop_ids"]) or "none"),
        ("chat format", value["chat_format"] or "none: not tuned for chat"),
        ("generation", json.dumps(value["generation"])),
        ("trained", json.dumps(value["description"], ensure_ascii=False)),
    ]  # fmt: skip
    for name, text in rows:
        print(f"{name:<12} {text}")


def _positions(config: dict[str, Any]) -> str:
    rope = config["rope"]
    if config["positions"] == "learned":
        return "two tables of learned positions"
    scaling = {"divided positions": "position_scale", "YaRN": "yarn_factor", "Llama 3.1's scaling": "llama3_factor"}
    scaled = [f", {name} by {rope[field]:g}" for name, field in scaling.items() if rope[field] > 1]
    return f"{rope['axes']}-axis rope over {rope['fraction']:g} of a head, base {rope['theta']:g}{''.join(scaled)}"


def stored_bytes(opened: OpenedModel) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes by part, bytes by type) of a checkpoint's tensors, from its headers alone."""
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "norm": 0, "head": 0}
    kinds: dict[str, int] = {}
    for name, kind, n_bytes in opened.stored():
        parts[_part(name)] += n_bytes
        kinds[kind] = kinds.get(kind, 0) + n_bytes
    return parts, kinds


def _part(name: str) -> str:
    """Which part a tensor of ours belongs to."""
    for mark, part in ((".attn.", "attention"), (".mlp.", "mlp"), ("embed", "embedding"), ("head.", "head")):
        if mark in name:
            return part
    return "norm"


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError


# -------------------------------------------------------------------- inspect prompt


def prompt_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", nargs="?", help="checkpoint folder or .gguf file (default: the bundled model)")
    p.add_argument("messages", metavar="MESSAGES.json", help="a list of messages, or an object with messages and tools")


def prompt_value(o: argparse.Namespace) -> dict[str, Any]:
    from openglm.model.batch import prompt_layout

    messages, tools = _read_messages(Path(o.messages))
    found = _text_side(o.model)
    tokenizer, chat_format = found.tokenizer, found.chat_format
    if tokenizer is None or chat_format is None:
        raise ValueError(f"{found.opened.path} has no chat format: it was not tuned for chat")
    rendered = chat_format.render(messages, tools, messages[-1].role != "assistant")
    layout = prompt_layout(rendered.ids, found.opened.config, found.meta.special_ids)
    return {
        "ids": list(rendered.ids),
        "tokens": [tokenizer.decode([i], skip_special=False) for i in rendered.ids],
        "special": [i in set(tokenizer.special_ids.values()) for i in rendered.ids],
        "loss_mask": list(rendered.loss_mask),
        "positions": layout.positions(0, len(rendered.ids)).tolist(),
        "n_context": layout.n_context,
        "chat_format": found.meta.chat_format,
    }


def _text_side(model: str | None) -> Reference:
    """Tokenizer and chat format of a checkpoint that has them."""
    from openglm.loading import open_reference, resolve

    source = resolve(model)
    if isinstance(source, str):
        raise ValueError(f"{source} has no tokenizer: give a checkpoint")
    found = open_reference(source)
    if found.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer: put its tokenizer files beside the weights")
    return found


def _read_messages(path: Path) -> tuple[list[Any], list[Any]]:
    from openglm.types import Message, ToolSpec

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    tools: Any = value.get("tools") or [] if isinstance(value, dict) else []
    value = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(value, list) or not value or not isinstance(tools, list):
        raise ValueError(f"{path} must hold a list of messages, or an object with messages and tools")
    return [Message.from_dict(m, f"messages[{i}]") for i, m in enumerate(value)], [ToolSpec.from_dict(t) for t in tools]


def prompt_print(value: dict[str, Any]) -> None:
    paint = _painter()
    print(f"{'#':>5} {'id':>7} {'position':>9} {'':8} token")
    for i, (token_id, token, special, target) in enumerate(
        zip(value["ids"], value["tokens"], value["special"], value["loss_mask"], strict=True)
    ):
        position = "/".join(str(row[i]) for row in value["positions"])
        role = "target" if target else "context" if i < value["n_context"] else ""
        text = token if special else repr(token)
        colour = "35" if special else "32" if target else "36" if i < value["n_context"] else ""
        print(f"{i:>5} {token_id:>7} {position:>9} {role:8} {paint(text, colour)}")
    n_targets = sum(value["loss_mask"])
    print(f"{len(value['ids'])} tokens, {n_targets} training targets, {value['n_context']} of two-way context, "
          f"format {value['chat_format']}")  # fmt: skip


def _painter() -> Any:
    colours = (sys.stdout.isatty() and "NO_COLOR" not in os.environ) or "FORCE_COLOR" in os.environ
    return lambda text, code: f"\x1b[{code}m{text}\x1b[0m" if colours and code else text


# -------------------------------------------------------------------- doctor


def doctor_options(p: argparse.ArgumentParser) -> None:
    pass


def doctor_value(o: argparse.Namespace) -> dict[str, Any]:
    from openglm import __version__

    return {
        "openglm": __version__,
        "python": sys.version.split()[0],
        "torch": _torch_facts(),
        "cpu": _cpu_facts(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "native": _native_facts(),
        "compiler": next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None),
        "bundled_model": _bundled_fact(),
        "extras": {name: {"present": _present(name), "gives": gives} for name, gives in EXTRAS.items()},
    }


def doctor_print(value: dict[str, Any]) -> None:
    torch, cpu = value["torch"], value["cpu"]
    gpus = ", ".join(torch["gpus"]) or "no GPU"
    rows = [
        ("openglm", f"{value['openglm']}, Python {value['python']}"),
        ("torch", f"{torch['version']}, {gpus}" if torch["version"] else "missing: pip install torch"),
        ("cpu", ", ".join([cpu["model"], _count(cpu["cores"], "core"), _count(torch["threads"], "thread"),
                           " ".join(cpu["features"])])),
        ("memory", _size(value["memory_bytes"])),
        ("native", f"{value['native']['isa']} kernels on {_count(value['native']['threads'], 'thread')}"
         if value["native"]["available"] else "not built: PyTorch's operators run instead, several times slower"),
        ("compiler", value["compiler"] or "none: a C++ compiler is needed for native kernels only"),
        ("model", value["bundled_model"]),
    ]
    for name, entry in value["extras"].items():
        rows.append((name, ("present" if entry["present"] else "absent ") + f"  {entry['gives']}"))
    for name, text in rows:
        print(f"{name:<12} {text}")


def _native_facts() -> dict[str, Any]:
    try:
        from openglm.ops.native import describe
    except ImportError:  # no torch
        return {"available": False}
    return describe()


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _present(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _torch_facts() -> dict[str, Any]:
    try:
        version = importlib.metadata.version("torch")
        import torch
    except (importlib.metadata.PackageNotFoundError, ImportError):
        return {"version": None, "gpus": [], "threads": 0}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"version": version, "gpus": gpus, "threads": torch.get_num_threads()}


def _cpu_facts() -> dict[str, Any]:
    import platform

    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, text = line.partition(":")
            if key.strip() == "model name":
                model = text.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(text.split())
    except OSError:
        pass  # not Linux: the name is all there is
    return {"model": model, "cores": os.cpu_count(), "features": [f for f in CPU_FEATURES if f in flags]}


def _bundled_fact() -> str:
    try:
        from openglm.loading import resolve
        from openglm.model.checkpoint import verify_manifest

        folder = Path(resolve(None))
        verify_manifest(folder)
        return "bundled model is intact"
    except (ValueError, ImportError) as error:
        return f"bundled model: {error}"


# -------------------------------------------------------------------- data check


def check_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE", help="chat examples, text, or a folder of token shards")
    p.add_argument("--model", metavar="M", help="checkpoint that it is for (default: the bundled model)")
    p.add_argument("--limit", type=int, default=3, metavar="N", help="examples to show (default: 3)")


def check_value(o: argparse.Namespace) -> dict[str, Any]:
    from openglm.data.check import collect

    found = _text_side(o.model)
    assert found.tokenizer is not None
    return collect(o.file, found.tokenizer, found.chat_format, found.opened.config, o.limit)


def check_print(value: dict[str, Any]) -> None:
    from openglm.data.check import show

    show(value)
