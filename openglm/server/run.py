"""Running the application: the socket opens at once, the model loads beside it, a signal lets answers finish.

serve(openglm.load, ServeConfig(), "glm-nano", listening("127.0.0.1", 8000))
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from openglm.server.app import create_app
from openglm.server.config import ServeConfig
from openglm.server.service import Service, load_engine

if TYPE_CHECKING:
    from openglm.agent.images import ImageBackend
    from openglm.chat import ChatModel

__all__ = ["serve"]


def _say(text: str) -> None:
    print(f"openglm: {text}", file=sys.stderr, flush=True)


class _Server(uvicorn.Server):
    """Says on the first signal what it still finishes; the second one cuts that off."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            _say("stopping at once")
            return
        self.should_exit = True
        n, grace_s = self._service.announce_stop(), self._service.config.grace_s
        more = "" if n == 0 else f", for at most {grace_s:.0f} s; once more stops at once"
        _say(f"finishing {n} running answer{'' if n == 1 else 's'}{more}")


def serve(
    load: Callable[[], ChatModel], config: ServeConfig, name: str, listener: socket.socket,
    images: ImageBackend | None = None,
) -> int:  # fmt: skip
    """Serve until a signal comes; the exit code. Raises what loading the model raised."""
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    service = Service(lambda: load_engine(load(), config), config, name, failed, images)
    logging.basicConfig(format="openglm: %(message)s", level=logging.WARNING)
    options = uvicorn.Config(
        create_app(service), log_level="warning", access_log=False,
        timeout_graceful_shutdown=int(config.grace_s) or 1, server_header=False, lifespan="on", ws="none",
    )  # fmt: skip
    server = _Server(options, service)
    with listener:
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        service.on_ready = lambda: _say(f"serving {service.name} at {address}")
        if not config.is_loopback:
            keys = "with an API key" if config.api_keys else "WITHOUT an API key (--api-key): anyone there may use it"
            _say(f"warning: {config.host} can be reached from other machines, {keys}")
        server.run([listener])
    if failures:
        raise failures[0]
    _say(f"stopped; {service.n_at_stop - service.n_cut} of {service.n_at_stop} running answers were finished")
    return 0
