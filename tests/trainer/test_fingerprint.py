import subprocess
import sys

import pytest

from tests.helpers import ROOT
from trainer.fingerprint import fingerprint

SETTINGS = {"lr": 0.001, "metric_ks": (5, 10), "device": None, "search": False}


def test_the_same_settings_and_inputs():
    first = fingerprint(SETTINGS, b"data", b"weights")
    assert first == fingerprint(dict(SETTINGS), b"data", b"weights")
    assert len(first) == 64 and int(first, 16)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.002), ("metric_ks", (5, 10, 20)), ("device", "cpu")]
)
def test_other_settings(name: str, value: object):
    assert fingerprint(SETTINGS | {name: value}, b"data") != fingerprint(SETTINGS, b"data")
    less = {key: x for key, x in SETTINGS.items() if key != name}
    assert fingerprint(less, b"data") != fingerprint(SETTINGS, b"data")


def test_other_inputs():
    inputs = [(), (b"",), (b"a",), (b"ab",), (b"a", b"b"), (b"b", b"a"), (b"ab", b"")]
    assert len({fingerprint(SETTINGS, *x) for x in inputs}) == len(inputs)


def test_another_format_of_the_results(monkeypatch: pytest.MonkeyPatch):
    before = fingerprint(SETTINGS, b"data")
    monkeypatch.setattr("trainer.fingerprint.RESULTS_FORMAT", 10**6)
    assert fingerprint(SETTINGS, b"data") != before


def test_a_list_of_a_settings_file_equals_a_tuple():
    assert fingerprint({"metric_ks": [5, 10]}) == fingerprint({"metric_ks": (5, 10)})


def test_hash_seed_changes_nothing():
    code = "from trainer.fingerprint import fingerprint; print(fingerprint({'lr': 1}, b'x'))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "7")
    }  # fmt: skip
    assert outputs == {fingerprint({"lr": 1}, b"x") + "\n"}
