"""Recommendations for a table of users on Ray: the files of one process, whatever is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

import recommend
from datasets import SequenceDataset
from errors import UserError
from tests.helpers import ROOT, copy_run

pytest.importorskip("ray")


@pytest.fixture()
def flags(retrieved: Path, toy_data: SequenceDataset, tmp_path: Path) -> list[str]:
    """Flags of a run and all users of the data set, one per file."""
    path = tmp_path / "users.csv"
    pd.DataFrame({"user": [*toy_data.user_names, "stranger"]}).to_csv(path, index=False)
    return [
        "--run", str(retrieved), "--input", str(path), "--k", "5", "--part_users", "1",
        "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture()
def expected(flags: list[str], tmp_path: Path) -> dict[str, bytes]:
    """The files of one process."""
    recommend.main([*flags, "--output", str(tmp_path / "local")])
    return files(tmp_path / "local")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(*flags: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "recommend.py"), *flags, "--engine", "ray"]
    return subprocess.Popen(
        [*command, "--num_workers", "2"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_worker_niceness": "0"},  # other tests run beside this one
    )


def wait_for_parts(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while len(list(folder.glob("part-*.parquet"))) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def workers(driver: int) -> list[int]:
    """Processes of the pool."""
    below = psutil.Process(driver).children(recursive=True)
    return [process.pid for process in below if "MapWorker" in " ".join(process.cmdline())]


def test_same_files_whatever_is_killed(
    flags: list[str], expected: dict[str, bytes], tmp_path: Path
):
    output = tmp_path / "out"
    first = start(*flags, "--output", str(output))
    wait_for_parts(output, 2)
    os.kill(workers(first.pid)[0], signal.SIGKILL)
    wait_for_parts(output, 12)
    first.kill()
    first.wait()
    assert 12 <= len(list(output.glob("part-*.parquet"))) < 60
    second = start(*flags, "--output", str(output), "--resume")
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert "note: users not in the data set are left out: 1, the first: stranger" in errors
    assert files(output) == expected


def test_a_mistake_of_an_actor_is_one_line(flags: list[str], tmp_path: Path, retrieved: Path):
    run = copy_run(retrieved, tmp_path / "run")
    (run / "model.safetensors").write_bytes(b"damaged")
    process = start(*flags, "--run", str(run), "--output", str(tmp_path / "out"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith(f"error: {run}: cannot load the retriever")


def test_ray_is_optional(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recommend, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--engine ray needs Ray: pip install -r"):
        recommend.main([*flags, "--output", str(tmp_path / "out"), "--engine", "ray"])
