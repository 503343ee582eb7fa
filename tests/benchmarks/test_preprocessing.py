"""``benchmarks.preprocessing`` on a small size."""

import pytest

from benchmarks import preprocessing
from tests.benchmarks.helpers import assert_rows, in_this_process, result


def test_every_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(preprocessing, "SIZES", (500, 2000, 10**9))
    monkeypatch.setattr(preprocessing, "ITEMS", 50)
    monkeypatch.setattr(preprocessing, "ROWS_PER_WRITE", 700)
    monkeypatch.setattr(preprocessing, "in_own_process", in_this_process)
    preprocessing.main(["--largest", "2000"])
    printed = result(capsys.readouterr().out)
    assert_rows(printed, "preprocessing", "interactions csv_mib kept seconds cpu_seconds peak_mib")
    assert [row["interactions"] for row in printed["rows"]] == [500, 2000]
    assert all(0 < row["kept"] <= row["interactions"] for row in printed["rows"])
