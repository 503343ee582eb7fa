"""``benchmarks.scale`` on its smallest sizes."""

import pytest

from benchmarks import scale
from tests.benchmarks.helpers import assert_rows, in_this_process, result


def test_every_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(scale, "LENGTHS", (10,))
    monkeypatch.setattr(scale, "in_own_process", in_this_process)
    scale.main(["--steps", "1", "--largest", "1000", "--data_root", "unused"])
    printed = result(capsys.readouterr().out)
    assert_rows(printed, "scale", "stage size seconds peak_mib scores_mib")
    stages = [row["stage"] for row in printed["rows"]]
    assert stages == [*scale.CATALOGUE_STAGES, "length", "users"]
    assert printed["rows"][0]["scores_mib"] == 2.4  # 64 x 10 positions, 1,000 items


def test_the_documented_sizes():
    cases = scale.cases(largest=10**6)
    assert len(cases) == 3 * 4 + 5 + 4
    assert {case.num_users for case in cases if case.stage == "users"} == set(scale.USERS)
