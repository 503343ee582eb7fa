"""The folder of a run: which run it holds, whether that is finished, and locking."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from errors import InputError, UserError
from storage import describe, read_json, remove_temporary_files, temporary_unless_used

CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
CHARTS = "tensorboard"
SEARCH = "search.json"
SEARCH_RUNS = "search"
FOLDS = "folds"


class RunFolder:
    """A run's folder, which holds the files of at most one run.

    Args:
        path: the folder.
        outputs: names of the files and folders that a finished run consists of.
        fingerprint: hash of what determines the run's results.
    """

    def __init__(self, path: Path, outputs: Sequence[str], fingerprint: str) -> None:
        self.path, self.outputs, self.fingerprint = path, outputs, fingerprint

    @property
    def checkpoint(self) -> Path:
        """File to resume an interrupted run from."""
        return self.path / CHECKPOINT

    def is_interrupted(self) -> bool:
        """Whether there is a checkpoint, of this or any other run."""
        return self.checkpoint.exists()

    def has_outputs(self) -> bool:
        """Whether there are any outputs, of this or any other run."""
        return any((self.path / name).exists() for name in self.outputs)

    def is_started(self) -> bool:
        """Whether there is a checkpoint or any output of this run.

        Raises:
            InputError: the folder holds another run, or its ``config.json`` cannot be read.
        """
        if not self.is_interrupted() and not self.has_outputs():
            return False
        if read_json(self.path / CONFIG).get("fingerprint") != self.fingerprint:
            raise InputError(f"{self.path} holds a run with other settings or data")
        return True

    def holds_this(self) -> bool:
        """Whether the folder holds this run, finished or not, and not another one."""
        try:
            return self.is_started()
        except InputError:
            return False

    def is_finished(self) -> bool:
        """Whether this run is complete: all outputs and no checkpoint.

        Raises:
            InputError: see ``is_started``.
        """
        if self.is_interrupted() or not self.is_started():
            return False
        return all((self.path / name).exists() for name in self.outputs)

    def clear(self) -> None:
        """Remove the files of an earlier run, so that the folder never mixes two runs."""
        for name in (CHECKPOINT, LOG, CHARTS, SEARCH, SEARCH_RUNS, FOLDS, *self.outputs):
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Reserve the folder for this process; if it is created and stays empty, it is removed.

        Raises:
            InputError: another process has reserved it.
            UserError: it cannot be written.
        """
        lock = FileLock(self.path / ".lock")
        with ExitStack() as stack:
            try:
                stack.enter_context(temporary_unless_used(self.path))
                lock.acquire(timeout=0)
            except Timeout:
                raise InputError(f"{self.path} is in use by another run") from None
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {describe(error)}") from error
            try:
                remove_temporary_files(self.path)
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
                lock.release()
