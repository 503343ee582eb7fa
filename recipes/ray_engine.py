"""Recommendations for a table of users on Ray, on one machine or on a cluster.

Ray Data runs a pool of actors, one for each core or GPU, and restarts those that fail. A task is
the number of a part. Each actor reads the table itself, up to its part, and writes the part's file.
No data passes through Ray, and the files are the same as those of a single process.

This module is imported only for ``--engine ray``: Ray is an optional requirement.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from errors import UserError
from recipes.bulk import Job, PartWriter
from recipes.people import People

ROOT = Path(__file__).parent.parent


class Worker:
    """An actor of the pool. It returns a ``UserError``: Ray would bury it in traces of its own.

    Args:
        job: the table.
        folder: working directory of the process that started Ray, for relative paths.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        os.chdir(folder)
        self.job = job
        self.writer: PartWriter | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write the parts of a batch, and return their numbers of users and error messages."""
        try:
            self.writer = self.writer or PartWriter(self.job)
            users = [self.writer.write(int(index)) for index in batch["item"]]
        except UserError as error:
            return {"users": np.zeros(1, int), "error": np.array([str(error)])}
        return {"users": np.array(users), "error": np.array([""] * len(users))}


class RayEngine:
    """Writes the parts of a table on Ray; see ``recipes.bulk.recommend_to_all``.

    Args:
        num_workers: actors, None for all cores, or all GPUs if the device is CUDA.
    """

    def __init__(self, num_workers: int | None) -> None:
        self.num_workers = num_workers

    def __call__(self, job: Job, people: People, sizes: Sequence[int]) -> Iterator[int]:
        """Write the missing parts, and yield the number of users of every part."""
        missing = [index for index in range(len(sizes)) if not job.part_path(index).exists()]
        done = set(range(len(sizes))) - set(missing)
        yield from (sizes[index] for index in done)
        if missing:
            yield from self._fill(job, missing)

    def _fill(self, job: Job, missing: list[int]) -> Iterator[int]:
        """Write some parts, and yield their numbers of users."""
        started_here = not ray.is_initialized()
        if started_here:
            start_ray(self.num_workers)
        try:
            available = ray.cluster_resources()
            on_gpus = job.device != "cpu" and "GPU" in available
            size = self.num_workers or int(available["GPU" if on_gpus else "CPU"])
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            parts = ray.data.from_items(missing, override_num_blocks=len(missing)).map_batches(
                Worker,
                fn_constructor_args=(job, Path.cwd()),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(size, len(missing))),
                num_gpus=1 if on_gpus else None,
                num_cpus=None if on_gpus else 1,
            )
            for row in parts.iter_rows():
                if row["error"]:
                    raise UserError(row["error"])
                yield int(row["users"])
        finally:
            if started_here:
                ray.shutdown()


def start_ray(num_cpus: int | None) -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start Ray on this machine."""
    options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}}}
    if "RAY_ADDRESS" not in os.environ:
        options |= {"num_cpus": num_cpus, "include_dashboard": False}
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
