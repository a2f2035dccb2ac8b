"""ServeConfig: everything that may be set about a server, in one frozen description."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from openglm.agent.events import AgentConfig
from openglm.agent.toolbox import ToolboxConfig
from openglm.engine.options import EngineOptions

__all__ = ["ServeConfig"]

LOOPBACK_NAMES = ("localhost", "ip6-localhost")
MAX_GRACE_S = 86_400
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@]+")  # as browsers send it


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """name: of the model, as clients give it; None: the last part of its reference.

    api_keys: any of them opens the server; none: it is open. requests_per_minute, concurrency: for each key (without
    keys: for each address); 0: no limit. max_queue: requests that may wait for a place in the engine, beyond which the
    answer is 429. max_body_bytes: of a request. max_tokens: of an answer that asks for no other number; None: what the
    context leaves. cors_origins: web pages of other origins that may call; "*": all. allowed_hosts: names under which
    an open server on this machine may be called, besides its own (so that no web page reaches it by a name of its
    own). grace_s: how long running answers may take when the server stops. stall_s: a reader that takes nothing for so
    long is dropped. max_image_queue: requests for pictures that may wait while one is drawn. toolbox: the tools that
    the server runs itself; None: none. agent: their limits and rules. trace_dir: gets a trace of each request that uses
    them.
    """

    host: str = "127.0.0.1"
    name: str | None = None
    api_keys: tuple[str, ...] = ()
    requests_per_minute: int = 0
    concurrency: int = 0
    max_queue: int = 256
    max_body_bytes: int = 8 << 20
    max_tokens: int | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    grace_s: float = 60.0
    stall_s: float = 60.0
    max_image_queue: int = 8
    engine: EngineOptions = field(default_factory=EngineOptions)
    toolbox: ToolboxConfig | None = None
    agent: AgentConfig = field(default_factory=AgentConfig)
    trace_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "concurrency", "max_queue", "max_image_queue"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.grace_s <= MAX_GRACE_S:
            raise ValueError(f"grace_s must be 0 to {MAX_GRACE_S} s, not {self.grace_s}")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"a web origin is * or scheme://name[:port], without a path; not {origin!r}")
        if self.max_body_bytes < 1024:
            raise ValueError(f"max_body_bytes must be at least 1024, not {self.max_body_bytes}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not all(key and key.isascii() and key.isprintable() and " " not in key for key in self.api_keys):
            raise ValueError("an API key must be printable ASCII without blanks, and not empty")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host in LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
