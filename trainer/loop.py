"""The training loop of both stages: steps, validation, early stopping, log, interruption."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Terminated, UserError
from dataloader.sampler import ShuffledBatches
from storage import atomic_path, reading
from trainer.average import WeightAverage
from trainer.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    trainable_state,
)
from trainer.folder import CHECKPOINT

CHECK_STEPS = 10
SHOWN_USERS = 8
PAGED_ELEMENTS = 100_000  # bitsandbytes' own limit
DEFERRED = (signal.SIGINT, signal.SIGTERM)
Metrics = dict[str, float]


@dataclass(frozen=True)
class LoopSettings:
    """When to validate, when to stop, what to select.

    Attributes:
        num_epochs: passes over the training data.
        max_steps: stop after this many optimizer steps, if not None.
        val_steps: optimizer steps between validations; once an epoch if None.
        patience: validations without a gain before stopping; never if None.
        best_metric: the validation metric that selects the weights.
        max_grad_norm: gradients are clipped to this norm; never if 0.
        save_seconds: at most this long between two checkpoints.
        if_nan: what the user can do about a loss that is no number.
        if_memory: what the user can do when the GPU's memory is full.
    """

    num_epochs: int
    max_steps: int | None
    val_steps: int | None
    patience: int | None
    best_metric: str
    max_grad_norm: float
    save_seconds: float
    if_nan: str
    if_memory: str


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    validated_step: int = 0
    best: float = -math.inf
    best_step: int = 0
    rounds_without_gain: int = 0
    done: bool = False


@contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM wait for the end of the block; yields those that came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # no other thread gets signals
        return
    usual = {n: signal.signal(n, lambda n, _: came.append(n)) for n in DEFERRED}
    try:
        yield came
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class RunLog:
    """``log.jsonl``, a line a validation, and Weights & Biases if asked for.

    Args:
        path: the file; it is rewritten whole, so that it never ends in half a line.
        tracker: a ``wandb`` run or None.
    """

    def __init__(self, path: Path, tracker: Any | None = None) -> None:
        self.path, self.tracker = path, tracker
        self.records: list[dict[str, Any]] = []

    def load(self, last_step: int) -> None:
        """Take up the records of an interrupted run up to ``last_step``."""
        if self.path.exists():
            with reading(self.path, "delete it, or start anew with --overwrite true"):
                records = map(json.loads, self.path.read_text().splitlines())
                self.records = [r for r in records if r["step"] <= last_step]

    def add(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self.records.append(record)
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        if self.tracker:
            self.tracker.log(record, step=record["step"])


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, weight_decay: float, epsilon: float, paged: bool
) -> Optimizer:
    """AdamW or Adam over the trainable parameters, without decay on biases and layer norms.

    Args:
        model: the model.
        name: ``AdamW`` or ``Adam``.
        lr: learning rate.
        weight_decay: decay of the other parameters.
        epsilon: Adam's epsilon.
        paged: bitsandbytes' AdamW, whose state moves to the host when the GPU is full (QLoRA).
    """
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = "bias" in parameter_name or "layer_norm" in parameter_name
            groups[0.0 if exempt else weight_decay].append(parameter)
    parameters = [{"params": p, "weight_decay": decay} for decay, p in groups.items() if p]
    # Smaller tensors are not paged, and it waits for the GPU at each.
    sizes = [p.numel() for group in parameters for p in group["params"]]
    if paged and name == "AdamW" and max(sizes) >= PAGED_ELEMENTS:
        from bitsandbytes.optim import PagedAdamW32bit

        return PagedAdamW32bit(parameters, lr=lr, eps=epsilon)
    return getattr(torch.optim, name)(parameters, lr=lr, eps=epsilon, fused=True)


def build_schedule(optimizer: Optimizer, *, warmup: int, total: int, decay: str | None) -> LambdaLR:
    """Learning rate: linear warm-up, then constant or decaying to 0.

    Args:
        optimizer: the optimizer.
        warmup: steps of the warm-up, 0 for none.
        total: steps at whose end a decaying rate is 0.
        decay: ``linear``, ``cosine`` or None for a constant rate.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        left = max(0.0, (total - step) / max(1, total - warmup))
        return {None: 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[decay]

    return LambdaLR(optimizer, factor)


def total_steps(settings: LoopSettings, batches_an_epoch: int) -> int:
    """Optimizer steps of a run that does not stop early."""
    steps = settings.num_epochs * batches_an_epoch
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


class Trainer:
    """Trains one model; both stages use it with their own loss and validation.

    A batch is a list of micro-batches, each with the ``weight`` its mean loss has in the batch's.

    Args:
        accelerator: holds the device.
        model: the model, prepared by the accelerator.
        optimizer: prepared likewise.
        scheduler: learning rate by optimizer step.
        loader: training batches, prepared likewise.
        sampler: the loader's sampler, which sets epoch and first batch.
        loss: mean loss of a micro-batch.
        validate: metrics on the validation split.
        save_best: stores the current weights as the best so far.
        settings: when to validate, stop and select.
        run_dir: folder of the run.
        fingerprint: names settings and data, so that no other run is resumed.
        log: takes a record a validation.
        user_names: names of the users that a micro-batch's ``users`` number, for messages.
        average: what is validated and kept instead of the last step's weights, if not None.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        loader: DataLoader,
        sampler: ShuffledBatches,
        loss: Callable[[nn.Module, dict[str, Any]], Tensor],
        validate: Callable[[], Metrics],
        save_best: Callable[[], None],
        settings: LoopSettings,
        run_dir: Path,
        fingerprint: str,
        log: RunLog,
        user_names: Sequence[str],
        average: WeightAverage | None = None,
    ) -> None:
        self.accelerator, self.model = accelerator, model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.loader, self.sampler = loader, sampler
        self.loss, self.validate, self.save_best = loss, validate, save_best
        self.settings, self.log, self.average = settings, log, average
        self.checkpoint, self.fingerprint = run_dir / CHECKPOINT, fingerprint
        self.progress = Progress()
        self.losses: list[Tensor] = []  # since the last validation
        self.user_names = user_names
        self.recent: deque[list[int]] = deque(maxlen=CHECK_STEPS)  # users of the last steps
        self.total = total_steps(settings, len(loader))
        self.saved_at = time.monotonic()

    def fit(self, resume: bool) -> Progress:
        """Train until the steps are done or validation stops improving.

        Args:
            resume: go on from the checkpoint if there is one.
        """
        if resume:
            self._load()
        bar = tqdm(
            total=self.total,
            initial=self.progress.step,
            desc="train",
            unit="step",
            disable=self.progress.done,
            dynamic_ncols=True,
        )
        with bar, self._memory_suffices(self.settings.if_memory):
            self._train(bar)
        return self.progress

    @contextmanager
    def _memory_suffices(self, remedy: str) -> Iterator[None]:
        """Turn a full GPU into a message that says what the user can do."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            step = self.progress.step
            raise UserError(f"the GPU's memory is full after step {step:,}: {remedy}") from error

    def _train(self, bar: tqdm) -> None:
        """Steps and validations until the run is done."""
        batches = self._batches()
        while not self.progress.done:
            if self._validation_is_due():
                self._save()  # an interruption of the validation loses nothing
                with self._memory_suffices("lower --val_batch_size and go on with --resume true"):
                    self._validate(bar)
                self._save()
                continue
            with deferred_signals() as signals:
                batch = next(batches, None)
                if batch is None:
                    self.progress = replace(self.progress, epoch=self.progress.epoch + 1, batch=0)
                    batches = self._batches()
                else:
                    self._advance(batch, bar)
                if time.monotonic() - self.saved_at > self.settings.save_seconds:
                    self._save()
            if signals:
                self._save()
                raise Terminated if signals[0] == signal.SIGTERM else KeyboardInterrupt

    def _advance(self, batch: list[dict[str, Any]], bar: tqdm) -> None:
        """Train on a batch, and show how far it is."""
        self.recent.append([user for part in batch for user in part["users"]])
        self.losses.append(self._step(batch))
        step = self.progress.step + 1
        self.progress = replace(self.progress, step=step, batch=self.progress.batch + 1)
        bar.update()
        if step % CHECK_STEPS == 0:
            bar.set_postfix_str(f"loss {self._check_losses():.4f}")

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        """The batches of the epoch that are left."""
        self.sampler.seek(self.progress.epoch, self.progress.batch)
        return iter(self.loader)

    def _validation_is_due(self) -> bool:
        progress, every = self.progress, self.settings.val_steps
        if progress.step in (0, progress.validated_step):
            return False
        due = progress.batch == len(self.loader) if every is None else progress.step % every == 0
        return due or progress.step == self.total

    def _step(self, batch: list[dict[str, Any]]) -> Tensor:
        """One optimizer step; returns the batch's mean loss."""
        self.model.train()
        total = torch.zeros((), device=self.accelerator.device)
        for micro_batch in batch:
            loss = self.loss(self.model, micro_batch) * micro_batch["weight"]
            self.accelerator.backward(loss)
            total += loss.detach()
        if self.settings.max_grad_norm:
            self.accelerator.clip_grad_norm_(
                (p for p in self.model.parameters() if p.requires_grad), self.settings.max_grad_norm
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update()
        return total

    def _check_losses(self) -> float:
        """The last loss; looked at every few steps, as a look waits for the GPU.

        Raises:
            UserError: a loss is no number.
        """
        count = min(len(self.recent), len(self.losses))
        if not count:  # resumed: what was saved was looked at before
            return self.losses[-1].item()
        losses = torch.stack(self.losses[-count:]).tolist()
        for place, loss in enumerate(losses):
            if not math.isfinite(loss):
                users = sorted({self.user_names[user] for user in self.recent[place - count]})
                more = f" and {len(users) - SHOWN_USERS} more" if len(users) > SHOWN_USERS else ""
                raise UserError(
                    f"the loss is {loss} at step {self.progress.step - count + place + 1:,} with "
                    f"users {', '.join(users[:SHOWN_USERS])}{more}: {self.settings.if_nan}"
                )
        return losses[-1]

    def _validate(self, bar: tqdm) -> None:
        with self.average.applied() if self.average else nullcontext():
            self._validate_weights(bar)

    def _validate_weights(self, bar: tqdm) -> None:
        """Measure the weights, keep them if they are the best, decide whether to stop."""
        self._check_losses()
        self.model.eval()
        metrics = self.validate()
        progress = replace(self.progress, validated_step=self.progress.step)
        score = metrics[self.settings.best_metric]
        if score > progress.best:
            progress = replace(progress, best=score, best_step=progress.step, rounds_without_gain=0)
            self.save_best()
        else:
            progress = replace(progress, rounds_without_gain=progress.rounds_without_gain + 1)
        patience = self.settings.patience
        stopped = patience is not None and progress.rounds_without_gain >= patience
        self.progress = replace(progress, done=stopped or progress.step == self.total)
        loss = torch.stack(self.losses).mean().item()
        self.losses = []
        self.log.add(
            {"step": progress.step, "epoch": progress.epoch, "loss": loss}
            | {"lr": self.optimizer.param_groups[0]["lr"]}
            | {f"val_{name}": value for name, value in metrics.items()}
        )
        bar.write(
            f"step {progress.step:,}: loss {loss:.4f}, "
            f"validation {self.settings.best_metric} {score:.4f} "
            f"(best {progress.best:.4f} at step {progress.best_step:,})"
        )

    def _save(self) -> None:
        if self.losses:
            self._check_losses()  # who resumes from weights that are no numbers has no use of it
        self.saved_at = time.monotonic()
        state = {
            "model": trainable_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "random": random_state(self.accelerator.device),
            "losses": self.losses,
            "average": self.average.state_dict() if self.average else None,
            "progress": asdict(self.progress),
        }
        save_checkpoint(self.checkpoint, state, self.fingerprint)

    def _load(self) -> None:
        state = load_checkpoint(self.checkpoint, self.fingerprint)
        if state is None:
            print(f"nothing to resume in {self.checkpoint.parent}: starting anew")
            return
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in state["model"].items():
                parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        if self.average:
            self.average.load_state_dict(state["average"])
        set_random_state(state["random"], self.accelerator.device)
        self.losses = [loss.to(self.accelerator.device) for loss in state["losses"]]
        self.progress = Progress(**state["progress"])
        self.log.load(self.progress.validated_step)  # a validation cut short is repeated
        print(f"resuming at step {self.progress.step:,}")
