"""Comparisons with RecBole, where it is installed."""

import pytest

pytest.importorskip("recbole")


def test_parity(capsys: pytest.CaptureFixture[str]):
    from benchmarks import recbole_parity
    from tests.benchmarks.helpers import assert_rows, result

    recbole_parity.main([])
    printed = result(capsys.readouterr().out)
    assert_rows(printed, "recbole_parity", "model scores loss gradients")
    assert [row["model"] for row in printed["rows"]] == ["SASRec", "NARM"]
