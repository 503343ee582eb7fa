"""The training loop of all models: steps, validation, early stopping, interruption."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import distributed
from dataloader.sampler import ShuffledBatches
from distributed import in_main_process
from errors import UserError
from process import deferred_signals, raise_interrupt
from progress import ProgressBar
from trainer.average import WeightAverage
from trainer.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    trainable_state,
)
from trainer.run_log import RunLog

LOSS_CHECK_STEPS = 10  # not at every step, as reading a loss waits for the GPU
MAX_SHOWN_USERS = 8
MicroBatch = dict[str, Any]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Advice:
    """What the user can do about a failure of the loop, for the error message.

    Attributes:
        diverged: advice if the loss is infinite or NaN.
        out_of_memory: advice if the GPU is out of memory in training.
        out_of_memory_in_validation: advice if the GPU is out of memory in validation.
    """

    diverged: str
    out_of_memory: str
    out_of_memory_in_validation: str


@dataclass(frozen=True)
class LoopSettings:
    """When to validate, when to stop, and what to select.

    Attributes:
        num_epochs: passes over the training data.
        max_steps: optimizer steps after which to stop, or None.
        val_steps: optimizer steps between validations; one validation per epoch if None.
        patience: validations without improvement after which to stop, or None.
        best_metric: validation metric that selects the weights.
        max_grad_norm: norm to which gradients are clipped; 0 for no clipping.
        save_seconds: longest time between two checkpoints, in seconds.
        advice: advice in error messages.
    """

    num_epochs: int
    max_steps: int | None
    val_steps: int | None
    patience: int | None
    best_metric: str
    max_grad_norm: float
    save_seconds: float
    advice: Advice

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimizer steps of a run that does not stop early."""
        steps = self.num_epochs * batches_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps taken.
        epoch: current epoch, from 0.
        batch: batches taken in this epoch.
        validated_step: step of the last validation.
        best: best value of the validation metric.
        best_step: its step.
        rounds_without_gain: validations since then.
        done: whether training is over.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    validated_step: int = 0
    best: float = -math.inf
    best_step: int = 0
    rounds_without_gain: int = 0
    done: bool = False


