"""Training code that all scripts share: loop settings, the trainer, the run's log and config."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from config import CommonConfig
from dataloader.sampler import ShuffledBatches, training_loader
from distributed import in_main_process, is_main
from errors import InputError, UserError, advice
from recipes.runs import FROM_SCRATCH
from storage import describe, read_json, reading, write_json
from trainer.average import WeightAverage
from trainer.fingerprint import RESULTS_FORMAT
from trainer.loop import Advice, LoopSettings, Metrics, Trainer
from trainer.optimization import build_optimizer, build_schedule
from trainer.run_folder import CHARTS, CONFIG, LOG, RunFolder
from trainer.run_log import RunLog, TensorBoard, Tracker

WANDB_PROJECT = "llamarec"


def loop_settings(
    config: CommonConfig,
    *,
    num_epochs: int,
    val_iterations: int,
    patience: int,
    best_metric: str,
    advice: Advice,
) -> LoopSettings:
    """Combine the flags that all scripts share with those of one stage."""
    return LoopSettings(
        num_epochs=num_epochs,
        max_steps=config.max_steps,
        val_steps=val_iterations if config.val_strategy == "iteration" else None,
        patience=patience if config.early_stopping else None,
        best_metric=best_metric,
        max_grad_norm=config.max_grad_norm,
        save_seconds=config.save_seconds,
        advice=advice,
    )


def training_bytes(num_weights: int, config: CommonConfig) -> int:
    """Bytes of float32 weights, their gradients, the optimizer's state and the moving average."""
    moments = int(bool(config.momentum)) if config.optimizer == "SGD" else 2
    return 4 * num_weights * (2 + moments + bool(config.ema_decay))


def build_optimization(
    model: nn.Module, config: CommonConfig, *, lr: float, total_steps: int, paged: bool
) -> tuple[Optimizer, LambdaLR]:
    """Build the optimizer and the learning rate schedule that the flags select.

    Args:
        model: the model.
        config: all settings.
        lr: learning rate.
        total_steps: optimizer steps of a run that does not stop early.
        paged: see ``build_optimizer``.
    """
    optimizer = build_optimizer(
        model,
        config.optimizer,
        lr=lr,
        weight_decay=config.weight_decay,
        epsilon=config.adam_epsilon,
        momentum=config.momentum or 0.0,
        paged=paged,
    )
    scheduler = build_schedule(
        optimizer,
        warmup=config.warmup_steps if config.enable_lr_warmup else 0,
        total=total_steps,
        decay=config.lr_decay if config.enable_lr_schedule else None,
        steps=published_steps(config),
    )
    return optimizer, scheduler


def published_steps(config: CommonConfig) -> tuple[int, float] | None:
    """The published code's schedule without a warm-up, if its flags select it."""
    if config.decay_step is None or not config.enable_lr_schedule or config.enable_lr_warmup:
        return None
    return config.decay_step, 1.0 if config.gamma is None else config.gamma


def build_trainer(
    config: CommonConfig,
    run: RunFolder,
    log: RunLog,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    dataset: Dataset,
    sampler: ShuffledBatches,
    settings: LoopSettings,
    lr: float,
    paged: bool = False,
    loss: Callable[[Any, dict[str, Any]], Tensor],
    validate: Callable[[], Metrics],
    save_best: Callable[[], None],
    user_names: list[str],
) -> Trainer:
    """Build a trainer, with its optimizer, schedule, loader and moving average.

    Args:
        config: all settings.
        run: the run's folder.
        log: the run's log.
        accelerator: holds the device.
        model: the model, on that device.
        dataset: training examples.
        sampler: their order.
        settings: when to validate, stop and select.
        lr: learning rate.
        paged: see ``build_optimizer``.
        loss: see ``Trainer``.
        validate: see ``Trainer``.
        save_best: see ``Trainer``.
        user_names: see ``Trainer``.
    """
    sampler.total = settings.total_steps(len(sampler))
    optimizer, scheduler = build_optimization(
        model, config, lr=lr, total_steps=sampler.total, paged=paged
    )
    loader = training_loader(dataset, sampler, config.num_workers)
    return Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        sampler=sampler,
        loss=loss,
        validate=validate,
        save_best=save_best,
        settings=settings,
        checkpoint=run.checkpoint,
        fingerprint=run.fingerprint,
        log=log,
        user_names=user_names,
        average=WeightAverage(model, config.ema_decay) if config.ema_decay else None,
    )


