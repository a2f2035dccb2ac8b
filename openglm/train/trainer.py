"""Trainer: the only training loop. A stage is an objective plus its data plus a YAML; nothing here knows which.

    openglm train runs/tiny.yaml          from Python: openglm.train.run.main("runs/tiny.yaml")

One step: draw the batch as micro-batches, add up their gradients over one common normaliser (so accumulation equals
the big batch), judge loss and gradient norm, then clip and update, or skip. Everything the next step depends on is in
`snapshot`, so a killed run continues bit for bit.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openglm.data.example import Rows
from openglm.data.stream import RowStream
from openglm.model.cost import flops_per_token
from openglm.model.transformer import Transformer
from openglm.train.config import TrainConfig
from openglm.train.objectives import Objective, TensorRows, normaliser
from openglm.train.optim import Optimizer
from openglm.train.progress import ProgressLine, RunLog, matmul_peak, rss_bytes
from openglm.train.schedule import batch_rows, lr_factor
from openglm.train.stability import LossScaler, SpikeGuard, shrink_embedding_gradient
from openglm.train.state import CheckpointStore, Snapshot, cpu_copy, rng_state, set_rng_state

__all__ = ["Sampler", "StepResult", "Trainer", "prepare_model"]

Sampler = Callable[[Transformer], list[dict[str, Any]]]

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """What one step did. loss: weighted mean over targets; kinds: mean loss per kind; skipped: the reason or None."""

    loss: float
    kinds: dict[str, float]
    grad_norm: float
    embed_grad_norm: float
    rows: int
    tokens: int
    targets: int
    skipped: str | None


def prepare_model(model: Transformer, config: TrainConfig) -> None:
    """Put the run's wishes on a built model from outside: gradients, embedding shrink, recomputation, compilation."""
    model.requires_grad_(True).train()
    if config.embedding_grad_shrink < 1:
        shrink_embedding_gradient(model.embed, config.embedding_grad_shrink)
    for block in model.layers:
        if config.compile:
            block.compile(dynamic=False)
        if config.activation_checkpointing:
            from torch.utils.checkpoint import checkpoint

            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class Trainer:
    """Model, objective, streams and optimizer, stepped together.

    identity: what a checkpoint must agree on to be continued (objective, data, seed, tokenizer ...).
    sampler: called with the model every `sample_every` steps; its dicts go to the log.
    """

    def __init__(
        self, config: TrainConfig, model: Transformer, objective: Objective, stream: RowStream,
        eval_stream: RowStream | None, store: CheckpointStore, identity: Mapping[str, Any],
        sampler: Sampler | None = None,
    ) -> None:  # fmt: skip
        self.config, self.model, self.objective, self.stream = config, model, objective, stream
        self.eval_stream, self.store, self.identity, self.sampler = eval_stream, store, dict(identity), sampler
        self.device = model.embed.weight.device
        prepare_model(model, config)
        self.optimizer = Optimizer(model, config.optimizer, model.config)
        self.guard = SpikeGuard(config.spike)
        self.scaler = LossScaler() if config.precision == "fp16" else None
        self.step = self.tokens = 0
        self.last: StepResult | None = None
        self.last_eval: dict[str, float] = {}
        self._eval_start = eval_stream.state_dict() if eval_stream is not None else None
        self._stop_signal: int | None = None
        self._failed_write: OSError | None = None

    # One step -------------------------------------------------------------------------------------------------

    def train_step(self) -> StepResult:
        """Draw a batch, compute its gradient, apply or skip it. Advances the data cursor in either case."""
        config = self.config
        rows = batch_rows(self.step, config)
        micro = [self.stream.next_rows(config.micro_batch_rows) for _ in range(rows // config.micro_batch_rows)]
        total = sum(normaliser(m) for m in micro)
        self.optimizer.zero_grad()
        scale = self.scaler.scale if self.scaler is not None else 1.0
        sums = self._forward_backward(micro, scale / total) if total > 0 else {}
        loss = float(sums.pop("loss", 0.0)) / max(total, 1e-9)
        grad_norm, embed_norm = self._grad_norms(scale) if total > 0 else (0.0, 0.0)
        reason = self._judge(loss, grad_norm) if total > 0 else "no targets in the batch"
        if reason is None:
            clip = config.optimizer.grad_clip
            factor = (min(1.0, clip / (grad_norm + 1e-6)) if clip > 0 else 1.0) / scale
            if factor != 1.0:
                self.optimizer.scale_grads(factor)
            self.optimizer.step(lr_factor(self.step, config))
        self.optimizer.zero_grad()  # free the gradients: the next forward pass has no use for them
        self.step += 1
        tokens = sum(m.n_tokens for m in micro)
        self.tokens += tokens
        counts = {k.partition("/")[2]: float(v) for k, v in sums.items() if k.startswith("count/")}
        kinds = {kind: float(sums[f"loss_sum/{kind}"]) / n for kind, n in counts.items() if n}
        self.last = StepResult(loss, kinds, grad_norm, embed_norm, rows, tokens, int(sum(counts.values())), reason)
        return self.last

    def _forward_backward(self, micro: list[Rows], factor: float) -> dict[str, Tensor | float]:
        """Accumulate gradients of all micro-batches; returns summed metrics and "loss", the weighted sum."""
        sums: dict[str, Tensor | float] = {"loss": 0.0}
        for rows in micro:
            with self._autocast():
                result = self.objective.loss(self.model, TensorRows.from_rows(rows, self.device))
            (result.loss * factor).backward()
            sums["loss"] = sums["loss"] + result.loss.detach()
            for key, value in result.metrics.items():
                sums[key] = sums.get(key, 0.0) + value
        return sums

    def _grad_norms(self, scale: float) -> tuple[float, float]:
        grad = self.model.embed.weight.grad
        embed = 0.0 if grad is None else float(grad.norm()) / scale
        return float(self.optimizer.grad_norm()) / scale, embed

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        reason = self.guard.judge(loss, grad_norm)
        if self.scaler is not None:
            self.scaler.update(overflow=reason is not None and "finite" in reason)
        return reason

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = AUTOCAST[self.config.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    # Held-out loss --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss over the same held-out rows each time: "loss" weighted over all targets, then one per kind."""
        assert self.eval_stream is not None and self._eval_start is not None
        self.eval_stream.load_state_dict(self._eval_start)
        self.model.eval()
        sums: dict[str, float] = {}
        done = 0
        while done < self.config.eval_rows:
            n = min(self.config.micro_batch_rows, self.config.eval_rows - done)
            with self._autocast():
                tensor_rows = TensorRows.from_rows(self.eval_stream.next_rows(n), self.device)
                result = self.objective.loss(self.model, tensor_rows)
            pairs = {"loss": result.loss, "normaliser": result.normaliser, **result.metrics}
            for key, value in pairs.items():
                sums[key] = sums.get(key, 0.0) + float(value)
            done += n
        self.model.train()
        losses = {"loss": sums["loss"] / max(sums["normaliser"], 1e-9)}
        for key, n_tokens in sums.items():
            if key.startswith("count/") and n_tokens:
                losses[key[6:]] = sums[f"loss_sum/{key[6:]}"] / n_tokens
        self.last_eval = losses
        return losses

    # State ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Copy of all that the next step depends on."""
        optimizer = {f"optimizer.{name}": t for name, t in self.optimizer.state_dict().items()}
        values = {
            "tokens": self.tokens,
            "stream": self.stream.state_dict(),
            "guard": self.guard.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "identity": self.identity,
        }
        return Snapshot(self.step, cpu_copy(self.model.state_dict()), cpu_copy(optimizer) | rng_state(), values)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot; ValueError when it is another run's."""
        values = snapshot.values
        for key, here in self.identity.items():
            there = values["identity"].get(key)
            if there != here:
                raise ValueError(
                    f"{self.store.folder.parent} holds a run with {key} {there!r}, this one has {here!r}: "
                    "use another run_dir, or start over with --resume never"
                )
        self.model.load_state_dict(snapshot.model)
        prefix = "optimizer."
        self.optimizer.load_state_dict(
            {name.removeprefix(prefix): t for name, t in snapshot.tensors.items() if name.startswith(prefix)}
        )
        self.stream.load_state_dict(values["stream"])
        self.guard.load_state_dict(values["guard"])
        if self.scaler is not None and values["scaler"] is not None:
            self.scaler.load_state_dict(values["scaler"])
        set_rng_state(snapshot.tensors)
        self.step, self.tokens = snapshot.step, int(values["tokens"])

    # The loop -------------------------------------------------------------------------------------------------

    def train(self, log: RunLog) -> None:
        """Run until `steps`, or until SIGINT or SIGTERM, then leave a checkpoint of the last step behind.

        Raises ValueError when the last checkpoint cannot be written.
        """
        config = self.config
        progress = ProgressLine(config.steps, config.log_every)
        peak = matmul_peak(self.device.type, config.precision, torch.get_num_threads())
        speed = 0.0  # seconds a step, smoothed
        with self._signals():
            while self.step < config.steps and self._stop_signal is None:
                start = time.perf_counter()
                result = self.train_step()
                seconds = time.perf_counter() - start
                speed = seconds if speed == 0 else 0.9 * speed + 0.1 * seconds
                entry = self._entry(result, seconds, peak)
                log.write("step", entry)
                if result.skipped:
                    log.write("skip", {"step": self.step, "reason": result.skipped})
                    progress.note(f"step {self.step} skipped: {result.skipped}")
                progress.update(entry, speed * (config.steps - self.step))
                self._periodic(log, progress)
            if self._stop_signal is not None:
                progress.note(f"stopped by {signal.Signals(self._stop_signal).name} after step {self.step}")
            self._final_checkpoint(log, progress)
            progress.close()

    def flops(self, result: StepResult) -> float:
        """Floating-point operations of a step, forward and backward; what is recomputed does not count."""
        share = result.targets / max(1, result.tokens)
        return 3 * flops_per_token(self.model.config, self.config.row_len, share) * result.tokens

    def _entry(self, result: StepResult, seconds: float, peak: float) -> dict[str, Any]:
        config = self.config
        entry: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": result.loss,
            "losses": result.kinds,
            "grad_norm": result.grad_norm,
            "embed_grad_norm": result.embed_grad_norm,
            "lr": config.optimizer.lr * lr_factor(self.step - 1, config),
            "batch_rows": result.rows,
            "tokens_per_s": result.tokens / seconds,
            "mfu": self.flops(result) / seconds / peak,
            "rss_bytes": rss_bytes(),
            "skipped": result.skipped is not None,
            "time": time.time(),
        }
        if self.scaler is not None:
            entry["loss_scale"] = self.scaler.scale
        if self.device.type == "cuda":
            entry["device_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return entry

    def _periodic(self, log: RunLog, progress: ProgressLine) -> None:
        config, last = self.config, self.step == self.config.steps

        def due(every: int) -> bool:
            return every > 0 and (self.step % every == 0 or last)

        if self.eval_stream is not None and due(config.eval_every):
            losses = self.evaluate()
            log.write("eval", {"step": self.step, "tokens": self.tokens, "loss": losses["loss"],
                               "losses": {k: v for k, v in losses.items() if k != "loss"}})  # fmt: skip
            progress.note(f"step {self.step} held out: " + "  ".join(f"{k} {v:.4f}" for k, v in losses.items()))
        if self.sampler is not None and due(config.sample_every):
            self.model.eval()
            with torch.no_grad():
                for sample in self.sampler(self.model):
                    log.write("sample", {"step": self.step, **sample})
            self.model.train()
        if due(config.checkpoint_every) and not last:
            self.store.save(self.snapshot())
        self._report_writes(log, progress)

    def _report_writes(self, log: RunLog, progress: ProgressLine) -> None:
        for write in self.store.finished():
            self._failed_write = write.error
            entry = {"step": write.step, "path": str(write.path), "seconds": write.seconds, "bytes": write.n_bytes}
            log.write("checkpoint", entry | ({"error": str(write.error)} if write.error else {}))
            if write.error:
                progress.note(f"warning: checkpoint of step {write.step} could not be written ({write.error}); "
                              "the last good one is kept, the next is tried as planned")  # fmt: skip

    def _final_checkpoint(self, log: RunLog, progress: ProgressLine) -> None:
        self.store.save(self.snapshot())
        self.store.wait()
        self._report_writes(log, progress)
        if self._failed_write is not None:
            raise ValueError(
                f"the last checkpoint (step {self.step}) could not be written to {self.store.folder}: "
                f"{self._failed_write}; make room and resume, the last good checkpoint is kept"
            )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the loop after the step in progress; a second one ends the program at once."""

        def handle(number: int, _frame: Any) -> None:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            self._stop_signal = number

        try:
            old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are someone else's
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
