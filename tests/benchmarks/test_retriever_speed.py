"""``benchmarks.retriever_speed`` on toy data, run as documented."""

import subprocess
import sys

import pytest

from benchmarks.retriever_speed import main
from tests.benchmarks.helpers import assert_rows, result
from tests.helpers import ROOT

KEYS = "dataset model threads plain_step_ms step_ms step_ratio plain_eval_ms eval_ms eval_ratio"
FLAGS = ["--datasets", "ml-100k", "--rounds", "1", "--threads", "1"]


def test_all_models(data_flags: list[str]):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.retriever_speed", *data_flags, *FLAGS],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = result(done.stdout)
    assert_rows(printed, "retriever_speed", KEYS, preset="paper", loss_precision="float32")
    assert [row["model"] for row in printed["rows"]] == ["lru", "sas", "bert", "narm"]


def test_tuned_in_bfloat16(data_flags: list[str], capsys: pytest.CaptureFixture[str]):
    main([*data_flags, *FLAGS, "--models", "lru", "--preset", "tuned",
          "--loss_precision", "bfloat16"])  # fmt: skip
    printed = result(capsys.readouterr().out)
    assert_rows(printed, "retriever_speed", KEYS, preset="tuned", loss_precision="bfloat16")
