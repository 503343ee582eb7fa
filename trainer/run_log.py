"""The log of a run: one record per validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distributed import in_main_process
from storage import atomic_path, reading


class RunLog:
    """Records in ``log.jsonl`` and, if requested, on Weights & Biases.

    Args:
        path: the file; it is rewritten as a whole, so that it never ends in half a line.
        tracker: a ``wandb`` run, or None.
    """

    def __init__(self, path: Path, tracker: Any | None = None) -> None:
        self.path, self.tracker = path, tracker
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
        if self.tracker:
            self.tracker.log(record, step=record["step"])
