"""Several replicas of the server behind Ray Serve, on one machine or on a cluster's.

    pip install 'openglm[serve,grammar,ray]'
    python deploy/ray_serve.py [M] --replicas 2                        # a Ray of its own, http://127.0.0.1:8000
    python deploy/ray_serve.py [M] --replicas 8 --gpus 1 --address auto  # the Ray that runs here

The options are those of `openglm serve`. One front takes every request: it checks the key, holds the limits of each key
for all replicas together, and hands the request to a replica. A conversation keeps its replica, so that the prefix
cache there knows what was said before: the choice is a consistent hash of how the conversation begins. Where that
replica has no place left or has died, the next on the ring answers. Tools that the server runs keep files and
variables in one process: they are not offered here.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Receive, Scope, Send

from openglm import __version__
from openglm.cli_agent_options import wants_agent
from openglm.cli_options import Parser, load_model, model_name
from openglm.cli_serve import serve_config, serve_options
from openglm.server.affinity import affinity
from openglm.server.app import POSTS, create_app
from openglm.server.config import ServeConfig
from openglm.server.errors import OUR_FAULT, ApiError, error_response
from openglm.server.files import MAX_FILE_BYTES
from openglm.server.limits import Gate, HostCheck, Lease, read_bytes
from openglm.server.metrics import CONTENT_TYPE
from openglm.server.service import Service, load_engine
from openglm.server.sse import DONE, sse

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
TRIES = 3  # replicas that a request is given to before it fails
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
          "headers", "client", "server")  # fmt: skip


# -------------------------------------------------------------------- a replica


class Replica:
    """One server: the whole application, with its model, in a process of its own."""

    def __init__(self, o: argparse.Namespace, config: ServeConfig) -> None:
        failures: list[Exception] = []
        self._name = serve.get_replica_context().replica_id.unique_id
        self._service = Service(
            lambda: load_engine(load_model(o), config), config, model_name(o.model), failures.append
        )  # fmt: skip
        self._failures = failures
        self._app = create_app(self._service)
        self._running: set[asyncio.Task[None]] = set()
        self._started: asyncio.Task[None] | None = None

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The application's own messages. Cancelled: the application hears that its client has gone."""
        await self._ready()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        bodies = [body]

        async def receive() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(dict(scope), receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    # Ray gives a request its number, which its logs have too.
                    headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                    message["headers"] = [*headers, (b"x-replica", self._name.encode())]
                yield message
        finally:
            gone.set()

    async def health(self) -> dict[str, Any]:
        await self._ready()
        return {"replica": self._name, "status": self._service.state, "live": self._service.n_live}

    async def metrics(self) -> tuple[str, str]:
        return self._name, self._service.metrics.text().decode()

    async def check_health(self) -> None:
        """Ray's own question; a replica that raises is replaced."""
        await self._ready()

    async def _ready(self) -> None:
        if self._started is None:
            self._started = asyncio.create_task(self._service.start())
        await asyncio.shield(self._started)
        if self._failures:
            raise self._failures[0]


# -------------------------------------------------------------------- the front


class Front:
    """Takes the requests: keys and limits here, answers from the replicas."""

    def __init__(self, replicas: DeploymentHandle, config: ServeConfig, name: str) -> None:
        self._replicas, self._config, self._name, self._gate = replicas, config, name, Gate(config)
        self._limits = {path: config.max_body_bytes for path, _, _ in POSTS}

    async def __call__(self, request: Request) -> Response:
        path, lease = request.url.path, Lease("", lambda: None)
        try:
            if request.method == "GET" and path == "/health":
                return Checked(await self._health(), self._config)
            if request.method == "GET" and path == "/metrics":
                self._gate.identify(request)
                return Checked(await self._metrics(), self._config)
            caller = ""
            if request.method == "POST" and path in self._limits:
                lease = self._gate.enter(request)
            elif path.startswith("/v1/files"):
                caller = self._gate.identify(request)
            body = await read_bytes(request, self._limits.get(path, MAX_FILE_BYTES + (1 << 16)))
        except ApiError as error:
            lease.release()
            return error_response(error, path)
        except BaseException:
            lease.release()
            raise
        wants = request.method == "POST" or path.startswith("/v1/files")
        return Relay(self._replicas, body, affinity(path, body, caller) if wants else "", lease)

    async def _health(self) -> Response:
        states = [state for state in await self._all("health") if isinstance(state, dict)]
        ready = [state for state in states if state["status"] == "ready"]
        value = {"status": "ready" if ready else "loading", "model": self._name, "version": __version__,
                 "live": sum(state["live"] for state in states), "replicas": states}  # fmt: skip
        return JSONResponse(value, 200 if ready else 503)

    async def _metrics(self) -> Response:
        """Every replica's figures, told apart by the label `replica`."""
        texts = [text for text in await self._all("metrics") if isinstance(text, tuple)]
        return Response(joined_metrics(texts), media_type=CONTENT_TYPE)

    async def _all(self, method: str) -> list[Any]:
        """What every replica says, or what went wrong there."""
        try:
            answers = self._replicas.broadcast(method)
            return await answers.results_async(timeout_s=10, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            return []  # there is no replica


class Checked(Response):
    """An answer of the front's own, which like the replicas' is given under names of this server alone."""

    def __init__(self, answer: Response, config: ServeConfig) -> None:
        super().__init__()
        self._answer = HostCheck(answer, config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


class Relay(Response):
    """An answer as a replica makes it. A replica that dies before it said anything is followed by another."""

    def __init__(self, replicas: DeploymentHandle, body: bytes, key: str, lease: Lease) -> None:
        super().__init__()
        # A request without a session goes to any replica.
        self._handle = replicas.options(method_name="answer", stream=True, session_id=key)
        self._sent, self._lease, self._begun, self._streams = body, lease, False, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = {name: scope[name] for name in _SCOPE if name in scope}
        try:
            for left in reversed(range(TRIES)):
                try:
                    return await self._relay(given, send)
                except BackPressureError:
                    text = "too many answers are being waited for: try again shortly"
                    error = ApiError(text, None, 429, "queue_full", {"Retry-After": "5"})
                except RayActorError:
                    error = ApiError("the replica that was answering has ended", None, 503, "replica_lost")
                    if left and not self._begun:
                        continue
                except DeploymentUnavailableError:
                    error = ApiError("no replica is running", None, 503, "not_loaded")
                except (RayError, RayServeException):
                    error = ApiError(OUR_FAULT, None, 500)
                return await self._fail(error, scope, receive, send)
        finally:
            self._lease.release()

    async def _relay(self, scope: dict[str, Any], send: Send) -> None:
        answer = self._handle.remote(scope, self._sent)
        try:
            async for message in answer:
                if message["type"] == "http.response.start":
                    self._streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
                self._begun = True
                await send(message)
        finally:
            answer.cancel()  # of an answer that has ended: nothing happens

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._begun:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if not self._streams:
            raise error
        anthropic = scope["path"].startswith("/v1/messages")
        last = sse(error.anthropic_body(), "error") if anthropic else sse(error.body()) + DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})


def joined_metrics(texts: Sequence[tuple[str, str]]) -> bytes:
    """One description for Prometheus of several. texts: (replica, its own)."""
    found: dict[str, Metric] = {}
    for replica, text in texts:
        for family in text_string_to_metric_families(text):
            whole = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]

    class Collected:
        def collect(self) -> list[Metric]:
            return list(found.values())

    registry = CollectorRegistry()
    registry.register(Collected())
    return generate_latest(registry)