def open_run(
    run: RunFolder,
    config: CommonConfig,
    details: Mapping[str, Any],
    *,
    resumed: bool | None = None,
) -> RunLog:
    """Clear the run's folder and write its ``config.json``, unless the run is resumed.

    Args:
        run: the run's folder.
        config: all settings.
        details: further content of ``config.json``, such as resolved settings.
        resumed: whether to keep what is in the folder; by default, if there is a checkpoint to
            resume from.

    Raises:
        UserError: a file cannot be written, or tracking cannot be started.
    """
    if resumed is None:
        resumed = config.resume and run.is_interrupted()
    trackers: list[Tracker] = []
    if config.use_wandb and is_main():
        trackers.append(_start_wandb(run, config, details))
    _prepare_folder(run, config.as_dict() | dict(details), resumed)
    if config.use_tensorboard and is_main():
        trackers.append(TensorBoard(run.path / CHARTS))
    return RunLog(run.path / LOG, trackers)


@in_main_process
def _prepare_folder(run: RunFolder, settings: Mapping[str, Any], resumed: bool) -> None:
    """Clear the run's folder unless it is resumed, and write ``config.json`` if necessary."""
    path = run.path / CONFIG
    if not resumed:
        run.clear()
    if not resumed or (path.exists() and not is_readable(path)):
        origin = {
            "fingerprint": run.fingerprint,
            "results_format": RESULTS_FORMAT,
            "torch": torch.__version__,
            "commit": _commit(),
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        write_json(path, dict(settings) | origin)


def is_readable(path: Path) -> bool:
    """Whether a JSON file is undamaged."""
    try:
        read_json(path)
    except InputError:
        return False
    return True


@in_main_process
def close_run(run: RunFolder, log: RunLog, summary: Mapping[str, Any]) -> None:
    """Remove the checkpoint of a finished run, and send its results to the trackers."""
    run.checkpoint.unlink(missing_ok=True)
    log.close(summary)


def _start_wandb(run: RunFolder, config: CommonConfig, details: Mapping[str, Any]) -> Tracker:
    """Start tracking with Weights & Biases.

    Raises:
        UserError: it cannot be started.
    """
    import wandb

    try:
        return wandb.init(
            project=WANDB_PROJECT,
            name=f"{run.path.parent.name}_{details.get('data_code', config.dataset_code)}",
            config=config.as_dict() | dict(details),
            dir=str(run.path),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"--use_wandb: {describe(error)} (WANDB_MODE=offline logs without an account)"
        ) from error


def _commit() -> str | None:
    """The git commit of the code, or None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def print_metrics(path: Path, title: str) -> None:
    """Print the metrics of a finished run.

    Raises:
        UserError: the file is damaged.
    """
    with advice(FROM_SCRATCH), reading(path):
        print(metrics_table({title: read_json(path)}))


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Format metrics as lines of text, with a column for each of ``columns``."""
    names = [name for name in next(iter(columns.values())) if "@" in name]
    lines = [" " * 10 + "".join(f"{title:>16}" for title in columns)]
    lines += [
        f"{name:<10}" + "".join(f"{metrics[name]:>16.4f}" for metrics in columns.values())
        for name in names
    ]
    users = [f"{int(metrics['num_users']):>16,}" for metrics in columns.values()]
    return "\n".join([*lines, f"{'users':<10}" + "".join(users)])
