"""Counters and histograms for Prometheus: what /metrics shows."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """One server's. stats: the engine's counters as `Engine.describe` last gave them."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.stats: dict[str, Any] = {}
        self.requests = Counter("openglm_requests", "HTTP requests answered", ["path", "status"], registry=r)
        self.seconds = Histogram("openglm_request_seconds", "whole requests", ["path"], buckets=_SECONDS, registry=r)
        self.first = Histogram(
            "openglm_time_to_first_token_seconds", "from a request's arrival to its first token, waiting included",
            buckets=_SECONDS, registry=r,
        )  # fmt: skip
        self.between = Histogram(
            "openglm_inter_token_seconds", "from one token of a request to the next", buckets=_SECONDS, registry=r
        )
        self.prompt_tokens = Counter("openglm_prompt_tokens", "tokens of prompts", registry=r)
        self.generated_tokens = Counter("openglm_generated_tokens", "tokens drawn", registry=r)
        self.tool_calls = Counter("openglm_tool_calls", "tool calls in answers", registry=r)
        self.finished = Counter("openglm_answers", "answers by how they ended", ["reason"], registry=r)
        for name, text, key in (
            ("openglm_running", "requests that the engine runs", "n_running"),
            ("openglm_waiting", "requests that wait for a place in the engine", "n_waiting"),
            ("openglm_kv_tokens_capacity", "tokens whose keys and values the pool can hold", "pool_tokens"),
            ("openglm_kv_bytes", "bytes of the pool of keys and values", "pool_bytes"),
            ("openglm_cache_hit_tokens", "prompt tokens that the prefix cache saved", "n_reused"),
            ("openglm_preemptions", "requests that had to give their pages back", "n_preemptions"),
            ("openglm_passes", "passes of the engine", "n_passes"),
            ("openglm_drafted_tokens", "tokens guessed ahead", "n_drafted"),
            ("openglm_accepted_tokens", "guesses that were right", "n_accepted"),
        ):
            Gauge(name, text, registry=r).set_function(lambda key=key: float(self.stats.get(key, 0)))  # type: ignore[misc]
        Gauge("openglm_kv_used", "part of the pool that holds keys and values of live requests, 0 to 1",
              registry=r).set_function(self._used)  # fmt: skip

    def _used(self) -> float:
        pages = self.stats.get("n_pages", 0)
        return (pages - self.stats["n_pages_free"]) / pages if pages else 0.0

    def text(self) -> bytes:
        return generate_latest(self.registry)
