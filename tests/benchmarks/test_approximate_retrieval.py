"""``benchmarks.approximate_retrieval`` on the tests' run."""

from pathlib import Path

import pytest

pytest.importorskip("faiss")

from benchmarks import approximate_retrieval
from tests.benchmarks.helpers import assert_rows, result


def test_every_catalogue(retrieved: Path, capsys: pytest.CaptureFixture[str]):
    approximate_retrieval.main(["--run", str(retrieved), "--items", "200", "--users", "50"])
    printed = result(capsys.readouterr().out)
    keys = "catalogue items encode exact index build recall"
    assert_rows(printed, "approximate_retrieval", keys, run=str(retrieved))
    assert [row["catalogue"] for row in printed["rows"]] == ["of the run", "near", "gaussian"]
    assert [row["items"] for row in printed["rows"]] == [40, 200, 200]
    assert all(0 < row["recall"] <= 1 for row in printed["rows"])
