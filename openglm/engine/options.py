"""EngineOptions: how many requests run at once and how large their pool of keys and values is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from openglm.config import GLMConfig

__all__ = ["EngineOptions", "check_pool", "default_pool_tokens"]

_SHARE = {"cpu": 0.25, "cuda": 0.5}  # of the free memory, where the context of all requests would not fit


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """n_parallel: requests that run at once; more wait.

    step_tokens: tokens of one pass. A longer prompt runs in pieces between the tokens of the others.
    pool_tokens: tokens whose keys and values are held, over all requests; None: n_parallel full contexts, or a part of
    the free memory if that is less. page_size: tokens of a page. kv_dtype: float32, float16, bfloat16 or int8; None:
    the model's. prefix_cache: keep what was computed for later prompts that begin alike (causal models).
    """

    n_parallel: int = 32
    step_tokens: int = 512
    pool_tokens: int | None = None
    page_size: int = 16
    kv_dtype: str | None = None
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("n_parallel", "step_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.step_tokens < self.n_parallel:
            raise ValueError(
                f"step_tokens ({self.step_tokens}) must hold a token of each of {self.n_parallel} requests"
            )
        if self.pool_tokens is not None and self.pool_tokens < self.page_size:
            raise ValueError(f"pool_tokens ({self.pool_tokens}) must hold at least a page of {self.page_size} tokens")


def default_pool_tokens(config: GLMConfig, bytes_per_token: int, device: torch.device, options: EngineOptions) -> int:
    """Tokens for a pool whose size was not given."""
    wanted = options.n_parallel * config.max_seq_len
    memory = _free_memory(device)
    if memory is None:
        return wanted
    affordable = int(memory * _SHARE[device.type]) // bytes_per_token
    return max(min(wanted, affordable), options.page_size)


def check_pool(tokens: int, bytes_per_token: int, device: torch.device) -> None:
    """ValueError when a pool of that many tokens is larger than the free memory.

    A system that gives memory page by page would accept it, and end the process when the pool fills.
    """
    memory, wanted = _free_memory(device), tokens * bytes_per_token
    if memory is not None and wanted > memory:
        raise ValueError(
            f"a pool of {tokens} tokens needs {wanted / 2**30:.1f} GiB but {memory / 2**30:.1f} are free: "
            "lower pool_tokens, or try kv_dtype int8"
        )


def _free_memory(device: torch.device) -> int | None:
    """Bytes, or None where they cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
