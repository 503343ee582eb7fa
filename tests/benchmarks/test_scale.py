"""``benchmarks.scale`` on its smallest sizes."""

import pytest

from benchmarks import scale
from tests.benchmarks.helpers import assert_rows, in_this_process, result


def test_every_stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(scale, "LENGTHS", (10,))
    monkeypatch.setattr(scale, "CANDIDATE_USERS", (100,))
    monkeypatch.setattr(scale, "in_own_process", in_this_process)
    scale.main(["--steps", "1", "--largest", "1000", "--data_root", "unused"])
    printed = result(capsys.readouterr().out)
    rows = printed["rows"]
    assert [row["stage"] for row in rows] == list(scale.STAGES)
    keys = "stage size seconds peak_mib scores_mib"
    steps, candidates = rows[: -len(scale.CANDIDATE_STAGES)], rows[-len(scale.CANDIDATE_STAGES) :]
    assert_rows(printed | {"rows": steps}, "scale", keys)
    assert_rows(printed | {"rows": candidates}, "scale", f"{keys} result_mib")
    assert rows[0]["scores_mib"] == 2.4  # 64 x 10 positions, 1,000 items
    assert candidates[0]["result_mib"] == 0.2  # 1,000 users, 20 candidates


def test_the_documented_sizes():
    cases = scale.cases(largest=10**7)
    assert len(cases) == 3 * 4 + 5 + 5 + 4 + 3
    assert {case.num_users for case in cases if case.stage == "users"} == set(scale.USERS)