# -------------------------------------------------------------------- the command


def application(o: argparse.Namespace) -> serve.Application:
    """Front and replicas, for serve.run. ValueError for options that do not hold here."""
    if wants_agent(o) or o.image_model is not None:
        raise ValueError("tools and pictures are not offered by replicas: openglm serve has them")
    config = serve_config(o)
    inner = dataclasses.replace(config, requests_per_minute=0, concurrency=0)  # the front holds these
    grace_s = max(config.grace_s, 1.0)
    replica = serve.deployment(
        Replica, name="Replica", num_replicas=o.replicas, max_ongoing_requests=o.parallel,
        max_queued_requests=o.max_queue or -1, graceful_shutdown_timeout_s=grace_s, health_check_period_s=5,
        ray_actor_options={"num_cpus": o.cpus, "num_gpus": o.gpus},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )  # fmt: skip
    front = serve.deployment(
        Front, name="Front", max_ongoing_requests=1 << 14, graceful_shutdown_timeout_s=grace_s,
        ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    return front.bind(replica.bind(o, inner), config, config.name or model_name(o.model))


def options(argv: Sequence[str]) -> argparse.Namespace:
    p = Parser("ray_serve.py", "Several replicas of the server behind Ray Serve.")
    serve_options(p)
    p.add_argument("--replicas", type=int, default=2, metavar="N", help="servers, each with the model (default: 2)")
    p.add_argument("--cpus", type=int, default=1, metavar="N", help="CPUs of each replica (default: 1)")
    p.add_argument("--gpus", type=float, default=0, metavar="N", help="GPUs of each replica (default: 0)")
    p.add_argument("--address", metavar="ADDRESS", help="of a Ray that runs; auto: this machine's (default: start one)")
    o = p.parse(argv)
    if o.replicas < 1 or o.cpus < 1 or o.gpus < 0:
        raise ValueError("--replicas and --cpus must be at least 1, and --gpus not below 0")
    o.threads = o.threads or o.cpus
    return o


def main(argv: Sequence[str]) -> int:
    o = options(argv)
    app = application(o)
    stop = threading.Event()
    cpus = None if o.address else max(o.replicas * o.cpus, os.cpu_count() or 1)
    ray.init(address=o.address, num_cpus=cpus, include_dashboard=None if o.address else False, log_to_driver=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # only now: ray.init sets its own
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": o.host, "port": o.port})
        serve.run(app, name="openglm", route_prefix="/")
        config = serve_config(o)
        if not config.is_loopback and not config.api_keys:
            print(f"openglm: warning: {o.host} can be reached from other machines WITHOUT an API key", file=sys.stderr)
        print(f"openglm: {o.replicas} replicas at http://{o.host}:{o.port}", file=sys.stderr, flush=True)
        stop.wait()
        serve.delete("openglm")  # lets running answers end; shutdown would cut them off
        serve.shutdown()
    except RuntimeError as error:  # Serve's, when replicas do not come up; the whole story is in its logs
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(lines[-1] if lines else "the replicas did not start") from None
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as problem:
        print(f"openglm: error: {problem}", file=sys.stderr)
        sys.exit(2)
