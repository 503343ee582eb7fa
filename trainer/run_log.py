"""The log of a run: one record per validation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from distributed import in_main_process
from storage import atomic_path, reading


class Tracker(Protocol):
    """Receives what is logged and draws charts; runs of ``wandb`` are trackers."""

    def log(self, data: dict[str, Any], step: int) -> None:
        """Add values by name to the charts."""

    def finish(self) -> None:
        """Write what is pending and close."""


class TensorBoard:
    """Charts for TensorBoard.

    Args:
        folder: folder of the event files.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def log(self, data: dict[str, Any], step: int) -> None:
        """See ``Tracker``."""
        for name, value in data.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        """See ``Tracker``."""
        self.writer.close()


class RunLog:
    """Records in ``log.jsonl`` and, if requested, in charts.

    Args:
        path: the file; it is rewritten as a whole, so that it never ends in an incomplete line.
        trackers: receive every record.
    """

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()) -> None:
        self.path, self.trackers = path, trackers
        self.records: list[dict[str, Any]] = []

    def load(self, last_step: int) -> None:
        """Read the records of an interrupted run up to ``last_step``.

        Raises:
            InputError: the file is damaged.
        """
        if self.path.exists():
            with reading(self.path):
                records = map(json.loads, self.path.read_text().splitlines())
                self.records = [r for r in records if r["step"] <= last_step]

    @in_main_process
    def add(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self.records.append(record)
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        for tracker in self.trackers:
            tracker.log(record, step=record["step"])

    def close(self, summary: Mapping[str, float]) -> None:
        """Add the results of the finished run to the charts, at the last step."""
        step = self.records[-1]["step"] if self.records else 0
        for tracker in self.trackers:
            tracker.log(dict(summary), step=step)
            tracker.finish()
