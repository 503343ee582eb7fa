"""The benchmark of constrained decoding with a tiny language model on toy data."""

import pytest

from benchmarks import constrained_decoding
from tests.benchmarks.helpers import assert_rows, result


@pytest.mark.usefixtures("tiny_model")
def test_constrained_decoding(data_flags: list[str], capsys: pytest.CaptureFixture[str]):
    flags = ["--users", "5", "--rounds", "2", "--max_new_tokens", "12"]
    constrained_decoding.main([*data_flags, *flags])
    printed = result(capsys.readouterr().out)
    assert_rows(
        printed,
        "constrained_decoding",
        "model mode users prompt_tokens read_s plain_s ours_s speedup ended same_texts",
    )
    assert [row["mode"] for row in printed["rows"]] == ["greedy", "sampling"] * 2
