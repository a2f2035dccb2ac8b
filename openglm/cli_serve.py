"""`openglm serve`: the model behind OpenAI's protocol, with a chat page. `openglm bench serve`: a load on it.

python -m openglm serve --port 8000
python -m openglm bench serve --clients 64 --seconds 30
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from openglm.cli_agent_options import agent_config, agent_options, wants_agent
from openglm.cli_options import Parser, common_options, load_model, model_name, model_option, place_options
from openglm.cli_tools import toolbox_config

if TYPE_CHECKING:
    from openglm.server.config import ServeConfig

__all__ = [
    "bench_serve_options", "bench_serve_print", "bench_serve_value", "serve", "serve_config", "serve_options",
]  # fmt: skip

KEYS_VARIABLE = "OPENGLM_API_KEY"


def serve_options(p: Parser) -> None:
    model_option(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    p.add_argument("--api-key", action="append", default=[], metavar="KEY",
                   help=f"clients must send one of these; may be given again (also: {KEYS_VARIABLE})")  # fmt: skip
    p.add_argument("--api-key-file", metavar="FILE", help="more keys, one a line")
    p.add_argument("--name", metavar="NAME", help="what clients call the model (default: the last part of its path)")
    p.add_argument(
        "--requests-per-minute", type=int, default=0, metavar="N", help="of each key or address; 0: no limit"
    )
    p.add_argument("--concurrency", type=int, default=0, metavar="N",
                   help="requests of each key or address that run at once; 0: no limit")  # fmt: skip
    p.add_argument("--parallel", type=int, default=32, metavar="N", help="answers written at once (default: 32)")
    p.add_argument("--max-queue", type=int, default=256, metavar="N", help="answers that may wait (default: 256)")
    p.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: what the context leaves)")
    p.add_argument("--max-body-mb", type=int, default=8, metavar="N", help="largest request in MiB (default: 8)")
    p.add_argument("--pool-tokens", type=int, metavar="N", help="tokens whose keys and values fit, over all answers")
    p.add_argument("--kv-dtype", metavar="T", help="of keys and values: float32, float16, bfloat16 or int8")
    p.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="web origin that may call; * for all")
    p.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="further name of this server")
    p.add_argument("--grace", type=float, default=60.0, metavar="S", help="seconds for running answers at the end")
    agent_options(p)
    place_options(p)
    common_options(p, json_output=False)


def serve(o: argparse.Namespace) -> int:
    from openglm.server.listen import listening

    with listening(o.host, o.port) as listener:
        gc.disable()  # what is imported stays: the collector need never walk it
        try:
            from openglm.server.run import serve as run
        except ModuleNotFoundError as error:
            raise ValueError(f"serving needs {error.name}: pip install 'openglm[serve]'") from None
        finally:
            gc.freeze()
            gc.enable()
        images = None
        if o.image_model is not None:
            from openglm.agent.images_open import open_images

            images = open_images(o.image_model, o.device)
        return run(lambda: load_model(o), serve_config(o), model_name(o.model), listener, images)


def serve_config(o: argparse.Namespace) -> ServeConfig:
    """What the options say. Raises ValueError for numbers and keys that cannot be."""
    from openglm.engine.options import EngineOptions
    from openglm.server.config import ServeConfig

    if o.max_body_mb < 1:
        raise ValueError(f"--max-body-mb must be at least 1, not {o.max_body_mb}")
    keys = [*o.api_key, *os.environ.get(KEYS_VARIABLE, "").split()]
    if o.api_key_file:
        keys += Path(o.api_key_file).read_text(encoding="utf-8").split()
    return ServeConfig(
        host=o.host, name=o.name, api_keys=tuple(dict.fromkeys(keys)),
        requests_per_minute=o.requests_per_minute, concurrency=o.concurrency, max_queue=o.max_queue,
        max_body_bytes=o.max_body_mb << 20, max_tokens=o.max_tokens, cors_origins=tuple(o.cors),
        allowed_hosts=tuple(o.allow_host), grace_s=o.grace,
        engine=EngineOptions(n_parallel=o.parallel, pool_tokens=o.pool_tokens, kv_dtype=o.kv_dtype),
        **_agent_settings(o),
    )  # fmt: skip


def _agent_settings(o: argparse.Namespace) -> dict[str, Any]:
    if not wants_agent(o):
        return {}
    trace_dir = None if o.trace in (None, "none") else Path(o.trace)
    return {"toolbox": toolbox_config(o, o.all_tools), "agent": agent_config(o), "trace_dir": trace_dir}


# -------------------------------------------------------------------- bench serve


def bench_serve_options(p: argparse.ArgumentParser) -> None:
    model_option(cast(Parser, p))
    p.add_argument("--url", metavar="URL", help="a server that runs, such as http://host:8000/v1 (default: start one)")
    p.add_argument("--api-key", default="", metavar="KEY", help="of that server")
    p.add_argument("--clients", type=int, default=64, metavar="N", help="that stream at once (default: 64)")
    p.add_argument("--seconds", type=float, default=30.0, metavar="S", help="length of the load (default: 30)")
    p.add_argument("--max-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    place_options(cast(Parser, p))


def bench_serve_value(o: argparse.Namespace) -> dict[str, Any]:
    """What --json prints: requests, requests_per_s, tokens_per_s (pieces of text), errors, first_error, different
    (answers that are not what was answered alone), ttft_p50_s, _p95_s, _p99_s and itl_... alike; url, clients, seconds.
    """
    from openglm.server.load_test import run_load

    if o.clients < 1 or o.max_tokens < 1 or o.seconds <= 0:
        raise ValueError("--clients and --max-tokens must be at least 1, and --seconds above 0")
    with _server(o) as url:
        load = asyncio.run(run_load(url, o.clients, o.seconds, o.max_tokens, key=o.api_key))
    return {"url": url, "clients": o.clients, "seconds": o.seconds, **load.summary()}


@contextmanager
def _server(o: argparse.Namespace) -> Iterator[str]:
    """The given one, or one of our own, which ends with the block."""
    if o.url:
        yield o.url.rstrip("/")
        return
    command = [sys.executable, "-m", "openglm", "serve", "--port", "0", "--max-queue", str(o.clients)]
    for name in ("adapter", "device", "dtype", "threads"):
        if getattr(o, name) is not None:
            command += [f"--{name}", str(getattr(o, name))]
    process = subprocess.Popen([*command, *([o.model] if o.model else [])], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = ""
        for line in process.stderr:
            if line.startswith("openglm: serving ") and " at http" in line:
                yield line.rsplit(" at ", 1)[1].strip() + "/v1"
                return
        raise ValueError(line.strip().removeprefix("openglm: error: ") or "the server did not start")
    finally:
        process.terminate()
        process.communicate()


def bench_serve_print(value: dict[str, Any]) -> None:
    print(
        f"{value['requests']} requests of {value['clients']} clients, {value['requests_per_s']:.2f}/s, "
        f"{value['tokens_per_s']:.1f} pieces/s; errors {value['errors']}, different {value['different']}"
    )
    for kind, text in (("ttft", "to the first piece"), ("itl", "from piece to piece")):
        print(f"  {text}: " + ", ".join(f"{q} {value[f'{kind}_{q}_s']:.3f} s" for q in ("p50", "p95", "p99")))
    if value["first_error"]:
        print(f"  first error: {value['first_error']}")
