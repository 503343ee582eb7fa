"""What every run does around its training: device, opening and closing its folder, tracking."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from config import CommonConfig, UserError
from storage import reason, write_json
from trainer.folder import CHECKPOINT, LOG, clear
from trainer.loop import RunLog, build_optimizer, build_schedule

PROJECT = "llamarec"


def use_cuda(device: str | None) -> bool:
    """Whether to compute on CUDA.

    Raises:
        UserError: it is asked for and absent.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    return available and device != "cpu"


def make_accelerator(device: str | None, seed: int) -> Accelerator:
    """An accelerator on the device asked for, with all generators seeded.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    torch.backends.cudnn.allow_tf32 = False  # NARM's GRU alone would round so
    # Never another accelerator: the recurrence is complex, which not all of them can compute.
    accelerator = Accelerator(cpu=not use_cuda(device))
    set_seed(seed)
    return accelerator


def build_optimization(
    model: nn.Module, config: CommonConfig, *, lr: float, total: int, paged: bool
) -> tuple[Optimizer, LambdaLR]:
    """Optimizer and learning rate schedule as the flags say.

    Args:
        model: the model.
        config: all settings.
        lr: learning rate.
        total: optimizer steps of a run that does not stop early.
        paged: as of ``build_optimizer``.
    """
    optimizer = build_optimizer(
        model,
        config.optimizer,
        lr=lr,
        weight_decay=config.weight_decay,
        epsilon=config.adam_epsilon,
        paged=paged,
    )
    scheduler = build_schedule(
        optimizer,
        warmup=config.warmup_steps if config.enable_lr_warmup else 0,
        total=total,
        decay=config.lr_decay if config.enable_lr_schedule else None,
    )
    return optimizer, scheduler


def _commit() -> str | None:
    """The code's git commit, where there is one to be found."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def open_run(
    run_dir: Path,
    config: CommonConfig,
    details: dict[str, Any],
    outputs: Sequence[str],
    resumed: bool | None = None,
) -> RunLog:
    """Make the run's folder ready and, unless it is resumed, write its ``config.json``.

    Args:
        run_dir: the folder.
        config: all settings.
        details: what is to be known of the run besides, e.g. the resolved device.
        outputs: names of the run's files and folders.
        resumed: whether to leave what is in the folder; if None, where there is a checkpoint.
    """
    if resumed is None:
        resumed = config.resume and (run_dir / CHECKPOINT).exists()
    tracker = _track(run_dir, config, details) if config.use_wandb else None
    if not resumed:
        clear(run_dir, outputs)
        versions = {"torch": torch.__version__, "commit": _commit()}
        write_json(run_dir / "config.json", config.as_dict() | details | versions)
    return RunLog(run_dir / LOG, tracker)


def _track(run_dir: Path, config: CommonConfig, details: dict[str, Any]) -> Any:
    """A run of Weights & Biases.

    Raises:
        UserError: it cannot be begun.
    """
    import wandb

    try:
        return wandb.init(
            project=PROJECT,
            name=f"{run_dir.parent.name}_{config.dataset_code}",
            config=config.as_dict() | details,
            dir=str(run_dir),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"--use_wandb true: {reason(error)} (WANDB_MODE=offline logs without an account)"
        ) from error


def close_run(run_dir: Path, log: RunLog, summary: dict[str, Any]) -> None:
    """Drop the checkpoint of a finished run and close its tracking."""
    (run_dir / CHECKPOINT).unlink(missing_ok=True)
    if log.tracker:
        log.tracker.summary.update(summary)
        log.tracker.finish()


def metrics_table(columns: dict[str, dict[str, float]]) -> str:
    """Metrics as lines of text, a column for each named dict."""
    names = [name for name in next(iter(columns.values())) if "@" in name]
    lines = [" " * 10 + "".join(f"{title:>16}" for title in columns)]
    lines += [
        f"{name:<10}" + "".join(f"{metrics[name]:>16.4f}" for metrics in columns.values())
        for name in names
    ]
    users = [f"{int(metrics['num_users']):>16,}" for metrics in columns.values()]
    return "\n".join([*lines, f"{'users':<10}" + "".join(users)])
