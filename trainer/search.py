"""Grid search of the retriever: one run for each point of the grid, side by side.

Every point is a run of ``train_retriever.py`` in a folder of its own, and resumes like any other;
a search that is started again therefore skips what is done and goes on with what is not.
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
from typing import Any, NamedTuple

from tqdm import tqdm

from config import UserError
from storage import atomic_path, read_json, write_json
from trainer.folder import LOG, SEARCH

POLL_SECONDS = 0.2
VALIDATION = "val_metrics.json"


class Point(NamedTuple):
    """One combination of the settings that are searched.

    Attributes:
        settings: value by flag.
        folder: where its run lies.
    """

    settings: dict[str, float]
    folder: Path

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.name


class _Job(NamedTuple):
    point: Point
    process: subprocess.Popen
    errors: Any
    slot: int


def grid(folder: Path, weight_decays: Sequence[float], dropouts: Sequence[float]) -> list[Point]:
    """All combinations of weight decay and dropout; both dropouts are one, as in the paper."""
    return [
        Point(
            {"weight_decay": decay, "dropout": dropout, "attn_dropout": dropout},
            folder / f"weight_decay_{decay:g}_dropout_{dropout:g}",
        )
        for decay, dropout in itertools.product(weight_decays, dropouts)
    ]


def _environment(slot: int, jobs: int, num_gpus: int) -> dict[str, str]:
    """What keeps the processes from getting in each other's way."""
    if num_gpus:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")  # the others may be somebody else's
        gpus = given.split(",") if given else [str(number) for number in range(num_gpus)]
        return {**os.environ, "CUDA_VISIBLE_DEVICES": gpus[slot % num_gpus]}
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, num_cores() // jobs))}


def num_cores() -> int:
    """Cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _end_with_parent() -> None:
    """Runs in the child, on Linux: should the search be killed, so are its runs."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run_points(
    points: Sequence[Point], command: Callable[[Point], list[str]], jobs: int, num_gpus: int
) -> None:
    """Run the points, ``jobs`` at a time.

    Args:
        points: the grid.
        command: the command line of a point's run.
        jobs: processes at once.
        num_gpus: GPUs the processes share out among them, 0 to run on the CPU.

    Raises:
        UserError: a run failed; the others are stopped and can be resumed.
    """
    waiting, running = list(points), []
    # What earlier searches have done is not in the rate, or it would promise too much.
    bar = tqdm(
        total=len(points), initial=_done(points), desc="search", unit="run", dynamic_ncols=True
    )
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                point = waiting.pop(0)
                slot = min(set(range(jobs)) - {job.slot for job in running})
                errors = tempfile.TemporaryFile()  # noqa: SIM115
                process = subprocess.Popen(
                    command(point),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env=_environment(slot, jobs, num_gpus),
                    preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                )
                running.append(_Job(point, process, errors, slot))
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                _check(job)
                best = read_json(job.point.folder / VALIDATION)
                bar.write(f"{job.point.name}: validation {_brief(best)}")
            bar.n = _done(points)
            bar.set_postfix_str(
                ", ".join(f"{j.point.name} at step {_steps(j.point)[0]:,}" for j in running)
            )
    finally:
        bar.close()
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()


def _check(job: _Job) -> None:
    job.errors.seek(0)
    lines = job.errors.read().decode(errors="replace").strip().splitlines()
    job.errors.close()
    if job.process.returncode:
        reason = lines[-1].removeprefix("error: ") if lines else "no message"
        raise UserError(
            f"the search's run {job.point.folder} failed: {reason} "
            "(the same command goes on with the search)"
        )


def _steps(point: Point) -> tuple[int, int]:
    """Steps of its run at the last validation, and how many they may become."""
    try:
        last = (point.folder / LOG).read_text().splitlines()[-1]
        total = json.loads((point.folder / "config.json").read_text())["total_steps"]
        return json.loads(last)["step"], total
    except (OSError, IndexError, ValueError, KeyError):
        return 0, 1


def _done(points: Sequence[Point]) -> float:
    """Runs that are done, each of the others by the share of its steps."""
    shares = []
    for point in points:
        step, total = _steps(point)
        shares.append(1 if (point.folder / VALIDATION).exists() else step / total)
    return round(sum(shares), 2)


def _brief(metrics: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k in ("Recall@10", "NDCG@10"))


def select(points: Sequence[Point], metric: str) -> tuple[Point, dict[str, Any]]:
    """The point with the best validation metric (the first of equals), and the search's record."""
    rows = [
        point.settings | {"folder": point.name, "val": read_json(point.folder / VALIDATION)}
        for point in points
    ]
    best = max(range(len(points)), key=lambda i: rows[i]["val"][metric])
    record = {"best_metric": metric, "selected": points[best].name, "points": rows}
    return points[best], record


def table(record: dict[str, Any]) -> str:
    """The search's record as lines of text, the selected point marked."""
    metrics = [m for m in ("Recall@10", "NDCG@10", "Recall@20") if m in record["points"][0]["val"]]
    metrics = list(dict.fromkeys([record["best_metric"], *metrics]))
    lines = [f"{'weight decay':>12} {'dropout':>8}" + "".join(f"{m:>12}" for m in metrics)]
    for row in record["points"]:
        values = "".join(f"{row['val'][m]:>12.4f}" for m in metrics)
        mark = "  selected" if row["folder"] == record["selected"] else ""
        lines.append(f"{row['weight_decay']:>12g} {row['dropout']:>8g}{values}{mark}")
    return "\n".join(lines)


def publish(point: Point, record: dict[str, Any], run_dir: Path, files: Sequence[str]) -> None:
    """Write ``search.json`` and copy the selected run's files beside it.

    Args:
        point: the selected point.
        record: of ``select``.
        run_dir: where they go; then it is a finished run like any other.
        files: names of the run's files, the one that marks it as finished last.
    """
    (run_dir / files[-1]).unlink(missing_ok=True)
    for name in files:
        with atomic_path(run_dir / name) as temporary:
            shutil.copyfile(point.folder / name, temporary)
    write_json(run_dir / SEARCH, record)
