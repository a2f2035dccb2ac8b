"""`openglm serve`: the model behind OpenAI's protocol, with a chat page.

    python -m openglm serve --port 8000

serve_options adds the options of the verb, serve runs it.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

from openglm.cli_options import Parser, common_options, load_model, model_option, place_options

if TYPE_CHECKING:
    from openglm.server.config import ServeConfig

__all__ = ["serve", "serve_options"]

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
        return run(lambda: load_model(o), _config(o), _name_of(o.model), listener)


def _config(o: argparse.Namespace) -> ServeConfig:
    from openglm.engine.options import EngineOptions
    from openglm.server.config import ServeConfig

    keys = [*o.api_key, *os.environ.get(KEYS_VARIABLE, "").split()]
    if o.api_key_file:
        keys += Path(o.api_key_file).read_text(encoding="utf-8").split()
    return ServeConfig(
        host=o.host, name=o.name, api_keys=tuple(dict.fromkeys(keys)),
        requests_per_minute=o.requests_per_minute, concurrency=o.concurrency, max_queue=o.max_queue,
        max_body_bytes=o.max_body_mb << 20, max_tokens=o.max_tokens, cors_origins=tuple(o.cors),
        allowed_hosts=tuple(o.allow_host), grace_s=o.grace,
        engine=EngineOptions(n_parallel=o.parallel, pool_tokens=o.pool_tokens, kv_dtype=o.kv_dtype),
    )  # fmt: skip


def _name_of(reference: str | None) -> str:
    """random:glm-edge-1.5b?n_layers=2 -> glm-edge-1.5b, path/model.gguf -> model."""
    if reference is None:
        return "glm-nano"
    last = Path(reference.removeprefix("random:").partition("?")[0]).resolve()
    return last.stem if last.suffix == ".gguf" else last.name
