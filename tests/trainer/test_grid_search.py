"""The grid search: its points, selection on validation, and a killed search that is continued."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errors import UserError
from recipes.search import PROCESS_BYTES, check_jobs
from tests.helpers import ROOT, contents, run_script
from trainer import grid_search
from trainer.grid_search import Point, grid, num_cores, publish, run_points, select, table

# Points and selection ---------------------------------------------------------------------------


def test_grid(tmp_path: Path):
    points = grid(tmp_path, [0.0, 0.01], [0.1, 0.5])
    assert [point.settings for point in points] == [
        {"weight_decay": decay, "dropout": dropout, "attn_dropout": dropout}
        for decay, dropout in ((0.0, 0.1), (0.0, 0.5), (0.01, 0.1), (0.01, 0.5))
    ]
    assert [point.run_dir for point in points] == [tmp_path / point.name for point in points]
    assert points[2].name == "weight_decay_0.01_dropout_0.1"
    assert len({point.name for point in points}) == 4
    assert grid(tmp_path, [0.0, 0.01, 0.0], [0.1, 0.5, 0.1]) == points  # each point once


def test_more_processes_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipes.search.free_memory", lambda: 2 * PROCESS_BYTES)
    check_jobs(None, 3)
    check_jobs(1024, 2)  # no more than points
    with pytest.raises(
        UserError, match=r"--search_jobs 1024: the processes take at least 0\.3 GiB"
    ):
        check_jobs(1024, 3)


@pytest.fixture()
def finished_points(tmp_path: Path) -> list[Point]:
    """Three finished runs, of which the second has the best Recall@10 and the third ties."""
    points = grid(tmp_path / "search", [0.0], [0.1, 0.2, 0.5])
    for point, recall in zip(points, (0.1, 0.3, 0.3)):
        point.run_dir.mkdir(parents=True)
        metrics = {"Recall@10": recall, "NDCG@10": 0.5 - recall}
        (point.run_dir / "val_metrics.json").write_text(json.dumps(metrics))
        (point.run_dir / "model.safetensors").write_text(point.name)
    return points


def test_select(finished_points: list[Point]):
    best, record = select(finished_points, "Recall@10")
    assert best is finished_points[1]
    assert (record["best_metric"], record["selected"]) == ("Recall@10", best.name)
    assert record["points"][0] == {
        "weight_decay": 0.0, "dropout": 0.1, "attn_dropout": 0.1,
        "folder": "weight_decay_0_dropout_0.1", "val": {"Recall@10": 0.1, "NDCG@10": 0.4},
    }  # fmt: skip
    assert select(finished_points, "NDCG@10")[0] is finished_points[0]


def test_table(finished_points: list[Point]):
    lines = table(select(finished_points, "NDCG@10")[1]).splitlines()
    assert lines[0].split() == ["weight", "decay", "dropout", "NDCG@10", "Recall@10"]
    assert [line.split() for line in lines[1:]] == [
        ["0", "0.1", "0.4000", "0.1000", "selected"],
        ["0", "0.2", "0.2000", "0.3000"],
        ["0", "0.5", "0.2000", "0.3000"],
    ]


def test_publish(finished_points: list[Point], tmp_path: Path):
    best, record = select(finished_points, "Recall@10")
    (tmp_path / "val_metrics.json").write_text("of an earlier search")
    publish(best, record, tmp_path, ("model.safetensors", "val_metrics.json"))
    assert (tmp_path / "model.safetensors").read_text() == best.name
    assert json.loads((tmp_path / "val_metrics.json").read_text())["Recall@10"] == 0.3
    assert json.loads((tmp_path / "search.json").read_text()) == record


# Runs -------------------------------------------------------------------------------------------


def fake_run(code: str) -> Callable[[Point], list[str]]:
    """Command line of a run that executes ``code`` in its folder, ``folder``."""
    head = (
        "import json, os, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)\n"
    )
    finish = """\n(folder / "val_metrics.json").write_text('{"Recall@10": 0.5}')\n"""
    return lambda point: [sys.executable, "-c", head + code + finish, str(point.run_dir)]


def test_an_unfinished_run_counts_by_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("progress.LINE_SECONDS", 0)
    halfway = """
(folder / "config.json").write_text('{"total_steps": 1000}')
(folder / "log.jsonl").write_text('{"step": 250}\\n{"step": 500}\\n')
time.sleep(1)
"""
    run_points(grid(tmp_path, [0.0], [0.1, 0.2]), fake_run(halfway), jobs=1, num_gpus=0)
    shown = capsys.readouterr().err
    # The remaining time is known before the first run ends.
    assert " 0.5/2 [" in shown and "at step 500" in shown
    assert " 1.5/2 [" in shown and " 2/2 [" in shown


def test_runs_in_parallel_share_the_cores(tmp_path: Path):
    points = grid(tmp_path, [0.0], [0.1, 0.2, 0.3])
    code = """
