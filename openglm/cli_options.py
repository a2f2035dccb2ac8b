"""What the verbs of the command line share: the parser, common options, and how they are read."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from openglm.config import nearest
from openglm.types import Grammar, SamplingParams

if TYPE_CHECKING:
    from openglm.chat import ChatModel

__all__ = [
    "Parser", "answer_limits", "answer_options", "clean", "common_options", "load_model", "model_name", "model_option",
    "parse_ids", "place_options", "print_json", "read_text", "sampling", "sampling_options",
]  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, nearest option named."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        known = [o for action in self._actions for o in action.option_strings]
        for word in argv[: argv.index("--") if "--" in argv else None]:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known and " " not in name:
                self.error(f"unknown option {name}{nearest(name, known)}")
        options, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return options


def common_options(p: Parser, json_output: bool = True) -> None:
    if json_output:
        p.add_argument("--json", action="store_true", help="last line of stdout is one JSON object")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")


def place_options(p: Parser) -> None:
    p.add_argument("--device", default="auto", help="auto (a GPU where present), cpu, cuda, cuda:1")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored on a GPU, float32 on a CPU)")
    p.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def model_option(p: Parser) -> None:
    text = "checkpoint folder, .gguf file, or random:PRESET[?quantize=int4] (default: the bundled model)"
    p.add_argument("model", nargs="?", help=text)
    p.add_argument("--adapter", metavar="DIR", help="a LoRA (PEFT) or P-Tuning v2 folder to put on top")


def sampling_options(p: Parser, max_new_tokens: str, temperature: str) -> None:
    p.add_argument("--max-new-tokens", type=int, metavar="N", help=f"longest answer (default: {max_new_tokens})")
    p.add_argument("--temperature", type=float, metavar="T", help=f"0 is greedy (default: {temperature})")
    p.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0 is off")
    p.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this total; 1 is off")
    p.add_argument("--min-p", type=float, metavar="P", help="leave out tokens below P times the likeliest; 0 is off")
    p.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 makes repeating less likely")
    p.add_argument("--seed", type=int, metavar="S", help="same seed, same text (default: a fresh one)")


SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def sampling(o: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(o, name) for name in SAMPLING if getattr(o, name) is not None}


def answer_options(p: Parser) -> None:
    """What ends an answer and what it must look like; `answer_limits` reads them."""
    p.add_argument("--stop", action="append", metavar="TEXT", help="end in front of this text; may be given repeatedly")
    held = p.add_mutually_exclusive_group()
    held.add_argument("--json-schema", metavar="FILE|JSON", help="hold the answer to a JSON schema")
    held.add_argument("--regex", metavar="PATTERN", help="hold the whole answer to a regular expression")


def answer_limits(o: argparse.Namespace) -> dict[str, Any]:
    """Fields of SamplingParams, checked before any model is loaded: ValueError naming what is wrong."""
    limits: dict[str, Any] = {} if o.stop is None else {"stop_strings": tuple(map(clean, o.stop))}
    if o.json_schema is not None or o.regex is not None:
        from openglm.engine.grammar import check_grammar

        limits["grammar"] = _grammar(o)
        check_grammar(limits["grammar"])
    SamplingParams(**limits)
    return limits


def _grammar(o: argparse.Namespace) -> Grammar:
    if o.regex is not None:
        return Grammar("regex", clean(o.regex))
    inline = o.json_schema.lstrip().startswith("{")
    return Grammar("json_schema", clean(o.json_schema) if inline else read_text(o.json_schema))


def model_name(reference: str | None) -> str:
    """What a model is called: random:glm-edge-1.5b?n_layers=2 -> glm-edge-1.5b, path/model.gguf -> model."""
    if reference is None:
        return "glm-nano"
    last = Path(reference.removeprefix("random:").partition("?")[0]).resolve()
    return last.stem if last.suffix == ".gguf" else last.name


def load_model(o: argparse.Namespace, dtype: str | None = None) -> ChatModel:
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    from openglm.chat import ChatModel

    if first:  # half a million objects came with torch, to stay: the collector need never walk them
        gc.freeze()
        gc.enable()
    if o.threads is not None:
        import torch

        from openglm.ops.native import set_threads

        if o.threads < 1:
            raise ValueError(f"--threads must be at least 1, not {o.threads}")
        torch.set_num_threads(o.threads)
        set_threads(o.threads)
    return ChatModel.load(o.model, o.device, o.dtype or dtype, o.adapter)


def parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--tokens wants ids such as 1,2,3, not {text!r}") from None


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def clean(text: str) -> str:
    """Bytes of the command line that are no UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_text(name: str) -> str:
    """A UTF-8 file. Raises ValueError for another encoding and for one without text."""
    data = Path(name).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}): convert it first, such as with iconv") from None
    if not text.strip():
        raise ValueError(f"{name} is empty: give a text")
    return text
