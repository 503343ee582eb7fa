"""A run's folder: whose it is, whether it is finished, what may be replaced. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from config import CommonConfig, UserError
from datasets import SequenceDataset
from storage import made_folder, read_json, reason, remove_temporaries

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
SEARCH = "search.json"
SEARCH_RUNS = "search"
ROOT = Path(__file__).parent.parent
# The code that shapes a run's results.
SOURCES = ("datasets", "dataloader", "model", "trainer", "augmentation", "metrics.py")
# Where a run's files lie and how it is handled.
HANDLING = {
    "resume",
    "overwrite",
    "save_seconds",
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
    "retriever_path",
    "augmented",
    "reuse",
    "search",
    "search_weight_decay",
    "search_dropout",
    "search_jobs",
}
# These change the order in which numbers are added up and, where texts are written, which random
# numbers a user's gets, no more.
ROUNDING = {
    "gradient_checkpointing",
    "tokens_per_batch",
    "lora_micro_batch_size",
    "val_batch_size",
    "test_batch_size",
}
# What does not change a run's results, and so may differ when it is resumed.
IMMATERIAL = HANDLING | ROUNDING


def fingerprint(settings: dict[str, Any], data: SequenceDataset, *inputs: bytes) -> str:
    """Hash of the settings, data, code and other inputs that shape a run's results."""
    shaping = {name: value for name, value in settings.items() if name not in IMMATERIAL}
    digest = hashlib.sha256(json.dumps([shaping, data.fingerprint]).encode())
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    for value in inputs:
        digest.update(value)
    return digest.hexdigest()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for this process; folders made for it go again if they stay empty.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    lock = FileLock(run_dir / ".lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(made_folder(run_dir))
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{run_dir} is in use by another run: wait for it or name another --export_root"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write {run_dir}: {reason(error)}") from error
        try:
            remove_temporaries(run_dir)
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def is_started(run_dir: Path, outputs: Sequence[str], fingerprint: str) -> bool:
    """Whether the folder holds a checkpoint or any of the outputs of this run.

    Raises:
        UserError: it holds those of a run with another fingerprint.
    """
    if not any((run_dir / name).exists() for name in (CHECKPOINT, *outputs)):
        return False
    if read_json(run_dir / "config.json").get("fingerprint") != fingerprint:
        raise UserError(
            f"{run_dir} holds a run with other flags, data or code: resume with the flags in its "
            "config.json, name another --export_root, or replace it with --overwrite true"
        )
    return True


def is_finished(run_dir: Path, outputs: Sequence[str], fingerprint: str) -> bool:
    """Whether the folder holds all of this run's outputs and no checkpoint to go on from.

    Raises:
        UserError: it holds those of a run with another fingerprint.
    """
    if (run_dir / CHECKPOINT).exists() or not is_started(run_dir, outputs, fingerprint):
        return False
    return all((run_dir / name).exists() for name in outputs)


def check_replaceable(run_dir: Path, outputs: Sequence[str], config: CommonConfig) -> None:
    """Refuse to start anew over an earlier run without the user's word.

    Raises:
        UserError: the folder holds an earlier run.
    """
    if config.overwrite or (config.resume and (run_dir / CHECKPOINT).exists()):
        return
    if (run_dir / CHECKPOINT).exists():
        raise UserError(
            f"{run_dir} holds an interrupted run: --resume true goes on with it, --overwrite true "
            "starts anew"
        )
    if not config.resume and any((run_dir / name).exists() for name in outputs):
        raise UserError(
            f"{run_dir} holds an earlier run: replace it with --overwrite true, or name another "
            "--export_root"
        )


def clear(run_dir: Path, outputs: Sequence[str]) -> None:
    """Take away what an earlier run left, so that a folder never holds the results of two."""
    for name in (CHECKPOINT, LOG, SEARCH, SEARCH_RUNS, *outputs):
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