class Trainer:
    """Trains a model; every script uses it with its own loss and validation.

    A batch is a list of micro-batches, each with ``num_targets``, the number of targets over which
    its loss is a mean. Several processes share a batch and add up their gradients, so that a step
    is the same for any number of processes, except for rounding and random draws such as dropout.

    Args:
        accelerator: holds the device.
        model: the model, on the device.
        optimizer: the optimizer.
        scheduler: learning rate by optimizer step.
        loader: training batches.
        sampler: the loader's sampler, which selects epoch and first batch.
        loss: mean loss of a micro-batch.
        validate: computes the metrics on the validation split.
        save_best: stores the current weights as the best so far; the main process writes them.
        settings: when to validate, stop and select.
        checkpoint: file of the checkpoint.
        fingerprint: identifies the run, so that no other run is resumed.
        log: receives a record per validation.
        user_names: names of the users by index, for messages.
        average: averaged weights to validate and keep instead of the current ones, or None.
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
        loss: Callable[[Any, MicroBatch], Tensor],
        validate: Callable[[], Metrics],
        save_best: Callable[[], None],
        settings: LoopSettings,
        checkpoint: Path,
        fingerprint: str,
        log: RunLog,
        user_names: Sequence[str],
        average: WeightAverage | None = None,
    ) -> None:
        self.accelerator, self.model = accelerator, model
        self.sharded = distributed.is_sharded(model)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.loader, self.sampler = loader, sampler
        self.loss, self.validate, self.save_best = loss, validate, save_best
        self.settings, self.log, self.average = settings, log, average
        self.checkpoint, self.fingerprint = checkpoint, fingerprint
        self.progress = Progress()
        self.losses: list[Tensor] = []  # since the last validation
        self.user_names = user_names
        self.recent_users: deque[list[int]] = deque(maxlen=LOSS_CHECK_STEPS)  # by step
        self.total = settings.total_steps(len(loader))
        self.saved_at = time.monotonic()
        self.validation_seconds = 0.0

    def fit(self, resume: bool) -> Progress:
        """Train until all steps are done or validation stops improving.

        Args:
            resume: whether to continue from the checkpoint, if there is one.

        Returns:
            The final progress, with the step of the best weights.

        Raises:
            UserError: the loss diverged or the GPU is out of memory.
            InputError: the checkpoint or the log is damaged or belongs to another run.
        """
        if resume:
            self._load()
        bar = ProgressBar(
            total=self.total,
            initial=self.progress.step,
            desc="train",
            unit="step",
            disable=self.progress.done,
        )
        start = time.monotonic()
        with bar, self._memory_errors_explained(self.settings.advice.out_of_memory):
            self._train(bar)
        distributed.wait()  # until the best weights are written
        if self.validation_seconds:
            seconds = time.monotonic() - start
            share = self.validation_seconds / seconds
            print(f"training took {seconds:,.0f} s, {share:.0%} of it for validation")
        return self.progress

    @contextmanager
    def _memory_errors_explained(self, advice: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            step = self.progress.step
            raise UserError(f"the GPU is out of memory after step {step:,}: {advice}") from error

    def _train(self, bar: ProgressBar) -> None:
        batches = self._batches()
        received: list[int] = []
        while not self.progress.done:
            if self._validation_is_due():
                self._save()  # so that an interrupted validation loses no steps
                advice = self.settings.advice.out_of_memory_in_validation
                start = time.monotonic()
                with self._memory_errors_explained(advice):
                    self._validate(bar)
                self.validation_seconds += time.monotonic() - start
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
                # All processes must stop after the same step, whoever received the signal.
                signal = distributed.largest(max([*received, *signals], default=0))
            received += signals
            if signal or (received and distributed.size() == 1):
                self._save()
                raise_interrupt(signal or received[0])

    def _batches(self) -> Iterator[list[MicroBatch]]:
        """Remaining batches of the current epoch."""
        self.sampler.seek(self.progress.epoch, self.progress.batch)
        return iter(self.loader)

    def _advance(self, batch: list[MicroBatch], bar: ProgressBar) -> None:
        """Train on a batch and update the progress."""
        self.recent_users.append([user for part in batch for user in part["users"]])
        self.losses.append(self._step(batch))
        step = self.progress.step + 1
        self.progress = replace(self.progress, step=step, batch=self.progress.batch + 1)
        bar.update()
        if step % LOSS_CHECK_STEPS == 0:
            bar.set_postfix_str(f"loss {self._check_losses():.4f}")

    def _step(self, batch: list[MicroBatch]) -> Tensor:
        """Take one optimizer step and return the batch's mean loss."""
        self._seed_step()
        self.model.train()
        device = self.accelerator.device
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        num_targets = distributed.total(sum(part["num_targets"] for part in batch))
        total = torch.zeros((), device=device)
        for micro_batch, weight in self._weighted(batch, num_targets):
            part = send_to_device(micro_batch, device)
            loss = self.loss(self.model, part) * weight
            loss.backward()
            total += loss.detach()
        self._add_up_gradients(parameters, total)
        if self.settings.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update()
        return total

    def _weighted(
        self, batch: list[MicroBatch], num_targets: int
    ) -> list[tuple[MicroBatch, float]]:
        """Micro-batches with their shares of the step's targets."""
        shares = [(part, part["num_targets"] / num_targets) for part in batch]
        if self.sharded:
            first = batch[0] if batch else {}
            shares += [(part, 0.0) for part in distributed.repeats(len(batch), first)]
        return shares

    def _seed_step(self) -> None:
        """Seed torch differently in every process, but as before when a run is resumed."""
        if distributed.size() > 1:
            words = [self.sampler.seed, self.progress.step, distributed.rank()]
            torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))

    def _add_up_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
        """Add up the gradients and the loss of all processes' shares."""
        if distributed.size() > 1:
            for parameter in parameters:
                if parameter.grad is None:  # this process's share is empty
                    parameter.grad = torch.zeros_like(parameter)
            distributed.add_up([loss, *(parameter.grad for parameter in parameters)])

    def _check_losses(self) -> float:
        """Check the losses since the last check and return the last one.

        Raises:
            UserError: a loss is infinite or NaN.
        """
        count = min(len(self.recent_users), len(self.losses))
        if not count:  # all are from a checkpoint, so they were checked before
            return self.losses[-1].item()
        losses = torch.stack(self.losses[-count:]).tolist()
        for step, users, loss in zip(
            range(self.progress.step - count + 1, self.progress.step + 1),
            list(self.recent_users)[-count:],
            losses,
        ):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {step:,} with users {self._shown(users)}: "
                    f"{self.settings.advice.diverged}"
                )
        return losses[-1]

    def _shown(self, users: Sequence[int]) -> str:
        """Names of users for a message, the first few if there are many."""
        names = sorted({self.user_names[user] for user in users})
        more = len(names) - MAX_SHOWN_USERS
        return ", ".join(names[:MAX_SHOWN_USERS]) + (f" and {more} more" if more > 0 else "")

    def _validation_is_due(self) -> bool:
        progress, every = self.progress, self.settings.val_steps
        if progress.step in (0, progress.validated_step):
            return False
        due = progress.batch == len(self.loader) if every is None else progress.step % every == 0
        return due or progress.step == self.total

    def _validate(self, bar: ProgressBar) -> None:
        """Compute the metrics, keep the weights if they are the best, decide whether to stop."""
        self._check_losses()
        self.model.eval()
        with self.average.applied() if self.average else nullcontext():
            # Processors may round differently, but all processes must decide the same.
            metrics = distributed.from_main(self.validate())
            improved = self._update_progress(metrics[self.settings.best_metric])
            if improved:
                self.save_best()
        loss = torch.stack(self.losses).mean().item()
        self.losses = []
        self._record(loss, metrics, bar)

    def _update_progress(self, score: float) -> bool:
        """Record the score of a validation, and return whether it is the best so far."""
        progress = replace(self.progress, validated_step=self.progress.step)
        improved = score > progress.best
        if improved:
            progress = replace(progress, best=score, best_step=progress.step, rounds_without_gain=0)
        else:
            progress = replace(progress, rounds_without_gain=progress.rounds_without_gain + 1)
        patience = self.settings.patience
        stops = patience is not None and progress.rounds_without_gain >= patience
        self.progress = replace(progress, done=stops or progress.step == self.total)
        return improved

    def _record(self, loss: float, metrics: Metrics, bar: ProgressBar) -> None:
        progress, metric = self.progress, self.settings.best_metric
        self.log.add(
            {"step": progress.step, "epoch": progress.epoch, "loss": loss}
            | {"lr": self.optimizer.param_groups[0]["lr"]}
            | {f"val_{name}": value for name, value in metrics.items()}
        )
        bar.write(
            f"step {progress.step:,}: loss {loss:.4f}, validation {metric} {metrics[metric]:.4f} "
            f"(best {progress.best:.4f} at step {progress.best_step:,})"
        )

    def step_seconds(self, count: int) -> Iterator[float]:
        """Take the first ``count`` steps of an epoch and yield the seconds of each.

        They change the weights, but no checkpoint is written.
        """
        batches = self._batches()
        for _ in range(count):
            start = time.monotonic()
            self._step(next(batches)).item()  # waits for the GPU
            yield time.monotonic() - start

    @in_main_process
    def _save(self) -> None:
        if self.losses:
            self._check_losses()  # never save weights that have diverged
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
            print(f"nothing to resume in {self.checkpoint.parent}: starting from scratch")
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
        self.log.load(self.progress.validated_step)  # an interrupted validation is repeated
        print(f"resuming at step {self.progress.step:,}")
