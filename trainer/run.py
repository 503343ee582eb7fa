"""What every run does around its training: device, folder, fingerprint, tracking."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from config import CommonConfig, UserError
from datasets import SequenceDataset
from storage import read_json, write_json
from trainer.checkpoint import FILE_NAME as CHECKPOINT
from trainer.loop import RunLog

PROJECT = "llamarec"
# What does not change a run's results, and so may differ when it is resumed.
_IMMATERIAL = {
    "resume",
    "data_root",
    "cache_root",
    "llm_cache_dir",
    "experiment_root",
    "export_root",
    "use_wandb",
    "num_workers",
    "interactions",
    "items",
    "llm_retrieved_path",
    "retrieved_from",
    # These change the order in which numbers are added up, no more.
    "gradient_checkpointing",
    "tokens_per_batch",
    "lora_micro_batch_size",
    "search",
    "search_weight_decay",
    "search_dropout",
    "search_jobs",
}


def make_accelerator(device: str | None, seed: int) -> Accelerator:
    """An accelerator on the device asked for, with all generators seeded.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    # Never another accelerator: the recurrence is complex, which not all of them can compute.
    accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
    set_seed(seed)
    return accelerator


def fingerprint(settings: dict[str, Any], data: SequenceDataset, *inputs: bytes) -> str:
    """Hash of the settings, data and other inputs that shape a run's results."""
    shaping = {name: value for name, value in settings.items() if name not in _IMMATERIAL}
    digest = hashlib.sha256(json.dumps([shaping, data.fingerprint]).encode())
    for value in inputs:
        digest.update(value)
    return digest.hexdigest()


def _commit() -> str | None:
    """The code's git commit, where there is one to be found."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def is_finished(run_dir: Path, outputs: Sequence[str], fingerprint: str) -> bool:
    """Whether the folder holds all of this run's outputs and no checkpoint to go on from.

    Raises:
        UserError: it holds those of a run with another fingerprint.
    """
    if (run_dir / CHECKPOINT).exists() or not all((run_dir / name).exists() for name in outputs):
        return False
    if read_json(run_dir / "config.json").get("fingerprint") != fingerprint:
        raise UserError(
            f"{run_dir} holds a finished run with other flags or data: resume with the flags in "
            "its config.json, name another --export_root, or start anew without --resume"
        )
    return True


def open_run(
    run_dir: Path,
    config: CommonConfig,
    details: dict[str, Any],
    outputs: Sequence[str],
    accelerator: Accelerator,
) -> RunLog:
    """Make the run's folder ready and, unless it is resumed, write its ``config.json``.

    A new run first takes away what an earlier one left there, so that a folder never holds the
    results of two.

    Args:
        run_dir: the folder.
        config: all settings.
        details: what is to be known of the run besides, e.g. the resolved device.
        outputs: names of the run's files and folders.
        accelerator: only its main process writes.
    """
    tracker = None
    if accelerator.is_main_process:
        resumed = config.resume and (run_dir / CHECKPOINT).exists()
        if not resumed:
            for name in (CHECKPOINT, "log.jsonl", *outputs):
                path = run_dir / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            versions = {"torch": torch.__version__, "commit": _commit()}
            write_json(run_dir / "config.json", config.as_dict() | details | versions)
        if config.use_wandb:
            import wandb

            tracker = wandb.init(
                project=PROJECT,
                name=f"{run_dir.parent.name}_{config.dataset_code}",
                config=config.as_dict() | details,
                dir=str(run_dir),
            )
    accelerator.wait_for_everyone()
    return RunLog(run_dir / "log.jsonl", tracker)


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
