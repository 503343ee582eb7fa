"""What benchmarks share."""

import pytest

from benchmarks.common import print_slopes


def test_slopes(capsys: pytest.CaptureFixture[str]):
    rows = [{"n": n, "seconds": 3 * n**1.5, "mib": 2 * n} for n in (10, 100, 1000)]
    print_slopes(rows, "n", ("seconds", "mib"), "x: ")
    print_slopes(rows[:1], "n", ("seconds",))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "x: slope of seconds: 1.50 (1.50, 1.50)",
        "x: slope of mib: 1.00 (1.00, 1.00)",
    ]