(folder / "threads").write_text(os.environ["OMP_NUM_THREADS"])
(folder / "began").touch()
deadline = time.time() + 30
while len(list(folder.parent.glob("*/began"))) < 2 and time.time() < deadline: time.sleep(0.01)
"""
    run_points(points, fake_run(code), jobs=2, num_gpus=0)
    threads = [(point.run_dir / "threads").read_text() for point in points]
    assert threads == [str(max(1, num_cores() // 2))] * 3
    assert all(point.is_finished for point in points)


def test_a_failing_run_stops_the_others(tmp_path: Path):
    points = grid(tmp_path, [0.0], [0.1, 0.2, 0.3])
    code = """
if folder.name.endswith("0.2"):
    while not list(folder.parent.glob("*_0.1/began")): time.sleep(0.01)
    sys.exit("warning\\nerror: no such thing")
(folder / "began").touch()
time.sleep(60)
"""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        run_points(points, fake_run(code), jobs=2, num_gpus=0)
    folder = tmp_path / "weight_decay_0_dropout_0.2"
    assert str(caught.value) == f"run {folder} of the search failed (no such thing)"
    assert time.monotonic() - started < 30
    assert not points[0].is_finished and not points[2].run_dir.exists()


def test_runs_use_the_gpus_they_are_given(monkeypatch: pytest.MonkeyPatch):
    def gpus() -> list[str]:
        environments = [grid_search._environment(slot, 3, 2) for slot in range(3)]
        return [environment["CUDA_VISIBLE_DEVICES"] for environment in environments]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8932f937")
    assert gpus() == ["2", "GPU-8932f937", "2"]


# The whole search -------------------------------------------------------------------------------

GRID = [
    "--search", "--search_weight_decay", 0, 0.01, "--search_dropout", 0.1, 0.5,
    "--search_jobs", 2, "--max_steps", 120, "--val_iterations", 20, "--train_batch_size", 16,
    "--device", "cpu",
]  # fmt: skip


def processes_with(folder: Path) -> list[Path]:
    """Processes with the folder on their command line."""

    def words(command_line: Path) -> str:
        try:
            return command_line.read_bytes().decode(errors="replace")
        except OSError:  # the process has ended
            return ""

    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in words(path)]


def test_a_killed_search_ends_like_an_undisturbed_one(toy_flags: list, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run_script("train_retriever.py", *toy_flags, *GRID, "--export_root", whole)
    assert done.returncode == 0, done.stderr

    record: dict[str, Any] = json.loads((whole / "search.json").read_text())
    assert [(p["weight_decay"], p["dropout"]) for p in record["points"]] == [
        (0, 0.1), (0, 0.5), (0.01, 0.1), (0.01, 0.5)
    ]  # fmt: skip
    best = max(record["points"], key=lambda p: p["val"]["Recall@10"])
    assert record["selected"] == best["folder"] and record["best_metric"] == "Recall@10"
    config = json.loads((whole / "config.json").read_text())
    assert config["dropout"] == config["attn_dropout"] == best["dropout"]
    assert config["weight_decay"] == best["weight_decay"]
    for path in (whole / "search" / best["folder"]).iterdir():
        assert (whole / path.name).read_bytes() == path.read_bytes()
    selected = [line for line in done.stdout.splitlines() if line.endswith("selected")]
    assert len(selected) == 1 and f"{best['val']['Recall@10']:.4f}" in selected[0]

    command = [sys.executable, str(ROOT / "train_retriever.py"), *map(str, toy_flags)]
    command += [*map(str, GRID), "--export_root", str(broken)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    )
    while not list(broken.glob("search/*/test_metrics.json")):  # the first point is finished
        time.sleep(0.02)
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = list(broken.glob("search/*/test_metrics.json"))
    assert not (broken / "search.json").exists() and len(ended) < 4
    finished = {path: path.stat().st_mtime_ns for path in ended}
    if sys.platform == "linux":  # its runs end with it
        deadline = time.monotonic() + 60
        while processes_with(broken):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    done = run_script("train_retriever.py", *toy_flags, *GRID, "--export_root", broken)
    assert done.returncode == 0, done.stderr
    assert contents(broken) == contents(whole)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_a_failing_run_ends_the_search_with_its_message(toy_flags: list, tmp_path: Path):
    done = run_script(
        "train_retriever.py", *toy_flags, *GRID, "--lr", 1e30, "--export_root", tmp_path / "run"
    )
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    # Two start together, and either can be the first to fail.
    assert "weight_decay_0_dropout_0." in message and "the loss is nan" in message
    assert not (tmp_path / "run" / "search.json").exists()
