"""Engine: token ids in, token ids out, many requests at once. Knows no text.

    from openglm.engine import Engine
    from openglm.types import SamplingParams
    engine = Engine(model, special_ids)
    streams = [engine.stream(ids, SamplingParams(seed=i)) for i, ids in enumerate(prompts)]
    answers = [[step.token_id for step in stream] for stream in streams]     # all are written side by side

Every pass runs what the `Scheduler` plans: the next token of each running request and pieces of new prompts. What a
request gets does not depend on the others: each has its own sampler, and its ids are those it would get alone.
Positions and context come from `prompt_layout`, so every generation of the family is served alike.

    python -m pytest -q tests/test_engine.py tests/test_engine_batching.py
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openglm.engine.blocks import BlockManager
from openglm.engine.direct import Direct, WholePasses, check_ids, room_in_context
from openglm.engine.live import Live
from openglm.engine.native_runner import NativeRunner, natural_kv_dtype, runs_natively
from openglm.engine.options import EngineOptions, check_pool, default_pool_tokens
from openglm.engine.request import NO_TOKEN, Completion, FinishReason, Request, Step
from openglm.engine.runner import ModelRunner, TorchRunner, kv_type
from openglm.engine.sampler import DAMAGED, Drawn, GrammarState, Sampler, draw_batch
from openglm.engine.scheduler import Scheduler, Work
from openglm.engine.speculate import Proposer
from openglm.engine.stream import TokenStream, collected
from openglm.model.batch import prompt_layout
from openglm.model.paged import PagedPool
from openglm.model.transformer import Transformer
from openglm.types import Grammar, SamplingParams

__all__ = ["Engine"]


BURST_STEPS, BURST_S = 32, 0.025  # at most, in one call of the runner: tokens must come smoothly


class Engine(WholePasses):
    """Runs one Transformer.

    special_ids: names to ids, for `prompt_layout`. vocab_size: ids that the tokenizer knows; rows of a padded
    embedding beyond it are never drawn (None: all may be). runner: executes passes; None: a NativeRunner where it
    takes the model, else a TorchRunner. proposer: guesses tokens, which are verified several at a time; the ids that
    come out stay the same. grammar_state: makes the state that holds one answer to a grammar; it needs a tokenizer.

    Threads may share an engine: one of them at a time drives it, for all.
    """

    def __init__(
        self,
        model: Transformer,
        special_ids: Mapping[str, int],
        vocab_size: int | None = None,
        options: EngineOptions | None = None,
        runner: ModelRunner | None = None,
        proposer: Proposer | None = None,
        grammar_state: Callable[[Grammar], GrammarState] | None = None,
    ) -> None:
        self.model = model.eval()
        self.config = model.config
        self.special_ids = dict(special_ids)
        self.vocab_size = self.config.vocab_size if vocab_size is None else vocab_size
        assert 0 < self.vocab_size <= self.config.vocab_size
        self.options = options or EngineOptions()
        self._direct = Direct(model, self.special_ids, self.vocab_size)
        self._runner, self._proposer, self.grammar_state = runner, proposer, grammar_state
        self._native = self.options.page_size % 16 == 0 and runs_natively(model)
        n_pages, page_size = (runner.n_pages, runner.page_size) if runner is not None else self._pool_size()
        prefix = self.config.mask == "prefix"  # there keys and values of a prompt depend on the whole of it
        blocks = BlockManager(n_pages, page_size, share=self.options.prefix_cache and not prefix)
        self.scheduler = Scheduler(blocks, self.options.n_parallel, self.options.step_tokens, whole_prompts=prefix)
        self._lock = threading.RLock()
        self._live: dict[int, Live] = {}
        self._steps: list[Step] = []
        self._abandoned: deque[int] = deque()
        self._positions = torch.arange(0)[None]
        self._n_requests = self._n_passes = self._n_drawn = self._n_drafted = self._n_accepted = 0

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _pool_size(self) -> tuple[int, int]:
        size = self.options.page_size
        dtype = self.options.kv_dtype or (natural_kv_dtype(self.model) if self._native else None)
        per_token = PagedPool.bytes_per_token(self.config, kv_type(self.model, dtype))
        tokens = self.options.pool_tokens
        if tokens is None:
            tokens = default_pool_tokens(self.config, per_token, self.device, self.options)
        else:
            check_pool(tokens, per_token, self.device)
        return -(-tokens // size), size

    @property
    def runner(self) -> ModelRunner:
        """Its pool is taken from the memory when it is first needed, at the size that was fixed at the start."""
        if self._runner is None:
            blocks = self.scheduler.blocks
            kind = NativeRunner if self._native else TorchRunner
            try:
                self._runner = kind(self.model, blocks.n_pages, blocks.page_size, self.options.kv_dtype)
            except (MemoryError, torch.OutOfMemoryError) as error:
                n = blocks.n_pages * blocks.page_size
                raise MemoryError(f"no memory for a pool of {n} tokens: lower pool_tokens or n_parallel") from error
        return self._runner

    def describe(self) -> dict[str, Any]:
        """Sizes and counters, for people and for a server's metrics; bytes of the pool, pages, tokens, requests."""
        with self._lock:
            s, b = self.scheduler, self.scheduler.blocks
            return {
                "pool_bytes": self.runner.kv_bytes, "pool_tokens": b.n_pages * b.page_size, "page_size": b.page_size,
                "n_pages": b.n_pages, "n_pages_free": b.n_free, "n_pages_idle": b.n_idle,
                "n_parallel": s.n_parallel, "step_tokens": s.step_tokens, "prefix_cache": b.share,
                "n_running": len(s.running), "n_waiting": len(s.waiting), "n_requests": self._n_requests,
                "n_passes": self._n_passes, "n_drawn": self._n_drawn, "n_preemptions": s.n_preemptions,
                "n_reused": s.n_reused, "n_drafted": self._n_drafted, "n_accepted": self._n_accepted,
            }  # fmt: skip

    # ---------------------------------------------------------------- one request

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams, client: str = "") -> TokenStream:
        """Tokens as they are drawn; the last Step carries the finish reason.

        Raises ValueError at the call for an empty prompt, ids outside the vocabulary, or no room in context or pool.
        """
        steps: deque[Step] = deque()
        request_id = self._add(prompt_ids, params, client, steps)
        return TokenStream(request_id, steps, self._next, self.cancel, self._abandoned)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """`stream`, collected."""
        return collected(self.stream(prompt_ids, params))

    def generate_many(self, prompts: Iterable[Sequence[int]], params: SamplingParams) -> list[Completion]:
        """`generate` for every prompt, side by side."""
        return [collected(stream) for stream in [self.stream(ids, params) for ids in prompts]]

    # ---------------------------------------------------------------- many requests

    def add_request(self, prompt_ids: Sequence[int], params: SamplingParams, client: str = "") -> int:
        """Queue a request whose results `step` returns; its id. Raises ValueError as `stream` does."""
        return self._add(prompt_ids, params, client, None)

    def step(self) -> list[Step]:
        """Run one pass, if there is anything to do; what happened since the last call to requests without a stream."""
        with self._lock:
            self._advance()
            steps, self._steps = self._steps, []
            return steps

    def cancel(self, request_id: int) -> bool:
        """End a request at once; its pages go back. False where it has ended already."""
        with self._turn():
            live = self._live.get(request_id)
            if live is None:
                return False
            self._end(live, "cancelled")
            return True

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._live)

    def interrupt(self) -> None:
        """Have `step` return with the tokens that are being computed, not go on to further ones. From any thread."""
        if isinstance(self._runner, NativeRunner):
            self._runner.interrupt()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock, as soon as another thread's pass is over."""
        self.interrupt()
        with self._lock:
            yield

    def forget(self) -> None:
        """Empty the prefix cache. To be called when the weights have changed."""
        with self._turn():
            self.scheduler.blocks.forget()
            for request in self.scheduler.running:
                request.n_shared = 0

    def _add(self, prompt_ids: Sequence[int], params: SamplingParams, client: str, steps: deque[Step] | None) -> int:
        ids = check_ids(prompt_ids, self.config)
        blocks = self.scheduler.blocks
        capacity = blocks.n_pages * blocks.page_size
        if len(ids) > capacity:
            raise ValueError(
                f"the prompt has {len(ids)} tokens but the pool holds {capacity}: shorten it or raise pool_tokens"
            )
        # The last token that is drawn is not run, so it needs no place in the pool.
        room = min(room_in_context(len(ids), self.config), capacity + 1 - len(ids))
        budget = min(params.max_new_tokens, room)
        layout = prompt_layout(ids, self.config, self.special_ids)
        state = None
        if params.grammar is not None and self.grammar_state is not None:
            state = self.grammar_state(params.grammar)
        sampler = Sampler(params, ids, self.vocab_size, state)
        with self._turn():
            self._n_requests += 1
            request = Request(self._n_requests, ids, len(ids), budget, layout.n_context, client)
            if self.config.mask == "causal":
                if not self._positions.numel():
                    self._positions = layout.positions(0, self.config.max_seq_len)
                positions = self._positions
            else:
                positions = layout.positions(0, len(ids) + budget)
            stop_ids = frozenset(params.stop_ids)
            self._live[request.id] = Live(request, sampler, positions, stop_ids, steps)
            self.scheduler.add(request)
            return request.id

    def _next(self, request_id: int, steps: deque[Step]) -> Step | None:
        """The next step of a stream; None when there is none any more."""
        with contextlib.suppress(IndexError):
            return steps.popleft()
        with self._lock:
            while not steps:
                if request_id not in self._live:
                    return None
                self._advance()
            return steps.popleft()

    # ---------------------------------------------------------------- one pass

    def _advance(self) -> None:
        while self._abandoned:
            self.cancel(self._abandoned.popleft())
        if self._proposer is not None:
            self._propose(self._proposer)
        plan = self.scheduler.schedule()
        for request in plan.failed:
            error = MemoryError(f"the pool has no page for request {request.id} of {len(request.ids)} tokens")
            self._end(self._live[request.id], "error", error)
        work = [w for w in plan.work if w.request.state == "running"]
        if work:
            if not self._decode(work):
                self._n_passes += 1
                self._run(work)

    def _propose(self, proposer: Proposer) -> None:
        proposer.propose([r for r in self.scheduler.running if r.n_pending == 1], self._positions_of)

    def _positions_of(self, request: Request, start: int, stop: int) -> Tensor:
        return self._live[request.id].positions[:, start:stop]

    def _run(self, work: list[Work]) -> None:
        """Run and draw. A pass that fails is run again request by request: only the one at fault ends."""
        try:
            logits = self.runner.run([self._live[w.request.id].chunk(w) for w in work])
        except Exception as error:
            if len(work) == 1:
                self._end(self._live[work[0].request.id], "error", error)
            else:
                for w in work:
                    self._run([w])
            return
        self._draw(work, logits)

    def _decode(self, work: list[Work]) -> bool:
        """Several steps at once, where all there is to do is to write on. False: it must be done pass by pass."""
        runner = self._runner
        if not isinstance(runner, NativeRunner) or self._proposer is not None:
            return False
        if len(work) < len(self.scheduler.running):
            return False
        live = [self._live[w.request.id] for w in work]
        sequences = [sequence for one, w in zip(live, work, strict=True) if (sequence := one.decoding(w)) is not None]
        if len(sequences) < len(work):
            return False
        n_steps = self.scheduler.ahead(BURST_STEPS)
        try:
            burst = runner.decode(sequences, self.vocab_size, n_steps, BURST_S)
        except MemoryError:  # one by one they may find room, or end with an error that says what to do
            return False
        self._n_passes += len(burst.at)
        drawn: list[list[int]] = [[] for _ in work]
        ends: dict[int, FinishReason] = {}
        for ids, logprobs, at in zip(*burst, strict=True):
            for i, (token_id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
                if token_id == NO_TOKEN:
                    ends[i] = "error"
                    continue
                drawn[i].append(token_id)
                reason = self._emit(live[i], Drawn(token_id, logprob), len(drawn[i]), at)
                if reason is not None:
                    ends[i] = reason
        for i, w in enumerate(work):
            if drawn[i]:
                self.scheduler.advance(w, drawn[i])
            if ends.get(i) == "error":
                self._end(live[i], "error", FloatingPointError(DAMAGED))
            elif i in ends:
                self._close(live[i])
        return True

    @torch.inference_mode()
    def _draw(self, work: list[Work], logits: Tensor) -> None:
        singles: list[tuple[Work, Live]] = []
        rows: list[int] = []
        end = 0
        for w in work:
            first, end = end, end + w.n_logits
            live = self._live[w.request.id]
            if w.n_logits == 0:
                self.scheduler.advance(w)
            elif w.n_logits == 1:
                singles.append((w, live))
                rows.append(first)
            else:
                self._verify(w, live, logits[first:end])
        if singles:
            wanted = logits if len(rows) == len(logits) else logits[rows]
            for (w, live), drawn in zip(singles, draw_batch([x.sampler for _, x in singles], wanted), strict=True):
                if drawn.error is not None:
                    self._end(live, "error", drawn.error)
                else:
                    self._advance_by(w, live, [drawn.token_id], self._emit(live, drawn, 1))

    def _verify(self, work: Work, live: Live, logits: Tensor) -> None:
        """Draw behind every draft as if it were the answer, until one of them was guessed wrong."""
        guesses = [*work.request.drafts, NO_TOKEN]
        ids: list[int] = []
        for row, guess in zip(logits, guesses, strict=True):
            drawn = live.sampler.draw(row)
            if drawn.error is not None:
                self._end(live, "error", drawn.error)
                return
            ids.append(drawn.token_id)
            reason = self._emit(live, drawn, len(ids))
            if reason is not None or drawn.token_id != guess:
                break
        self._n_drafted += work.n_drafts
        self._n_accepted += len(ids) - 1
        self._advance_by(work, live, ids, reason)

    def _emit(self, live: Live, drawn: Drawn, n: int, at: float | None = None) -> FinishReason | None:
        """Hand out the n-th token of this pass; the reason why it is the last one, if it is."""
        step = live.take(drawn, n, at)
        self._n_drawn += 1
        self._give(live, step)
        return step.finish_reason

    def _advance_by(self, work: Work, live: Live, ids: list[int], reason: FinishReason | None) -> None:
        self.scheduler.advance(work, ids)
        if reason is not None:
            self._close(live)

    def _end(self, live: Live, reason: FinishReason, error: Exception | None = None) -> None:
        """End a request without another token."""
        self._give(live, Step(NO_TOKEN, 0.0, reason, request_id=live.request.id, error=error))
        self._close(live)

    def _close(self, live: Live) -> None:
        self.scheduler.finish(live.request)
        del self._live[live.request.id]

    def _give(self, live: Live, step: Step) -> None:
        (self._steps if live.steps is None else live.steps).append(step)

    def check_integrity(self) -> None:
        """AssertionError unless requests, queue and pages agree."""
        with self._lock:
            self.scheduler.check_integrity()
            requests = [*self.scheduler.running, *self.scheduler.waiting]
            assert sorted(r.id for r in requests) == sorted(self._live)
