"""Grid search of the retriever: train every point and keep the best in validation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import cuda

from config import RetrieverConfig
from datasets import SequenceDataset
from errors import UserError, advice
from model.hub import BaseModel
from process import free_memory
from recipes.fit_retriever import TEST_METRICS, title_encodings
from recipes.training import print_metrics
from trainer.grid_search import Point, grid, num_cores, publish, run_points, select, table
from trainer.run_folder import CONFIG, LOG, SEARCH_RUNS, RunFolder

PROCESS_BYTES = 100 << 20  # an interpreter with torch takes more


def search(
    config: RetrieverConfig,
    data: SequenceDataset,
    run: RunFolder,
    encoder: BaseModel | None,
    command: Sequence[str],
) -> None:
    """Train every point of the grid and publish the best, selected on validation, as this run.

    Args:
        config: all settings.
        data: the data set.
        run: the run's folder, reserved for this process.
        encoder: text encoder whose title encodings initialize the item embeddings.
        command: the command line of this search, script included.
    """
    points = grid(run.path / SEARCH_RUNS, config.search_weight_decay, config.search_dropout)
    check_jobs(config.search_jobs, len(points))
    if encoder:
        title_encodings(config, data, encoder)  # once, for the cache
    if config.overwrite:
        run.clear()
    num_gpus = 0 if config.device == "cpu" else cuda.device_count()
    with advice("to continue, run the same command without --overwrite"):
        run_points(
            points,
            lambda point: [sys.executable, *command, *_flags(config, point)],
            config.search_jobs or num_gpus or num_cores(),
            num_gpus,
        )
    best, record = select(points, config.best_metric)
    publish(best, record, run.path, (CONFIG, LOG, *run.outputs))
    print(table(record))
    print(f"\n{data.code}, {config.model_code}, {best.name}")
    print_metrics(run.path / TEST_METRICS, "test")
    print(f"\nwritten to {run.path}")


def check_jobs(jobs: int | None, num_points: int) -> None:
    """Refuse more processes at once than there can be memory for.

    Args:
        jobs: the flag's value.
        num_points: points of the grid.

    Raises:
        UserError: the interpreters alone would take more memory than is free.
    """
    needed, free = min(jobs or 0, num_points) * PROCESS_BYTES, free_memory()
    if needed > free:
        raise UserError(
            f"--search_jobs {jobs}: the processes take at least {needed / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB are free: use fewer"
        )


def _flags(config: RetrieverConfig, point: Point) -> list[str]:
    """Flags of a point's run; on a command line they override earlier ones."""
    values: dict[str, str | float | Path | None] = {
        "search": "false",
        "resume": "true",
        "overwrite": "false",
        "dataset_code": config.dataset_code,
        **point.settings,
        "export_root": point.run_dir,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]
