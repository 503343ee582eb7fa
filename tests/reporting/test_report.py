"""The script report.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.helpers import ROOT, run_script


def test_report_on_a_trained_run(retrieved: Path, tmp_path: Path):
    run = tmp_path / "lru" / "custom"
    shutil.copytree(retrieved, run)
    done = run_script("report.py", "--experiment_root", tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((run / "test_metrics.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert done.stdout == text + "\n"
    assert "| **LRURec, paper**, 1 seed | " in text and f" {metrics['NDCG@10']:.4f} (" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    files = ", ".join(str(tmp_path / f"report.{kind}") for kind in ("html", "md", "png"))
    assert done.stderr == f"written: {files}\n"
    assert "60 users, 40 items" in (tmp_path / "report.html").read_text()


def test_comparison(
    write_retriever: Callable[..., Path], write_ranker: Callable[..., Path], tmp_path: Path
):
    retriever = write_retriever(tmp_path / "retriever")
    seeds = [write_ranker(tmp_path / "ranker" / str(seed), seed=seed) for seed in (1, 2)]
    same = run_script("report.py", "--compare", retriever, seeds[0].parent)
    assert same.returncode == 0, same.stderr
    assert "= +0.0000, " in same.stdout and "p = 1.0000 (10 users, 2 and 1 seeds)" in same.stdout
    fused = ["--compare", retriever, seeds[0], "--metric", "Recall@5", "--fused"]
    assert "Recall@5: " in (line := run_script("report.py", *fused).stdout)
    assert "= -0.1000, " in line


def test_mistakes_are_one_line(write_retriever: Callable[..., Path], tmp_path: Path):
    run = write_retriever(tmp_path / "a" / "1")
    write_retriever(tmp_path / "a" / "2", dropout=0.125)
    damaged = write_retriever(tmp_path / "b")
    (damaged / "candidates.npz").write_bytes(b"")
    empty = tmp_path / "empty"
    compare = ["--compare", run, run]
    for flags, message in (
        (["--experiment_root", empty], f"--experiment_root {empty}: no finished run there"),
        (["--compare", run, empty], f"--compare {empty}: no finished run there"),
        (["--compare", run, run.parent], f"--compare {run.parent}: runs of several recipes"),
        ([*compare, "--metric", "NDCG@ten"], "--metric NDCG@ten: "),
        (["--experiment_root", damaged], f"{damaged} is damaged ("),
        (["--compare", damaged, run], f"{damaged} is damaged ("),
        (["--compare", run], "--compare: expected 2 arguments"),
        (["--unheard_of"], "unrecognized arguments: --unheard_of"),
    ):
        done = run_script("report.py", *flags)
        assert done.returncode == 2 and done.stdout == "", done
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1, done
        assert ("run it again" in done.stderr) == ("damaged" in message)


def test_starts_without_torch_and_matplotlib():
    code = "import report, sys; print({'torch', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    code = "import reporting.figures, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
