"""TokenStream: the steps of one request, for whoever asked for it. Pure Python.

python -m pytest -q tests/test_engine_batching.py
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from openglm.engine.request import Completion, Step

__all__ = ["TokenStream", "collected"]


class TokenStream(Iterator[Step]):
    """Steps of one request as they are drawn; asking for the next one drives the engine, for all its requests.

    The request waits and runs from the start, whether it is iterated or not; `close`, or dropping the stream, ends it.
    Raises what ended a request with an error; a stream of a cancelled request just ends.

    steps: what the engine has drawn already. following(id, steps): the next one, None after the last. abandoned: where
    the engine looks for requests that no one waits for.
    """

    def __init__(
        self,
        request_id: int,
        steps: deque[Step],
        following: Callable[[int, deque[Step]], Step | None],
        cancel: Callable[[int], bool],
        abandoned: deque[int],
    ) -> None:
        self.request_id = request_id
        self._steps, self._following, self._cancel, self._abandoned = steps, following, cancel, abandoned

    def __next__(self) -> Step:
        step = self._following(self.request_id, self._steps)
        if step is None or step.finish_reason == "cancelled":
            raise StopIteration
        if step.error is not None:
            raise step.error
        return step

    def close(self) -> None:
        self._cancel(self.request_id)
        self._steps.clear()

    def __del__(self) -> None:
        self._abandoned.append(self.request_id)  # the collector may run within a step: the engine cancels at the next


def collected(stream: TokenStream) -> Completion:
    """All of a stream; "cancelled" when someone else ended it."""
    steps = list(stream)
    reason = (steps[-1].finish_reason if steps else None) or "cancelled"
    top = tuple(s.top_logprobs for s in steps)
    return Completion(tuple(s.token_id for s in steps), reason, tuple(s.logprob for s in steps), top)
