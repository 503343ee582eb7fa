"""``benchmarks.recommend_table`` on a few users."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import recommend_table
from datasets import SequenceDataset
from tests.benchmarks.helpers import assert_rows, in_this_process, result


def test_every_row(
    retrieved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(recommend_table, "in_own_process", in_this_process)
    recommend_table.main(["--run", str(retrieved), "--users", "3", "12"])
    printed = result(capsys.readouterr().out)
    keys = "users seconds users_per_second peak_mib"
    assert_rows(printed, "recommend_table", keys, run=str(retrieved))
    assert [row["users"] for row in printed["rows"]] == [3, 12]


def test_new_users_have_histories_of_real_ones(toy_data: SequenceDataset, tmp_path: Path):
    recommend_table.write_table(tmp_path / "table.parquet", toy_data, 20)
    table = pd.read_parquet(tmp_path / "table.parquet")
    real = {
        tuple(toy_data.item_names[item] for item in toy_data.item_ids[a:b])
        for a, b in zip(toy_data.offsets, toy_data.offsets[1:])
    }
    drawn = table.groupby("user", sort=False)["item"].apply(tuple)
    assert len(drawn) == 20 and set(drawn) <= real
