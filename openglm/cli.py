"""The command line: `openglm VERB ...`. Every import of a verb's machinery is lazy, so that --help answers at once.

    python -m openglm --help

Exit codes: 0 done, 2 the user's mistake (one line: cause, remedy), 1 our fault, 130 interrupted. With --json the last
line of stdout is one JSON object; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openglm.cli_options import (
    Parser,
    answer_limits,
    answer_options,
    clean,
    common_options,
    load_model,
    model_option,
    parse_ids,
    place_options,
    print_json,
    read_text,
    sampling,
    sampling_options,
)
from openglm.config import nearest

__all__ = ["COMMANDS", "Command", "main"]

SOURCES = "txt, md, jsonl[.zst|.gz], parquet, or a hub data set id"
FIELD = "field of jsonl and parquet rows that holds the text (default: text)"
USER_ERRORS = (
    ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError,
    FloatingPointError,  # of damaged weights, or a type too small for them
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """help: one line. options: adds them to a parser. run: does the work; its result is the exit code."""

    help: str
    options: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], int]


# -------------------------------------------------------------------- text in, text out


def _generate_options(p: Parser) -> None:
    model_option(p)
    prompt = p.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--tokens", metavar="IDS", help="token ids to continue as they are, such as 1,2,3")
    answer_options(p)
    sampling_options(p, "256", "the checkpoint's")
    place_options(p)
    common_options(p)


def _generate(o: argparse.Namespace) -> int:
    params = sampling(o) | answer_limits(o)
    stream = load_model(o).stream_text(parse_ids(o.tokens) if o.prompt is None else clean(o.prompt), **params)
    for piece in stream:
        if not o.json:
            print(piece, end="", flush=True)
    result = stream.result()
    if o.json:
        reason = result.finish_reason
        print_json({"text": str(result), "token_ids": list(result.token_ids), "finish_reason": reason})
    else:
        print("" if result or o.prompt is not None else ",".join(map(str, result.token_ids)))
    return 0


def _fill_options(p: Parser) -> None:
    model_option(p)
    p.add_argument("--prompt", metavar="TEXT", required=True, help="text with [MASK], [sMASK] or [gMASK] in it")
    p.add_argument("--beams", type=int, default=1, metavar="N", help="beam search of this width (default: 1, greedy)")
    p.add_argument("--length-penalty", type=float, default=0.7, metavar="L", help="beams: above 0 favours long answers")
    p.add_argument("--no-repeat-ngram", type=int, default=3, metavar="N", help="beams: no n-gram twice; 0 is off")
    p.add_argument("--min-new-tokens", type=int, default=1, metavar="N", help="beams: shortest answer")
    sampling_options(p, "64 for each blank", "0")
    place_options(p)
    common_options(p)


def _fill(o: argparse.Namespace) -> int:
    result = load_model(o).fill(
        clean(o.prompt), o.beams, o.length_penalty, o.no_repeat_ngram, o.min_new_tokens, **sampling(o)
    )
    if o.json:
        candidates = [[{"text": text, "score": value} for text, value in blank] for blank in result.candidates]
        reasons = list(result.finish_reasons)
        print_json(
            {"text": result.text, "blanks": list(result.blanks), "candidates": candidates, "finish_reasons": reasons}
        )
        return 0
    print(result.text)
    if o.beams > 1:
        for number, blank in enumerate(result.candidates, 1):
            for text, value in blank:
                print(f"blank {number}  {value:9.3f}  {text!r}", file=sys.stderr)
    return 0


def _chat_options(p: Parser) -> None:
    from openglm.cli_agent import chat_options

    chat_options(p)


def _chat(o: argparse.Namespace) -> int:
    from openglm.cli_agent import chat

    return chat(o)


def _replay_options(p: Parser) -> None:
    from openglm.cli_replay import replay_options

    replay_options(p)


def _replay(o: argparse.Namespace) -> int:
    from openglm.cli_replay import replay

    return replay(o)


def _serve_options(p: Parser) -> None:
    from openglm.cli_serve import serve_options

    serve_options(p)


def _serve(o: argparse.Namespace) -> int:
    from openglm.cli_serve import serve

    return serve(o)


def _mcp_options(p: Parser) -> None:
    from openglm.cli_tools import mcp_options

    mcp_options(p)
    common_options(p, json_output=False)


def _mcp(o: argparse.Namespace) -> int:
    from openglm.cli_tools import mcp_serve

    return mcp_serve(o)


# -------------------------------------------------------------------- scores


def _logits_options(p: Parser) -> None:
    model_option(p)
    p.add_argument("--tokens", required=True, metavar="IDS", help="token ids, such as 1,2,3")
    p.add_argument("--out", required=True, metavar="FILE.npy", help="where to write the (T, vocabulary) float32 array")
    place_options(p)
    common_options(p)


def _logits(o: argparse.Namespace) -> int:
    import numpy as np

    ids, out = parse_ids(o.tokens), Path(o.out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    array = load_model(o, "float32").logits(ids)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    if o.json:
        print_json({"out": str(out), "shape": list(array.shape)})
    return 0


def _perplexity_options(p: Parser) -> None:
    model_option(p)
    p.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    p.add_argument("--window", type=int, default=1024, metavar="N", help="tokens seen at once (at most the context)")
    p.add_argument("--stride", type=int, default=512, metavar="N", help="tokens from one window to the next")
    place_options(p)
    common_options(p)


def _perplexity(o: argparse.Namespace) -> int:
    import math

    result = load_model(o).perplexity(read_text(o.text), o.window, o.stride)
    if o.json:
        print_json(result)
    else:
        perplexity = math.exp(min(result["nll_per_token"], 700.0))
        print(f"tokens {result['tokens']}  nll per token {result['nll_per_token']:.4f}  perplexity {perplexity:.2f}  "
              f"bits per byte {result['bits_per_byte']:.4f}")  # fmt: skip
    return 0


# -------------------------------------------------------------------- data and training


def _train_options(p: Parser) -> None:
    p.add_argument("config", metavar="RUN.yaml", help="run config; runs/ holds examples")
    p.add_argument("overrides", nargs="*", metavar="a.b=c", help="change single keys of it, such as optimizer.lr=1e-3")
    p.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="which checkpoint to continue from")
    common_options(p)


def _train(o: argparse.Namespace) -> int:
    from openglm.cli_train import train

    result = train(o.config, o.overrides, o.resume)
    if o.json:
        model = None if result.model_dir is None else str(result.model_dir)
        print_json({"run_dir": str(result.run_dir), "model_dir": model, "finished": result.finished,
                     "step": result.step, "tokens": result.tokens, "loss": result.loss, "eval": result.eval,
                     "seconds": result.seconds})  # fmt: skip
    elif result.model_dir is not None:
        print(f"model: {result.model_dir}")
    return 0


def _prepare_options(p: Parser) -> None:
    p.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCES)
    p.add_argument("--tokenizer", metavar="T", help="tokenizer folder (default: the bundled model's)")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of token shards to write or continue")
    p.add_argument("--field", default="text", help=FIELD)
    p.add_argument("--workers", type=int, metavar="N", help="encoding threads (default: all cores)")
    common_options(p)


def _prepare(o: argparse.Namespace) -> int:
    from openglm.data.prepare import prepare

    tokenizer = o.tokenizer
    if tokenizer is None:
        from openglm.loading import resolve

        tokenizer = resolve(None)
    data = prepare(o.sources, tokenizer, o.out, workers=o.workers, field=o.field)
    if o.json:
        print_json({"out": o.out, "documents": data.n_documents, "tokens": data.n_tokens})
    else:
        print(f"{o.out}: {data.n_documents:,} documents, {data.n_tokens:,} tokens")
    return 0


def _tokenizer_options(p: Parser) -> None:
    p.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCES)
    p.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of ids, specials included")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    p.add_argument("--field", default="text", help=FIELD)
    p.add_argument("--sample-bytes", type=int, metavar="N", help="read only about the first N bytes of each file")
    common_options(p)


def _tokenizer_train(o: argparse.Namespace) -> int:
    from openglm.data.prepare import train_tokenizer

    tokenizer = train_tokenizer(o.sources, o.vocab_size, o.out, sample_bytes=o.sample_bytes, field=o.field)
    if o.json:
        print_json({"out": o.out, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint})
    else:
        print(f"{o.out}: {tokenizer.vocab_size:,} ids")
    return 0


def _lazy(name: str, module: str) -> tuple[Callable[[Parser], None], Callable[[argparse.Namespace], int]]:
    """Options and runner of a verb in a module of its own, imported when it is used."""

    def part(kind: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"openglm.{module}"), f"{name}_{kind}")

    def options(p: Parser) -> None:
        part("options")(p)
        common_options(p)

    def run(o: argparse.Namespace) -> int:
        value = part("value")(o)
        if o.json:
            print_json(value)
        else:
            part("print")(value)
        return 0

    return options, run


COMMANDS: dict[str, Command] = {
    "chat": Command("talk to a model in the terminal", _chat_options, _chat),
    "serve": Command("answer OpenAI's protocol and show a chat page", _serve_options, _serve),
    "replay": Command("run an agent's trace again, without a model, and compare", _replay_options, _replay),
    "generate": Command("continue a text", _generate_options, _generate),
    "fill": Command("fill the blanks of a text", _fill_options, _fill),
    "logits": Command("write a model's logits for given token ids", _logits_options, _logits),
    "perplexity": Command("measure how well a model predicts a text", _perplexity_options, _perplexity),
    "eval": Command("measure what a model can do", *_lazy("eval", "cli_eval")),
    "train": Command("train as a run config says", _train_options, _train),
    "data prepare": Command("turn text into token shards", _prepare_options, _prepare),
    "data check": Command("show examples as the model is trained on them", *_lazy("check", "cli_inspect")),
    "tokenizer train": Command("train a tokenizer", _tokenizer_options, _tokenizer_train),
    "inspect": Command("show what a model is, without loading its weights", *_lazy("inspect", "cli_inspect")),
    "inspect prompt": Command("show a conversation as the model sees it", *_lazy("prompt", "cli_inspect")),
    "plan": Command("say whether a model fits on given devices, and how fast it can be", *_lazy("plan", "cli_plan")),
    "bench generate": Command("measure how fast a model answers on this machine", *_lazy("generate", "cli_bench")),
    "bench serve": Command("load a server with many clients", *_lazy("bench_serve", "cli_serve")),
    "bench train": Command("measure how fast training is on this machine", *_lazy("train", "cli_bench")),
    "convert": Command("write a checkpoint in another form", *_lazy("convert", "cli_convert")),
    "tools": Command(
        "list the tools of an agent: which are ready, and why not the others", *_lazy("tools", "cli_tools")
    ),
    "mcp": Command("offer the tools of an agent to other programs, as an MCP server", _mcp_options, _mcp),
    "doctor": Command("show what this machine and installation can do", *_lazy("doctor", "cli_inspect")),
}


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    head = ["usage: openglm VERB ...", "", "The GLM language models: train, run, inspect.", "", "verbs:"]
    return "\n".join([*head, *lines, "", "openglm VERB --help shows the options of a verb."])


def _find(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """(verb, its arguments). A second word belongs to the verb where the two make one."""
    two = " ".join(argv[:2])
    if two in COMMANDS and len(argv) > 1:
        return two, argv[2:]
    if argv[0] in COMMANDS:
        return argv[0], argv[1:]
    group = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if group:
        given = "" if len(argv) < 2 else f"unknown verb {two!r}; "
        raise ValueError(f"{given}{argv[0]} needs one of: {', '.join(name.split()[1] for name in group)}")
    words = list(dict.fromkeys([*COMMANDS, *(name.split()[0] for name in COMMANDS)]))
    raise ValueError(f"unknown verb {argv[0]!r}{nearest(argv[0], words)}; openglm --help lists them")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(usage())
            return 0 if argv else 2
        if argv[0] == "--version":
            from openglm import __version__

            print(f"openglm {__version__}")
            return 0
        name, rest = _find(argv)
        parser = Parser(f"openglm {name}", COMMANDS[name].help)
        COMMANDS[name].options(parser)
        return COMMANDS[name].run(parser.parse(rest))
    except SystemExit as leave:  # argparse after --help
        return int(leave.code or 0)
    except BrokenPipeError:  # `openglm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print("openglm: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            import traceback

            traceback.print_exc()
        mistake = isinstance(error, USER_ERRORS)
        print(f"openglm: error: {_one_line(error, mistake)}", file=sys.stderr)
        return 2 if mistake else 1


def _one_line(error: Exception, mistake: bool) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = " ".join(str(error).split())
    return text if mistake else f"{type(error).__name__}: {text} (--debug shows where)"
