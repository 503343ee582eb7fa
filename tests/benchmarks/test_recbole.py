"""Comparisons with RecBole and trainings with it, where it is installed.

In RecBole's environment, which lacks other libraries, run this with ``--noconftest``.
"""

from pathlib import Path

import numpy as np
import pytest

from augmentation.exports import export_merged
from augmentation.merge import Interactions
from tests.benchmarks.helpers import assert_rows, result
from tests.helpers import make_data

pytest.importorskip("recbole")


def test_parity(capsys: pytest.CaptureFixture[str]):
    from benchmarks import recbole_parity

    recbole_parity.main([])
    printed = result(capsys.readouterr().out)
    assert_rows(printed, "recbole_parity", "model scores loss gradients")
    assert [row["model"] for row in printed["rows"]] == ["SASRec", "NARM"]


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "SASRec", "BERT4Rec"])
def test_downstream(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from benchmarks import recbole_downstream

    data = make_data([8] * 20)
    for name, users in (("none", 0), ("added", 20)):
        added = Interactions(np.arange(users), np.arange(users) + 1)
        export_merged(data, added, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    runs = ["none", "added"]
    recbole_downstream.main(["--model", model, "--runs", *runs, "--seeds", "1", "--epochs", "1"])
    assert {path.name for path in tmp_path.iterdir()} == set(runs), "RecBole's logs are left"
    real, added, *differences = result(capsys.readouterr().out)["rows"]
    assert list(real) == list(added) == "model run seed epochs recbole NDCG@10 Recall@10".split()
    assert [real["run"], added["run"]] == ["none", "added"]
    if model in ("BPR", "LightGCN"):  # without added items, RecBole leaves out the same
        assert real["recbole"] == real["NDCG@10"]
    for row in differences:
        metric = row["metric"]
        assert abs(added[metric] - real[metric] - row["mean"]) < 2e-4
        assert row["low"] <= row["mean"] <= row["high"]
