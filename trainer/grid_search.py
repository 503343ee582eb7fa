"""Grid search of the retriever: one run per point of the grid, several in parallel.

Every point is a run of ``train_retriever.py`` in a folder of its own and is resumed like any other.
A search that is started again therefore skips finished points and continues the others.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from errors import InputError
from progress import ProgressBar
from storage import atomic_path, read_json, write_json
from trainer.run_folder import CONFIG, LOG, SEARCH

POLL_SECONDS = 0.2
VALIDATION = "val_metrics.json"
SHOWN_METRICS = ("Recall@10", "NDCG@10", "Recall@20")
PR_SET_PDEATHSIG = 1


class Point(NamedTuple):
    """One combination of the searched settings.

    Attributes:
        settings: value by flag.
        run_dir: folder of its run.
    """

    settings: dict[str, float]
    run_dir: Path

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.run_dir.name

    @property
    def is_finished(self) -> bool:
        """Whether its run has finished."""
        return (self.run_dir / VALIDATION).exists()


class _Job(NamedTuple):
    """A run in progress; ``slot`` numbers the runs in parallel from 0."""

    point: Point
    process: subprocess.Popen
    errors: IO[bytes]
    slot: int


def grid(root: Path, weight_decays: Sequence[float], dropouts: Sequence[float]) -> list[Point]:
    """Build all combinations of weight decay and dropout; both dropouts are equal, as in the paper.

    Args:
        root: folder of the runs.
        weight_decays: values of the weight decay; repeated ones count once.
        dropouts: values of both dropouts; repeated ones count once.
    """
    return [
        Point(
            {"weight_decay": decay, "dropout": dropout, "attn_dropout": dropout},
            root / f"weight_decay_{decay:g}_dropout_{dropout:g}",
        )
        for decay, dropout in itertools.product(
            dict.fromkeys(weight_decays), dict.fromkeys(dropouts)
        )
    ]


def num_cores() -> int:
    """Number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_points(
    points: Sequence[Point], command: Callable[[Point], list[str]], jobs: int, num_gpus: int
) -> None:
    """Run all points of the grid.

    Args:
        points: the grid.
        command: command line of a point's run.
        jobs: runs in parallel.
        num_gpus: GPUs shared by the runs, 0 to run on the CPU.

    Raises:
        InputError: a run failed; the others are stopped and can be resumed.
    """
    jobs = min(jobs, len(points))
    waiting = list(points)
    running: list[_Job] = []
    # Finished points are the initial value, or the estimate of the remaining time would be too low.
    bar = ProgressBar(total=len(points), initial=_progress(points), desc="search", unit="run")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                slot = min(set(range(jobs)) - {job.slot for job in running})
                point = waiting.pop(0)
                running.append(_start(point, command(point), slot, jobs, num_gpus))
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                _check(job)
                metrics = read_json(job.point.run_dir / VALIDATION)
                bar.write(f"{job.point.name}: validation {_brief(metrics)}")
            bar.n = _progress(points)
            steps = (f"{job.point.name} at step {_steps(job.point)[0]:,}" for job in running)
            bar.set_postfix_str(", ".join(steps))
    finally:
        bar.close()
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()


def _start(point: Point, command: list[str], slot: int, jobs: int, num_gpus: int) -> _Job:
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=_environment(slot, jobs, num_gpus),
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    return _Job(point, process, errors, slot)


def _environment(slot: int, jobs: int, num_gpus: int) -> dict[str, str]:
    """Environment that gives each parallel run its share of the GPUs or cores."""
    if num_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
        return {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[slot % num_gpus]}
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, num_cores() // jobs))}


def _end_with_parent() -> None:
    """On Linux, let the kernel terminate a run if the search is killed; called in the child."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _check(job: _Job) -> None:
    job.errors.seek(0)
    lines = job.errors.read().decode(errors="replace").strip().splitlines()
    job.errors.close()
    if job.process.returncode:
        message = lines[-1].removeprefix("error: ") if lines else "no message"
        raise InputError(f"run {job.point.run_dir} of the search failed ({message})")


def _steps(point: Point) -> tuple[int, int]:
    """Steps of a run up to its last validation, and its total without early stopping."""
    try:
        last = (point.run_dir / LOG).read_text().splitlines()[-1]
        total = json.loads((point.run_dir / CONFIG).read_text())["total_steps"]
        return json.loads(last)["step"], total
    except (OSError, IndexError, ValueError, KeyError):
        return 0, 1


def _progress(points: Sequence[Point]) -> float:
    """Number of finished runs; an unfinished one counts by the fraction of its steps."""
    fractions = []
    for point in points:
        step, total = _steps(point)
        fractions.append(1 if point.is_finished else step / total)
    return round(sum(fractions), 2)


def _brief(metrics: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k in ("Recall@10", "NDCG@10"))


def select(points: Sequence[Point], metric: str) -> tuple[Point, dict[str, Any]]:
    """Select the point with the best validation metric; of equal ones, the first.

    Returns:
        The point, and the record of the search for ``search.json``.
    """
    rows: list[dict[str, Any]] = [
        {**point.settings, "folder": point.name, "val": read_json(point.run_dir / VALIDATION)}
        for point in points
    ]
    best = max(range(len(points)), key=lambda i: rows[i]["val"][metric])
    record = {"best_metric": metric, "selected": points[best].name, "points": rows}
    return points[best], record


def table(record: dict[str, Any]) -> str:
    """Format the record of a search as lines of text with the selected point marked."""
    metrics = [m for m in SHOWN_METRICS if m in record["points"][0]["val"]]
    metrics = list(dict.fromkeys([record["best_metric"], *metrics]))
    lines = [f"{'weight decay':>12} {'dropout':>8}" + "".join(f"{m:>12}" for m in metrics)]
    for row in record["points"]:
        values = "".join(f"{row['val'][m]:>12.4f}" for m in metrics)
        mark = "  selected" if row["folder"] == record["selected"] else ""
        lines.append(f"{row['weight_decay']:>12g} {row['dropout']:>8g}{values}{mark}")
    return "\n".join(lines)


def publish(point: Point, record: dict[str, Any], run_dir: Path, files: Sequence[str]) -> None:
    """Copy the selected run's files and write ``search.json`` next to them.

    Args:
        point: the selected point.
        record: record of the search.
        run_dir: destination, which is a finished run afterwards.
        files: names of the files; the last one marks the run as finished.
    """
    (run_dir / files[-1]).unlink(missing_ok=True)
    for name in files:
        with atomic_path(run_dir / name) as temporary:
            shutil.copyfile(point.run_dir / name, temporary)
    write_json(run_dir / SEARCH, record)
