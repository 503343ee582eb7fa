"""``benchmarks/gpu_suite.sh`` with a stand-in for Python, and what it is prepared with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_prepare
from datasets import SequenceDataset
from tests.benchmarks.helpers import assert_rows, result
from tests.helpers import ROOT, load, load_custom

PARTS = {
    "correct": ["machine", "tests"],
    "fast": ["letters", "published", "scoring", "titles"],
    "whole": ["retriever", "terminated", "resumed", "augmentation"],
}
# Fails where FAIL is among its words, and waits for SIGTERM where a run is to be interrupted.
STAND_IN = """#!/bin/sh
case " $* " in
*" -c "*) exit 0 ;;
*"$FAIL"*) printf 'row\\r{"row": 1}\\nbroken\\n' >&2; exit 3 ;;
*--save_seconds*)
    trap 'exit 143' TERM
    mkdir -p "$CHECKPOINTS" && touch "$CHECKPOINTS/checkpoint.safetensors"
    for _ in 1 2 3 4 5 6 7 8 9; do sleep 0.3; done
    exit 1 ;;
*SLOW*) sleep 30 ;;
esac
echo "working"
echo '{"benchmark": "stand-in", "rows": []}'
"""


@pytest.fixture()
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def run_part(
    part: str, python: Path, out: Path, *, seconds: int = 60, fail: str = "nothing"
) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit status, output, and all results so far."""
    done = subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu_suite.sh"), part, str(seconds)],
        env={
            **os.environ, "PYTHON": str(python), "OUT": str(out), "KIT": str(out / "kit"),
            "FAIL": fail, "CHECKPOINTS": str(out / "ranker"),
        },
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return done.returncode, done.stdout + done.stderr, [json.loads(line) for line in lines]


@pytest.mark.parametrize("part", PARTS)
def test_every_step_runs_once(part: str, python: Path, tmp_path: Path):
    status, output, results = run_part(part, python, tmp_path / "out")
    assert status == 0, output
    assert [row["step"] for row in results] == PARTS[part]
    assert all(row["part"] == part and row["status"] == 0 for row in results)
    expected = {"benchmark": "stand-in", "rows": []}
    assert all(row["result"] == expected for row in results if row["step"] != "terminated")
    assert (tmp_path / "out" / f"{part}.log").read_text().count("status 0") == len(PARTS[part])
    status, output, again = run_part(part, python, tmp_path / "out")
    assert status == 0 and again == results and output.count("already done") == len(results)


def test_a_failure_does_not_stop_the_rest(python: Path, tmp_path: Path):
    out = tmp_path / "out"
    status, output, results = run_part("fast", python, out, fail="ranker_inference")
    assert status == 1 and "scoring: failed with status 3" in output
    assert [row["status"] for row in results] == [0, 0, 3, 0]
    assert results[2]["result"] == {"rows": [{"row": 1}]}  # measured before it failed
    status, output, results = run_part("fast", python, out)
    assert status == 0 and output.count("already done") == 3
    assert [(row["step"], row["status"]) for row in results[4:]] == [("scoring", 0)]


def test_time_limit(python: Path, tmp_path: Path):
    python.write_text(STAND_IN.replace("SLOW", "pytest"))
    status, output, results = run_part("correct", python, tmp_path / "out", seconds=3)
    assert status == 1
    assert [(row["step"], row["status"]) for row in results] == [("machine", 0), ("tests", 124)]
    status, output, results = run_part("whole", python, tmp_path / "none", seconds=0)
    assert status == 1 and not results and output.count("no time left") == 4


def test_unknown_part(python: Path, tmp_path: Path):
    status, output, _ = run_part("everything", python, tmp_path / "out")
    assert status == 2 and output.startswith("usage: ")


# The kit ----------------------------------------------------------------------------------------


def test_data_of_the_kit(toy_data: SequenceDataset, tmp_path: Path):
    gpu_prepare.write_movielens(toy_data, tmp_path / "ml-100k")
    gpu_prepare.write_games(toy_data, tmp_path / "games")
    for code in ("ml-100k", "games"):
        data = load(code, tmp_path, tmp_path / "cache")
        assert np.array_equal(data.item_ids, toy_data.item_ids)
        assert data.titles == toy_data.titles and data.user_names == toy_data.user_names
    gpu_prepare.write_small(toy_data, tmp_path / "small")
    files = {name: tmp_path / "small" / f"{name}.csv" for name in ("interactions", "items")}
    assert load_custom(files, tmp_path / "custom").num_users == toy_data.num_users


def test_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from benchmarks import gpu_machine

    monkeypatch.setattr(gpu_machine, "matmul_rate", lambda device: 2e12)
    gpu_machine.main([])
    printed = result(capsys.readouterr().out)
    assert_rows(printed, "gpu_machine", "python packages matmul_tflops variable_length_attention")
    (row,) = printed["rows"]
    assert row["matmul_tflops"] == 2 and row["packages"]["torch"]
    assert sys.version.startswith(row["python"])
