"""The grid search: selection on validation, and a killed search that goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, contents, run_script
from trainer import search

GRID = [
    "--search", "true", "--search_weight_decay", 0, 0.01, "--search_dropout", 0.1, 0.5,
    "--search_jobs", 2, "--max_steps", 120, "--val_iterations", 20, "--train_batch_size", 16,
    "--device", "cpu",
]  # fmt: skip


def runs_in(folder: Path) -> list[Path]:
    """Processes with the folder on their command line."""

    def words(command_line: Path) -> str:
        try:
            return command_line.read_bytes().decode(errors="replace")
        except OSError:  # the process has ended
            return ""

    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in words(path)]


def test_killed_search_ends_as_an_undisturbed_one(toy_flags: list, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run_script("train_retriever.py", *toy_flags, *GRID, "--export_root", whole)
    assert done.returncode == 0, done.stderr

    record = json.loads((whole / "search.json").read_text())
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
    while not list(broken.glob("search/*/test_metrics.json")):  # the first of the points is done
        time.sleep(0.02)
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = list(broken.glob("search/*/test_metrics.json"))
    assert not (broken / "search.json").exists() and len(ended) < 4
    finished = {path: path.stat().st_mtime_ns for path in ended}
    if sys.platform == "linux":  # the search's runs ended with it
        deadline = time.monotonic() + 60
        while runs_in(broken):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    done = run_script("train_retriever.py", *toy_flags, *GRID, "--export_root", broken)
    assert done.returncode == 0, done.stderr
    assert contents(broken) == contents(whole)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_a_failing_run_ends_the_search_with_its_reason(toy_flags: list, tmp_path: Path):
    done = run_script(
        "train_retriever.py", *toy_flags, *GRID, "--lr", 1e30, "--export_root", tmp_path / "run"
    )
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    # Two begin together, and either can be the first to fail.
    assert "weight_decay_0_dropout_0." in message and "the loss is nan" in message
    assert not (tmp_path / "run" / "search.json").exists()


def test_a_run_under_way_counts_by_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture):
    points = search.grid(tmp_path, [0.0], [0.1, 0.2])
    halfway = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
(folder / "config.json").write_text('{"total_steps": 1000}')
(folder / "log.jsonl").write_text('{"step": 250}\\n{"step": 500}\\n')
time.sleep(1)
(folder / "val_metrics.json").write_text('{"Recall@10": 0.5}')
"""

    def command(point: search.Point) -> list[str]:
        return [sys.executable, "-c", halfway, str(point.folder)]

    search.run_points(points, command, jobs=1, num_gpus=0)
    shown = capsys.readouterr().err
    assert "| 0.5/2 [" in shown and "at step 500" in shown  # time left is known before a run ends
    assert "| 1.5/2 [" in shown and "| 2/2 [" in shown


def test_runs_keep_to_the_gpus_they_are_given(monkeypatch: pytest.MonkeyPatch):
    def gpus() -> list[str]:
        return [search._environment(slot, 3, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8932f937")
    assert gpus() == ["2", "GPU-8932f937", "2"]
