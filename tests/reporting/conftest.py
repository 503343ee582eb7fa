"""Finished runs without training, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reporting.runs import Run

RETRIEVER = {
    "dataset_code": "custom", "data_fingerprint": "data", "model_code": "lru", "preset": "paper",
    "seed": 1, "dropout": 0.5, "weight_decay": 0.01,
    "num_users": 10, "num_items": 40, "num_interactions": 120,
}  # fmt: skip
RANKER = {
    "dataset_code": "custom", "data_fingerprint": "data", "llm_base_model": "tiny", "seed": 1,
    "retriever": RETRIEVER,
}  # fmt: skip


@pytest.fixture()
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Make a retriever's run in memory: ranks 1 to 10, of which the first five are retrieved.

    Keyword arguments that are not fields of a ``Run`` replace settings.
    """

    def make(**changes: Any) -> Run:
        values: dict[str, Any] = {
            "folder": tmp_path / "run",
            "settings": RETRIEVER,
            "ranks": np.arange(1, 11),
            "retrieved": np.arange(10) < 5,
        }
        values |= {name: changes.pop(name) for name in Run._fields if name in changes}
        return Run(**values | {"settings": values["settings"] | changes})

    return make


@pytest.fixture()
def ranker_settings() -> dict[str, Any]:
    """Settings of a ranker."""
    return dict(RANKER)


@pytest.fixture()
def write_retriever() -> Callable[..., Path]:
    """Write a retriever's run of ten users: targets 1 to 10 have ranks 1 to 10.

    The two candidates of each user include the target of the first five. Keyword arguments
    replace settings.
    """

    def write(folder: Path, **settings: Any) -> Path:
        folder.mkdir(parents=True)
        targets = np.arange(1, 11)
        items = np.stack([np.where(targets <= 5, targets, 20), np.full(10, 30)], axis=1)
        np.savez(
            folder / "candidates.npz",
            test_items=items,
            test_labels=targets,
            test_label_ranks=targets,
        )
        (folder / "config.json").write_text(json.dumps(RETRIEVER | settings))
        (folder / "test_metrics.json").write_text("{}")
        _write_log(folder)
        return folder

    return write


@pytest.fixture()
def write_ranker() -> Callable[..., Path]:
    """Write a ranker's run of ten users: ranks 1 to 10, fused ranks 2 to 11, five retrieved."""

    def write(folder: Path, **settings: Any) -> Path:
        folder.mkdir(parents=True)
        ranks = np.arange(1, 11)
        np.savez(
            folder / "rankings.npz",
            users=np.arange(5),
            label_ranks=ranks,
            fused_label_ranks=ranks + 1,
        )
        (folder / "config.json").write_text(json.dumps(RANKER | settings))
        (folder / "overall_metrics.json").write_text("{}")
        _write_log(folder)
        return folder

    return write


def _write_log(folder: Path) -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "val_NDCG@10": 0.1}]
    rows.append({"step": 4, "val_NDCG@10": 0.2})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
