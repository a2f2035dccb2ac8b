"""Encoding threads: each has its own copy of the tokenizer and encodes whole batches without the interpreter's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from types import TracebackType
from typing import Any

import numpy as np

from openglm.tokenizer import Tokenizer

PARALLELISM = "TOKENIZERS_PARALLELISM"


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class EncoderPool:
    """Use as a context manager. One tokenizer per thread, since threads that share one wait for its word cache."""

    def __init__(self, tokenizer: Tokenizer, workers: int, dtype: np.dtype[Any]) -> None:
        self._files = tokenizer.files
        self._dtype = dtype
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")

    def __enter__(self) -> EncoderPool:
        # The library would spread each batch over all cores; here every thread is to stay on one.
        self._before = os.environ.get(PARALLELISM)
        os.environ[PARALLELISM] = "false"
        return self

    def submit(self, texts: Sequence[str]) -> Future[tuple[np.ndarray, np.ndarray]]:
        """Ids of all texts joined (n,), and the number of ids of each text, int64."""
        return self._pool.submit(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not hasattr(self._local, "tokenizer"):
            self._local.tokenizer = Tokenizer(self._files)
        ids = self._local.tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), self._dtype, int(lengths.sum())), lengths

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = self._before
