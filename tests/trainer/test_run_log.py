import json
from pathlib import Path
from typing import Any

import pytest

from errors import InputError
from trainer.run_log import RunLog


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_lines(path: Path):
    log = RunLog(path)
    records = [{"step": 10, "loss": 0.1 + 0.2}, {"step": 20, "loss": 1e-300}]
    for count, record in enumerate(records, 1):
        log.add(record)
        assert read(path) == records[:count]


def test_a_new_log_replaces_the_file(path: Path):
    path.write_text('{"step": 1}\n')
    RunLog(path).add({"step": 2})
    assert read(path) == [{"step": 2}]


def test_load_drops_records_after_the_checkpoint(path: Path):
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n')
    log = RunLog(path)
    log.load(last_step=20)
    log.add({"step": 25})
    assert read(path) == [{"step": 10}, {"step": 20}, {"step": 25}]


def test_load_without_a_file(path: Path):
    log = RunLog(path)
    log.load(last_step=20)
    assert log.records == []


@pytest.mark.parametrize("content", ["{", '{"step": 10}\n{"st', "{}\n", "[1]\n"])
def test_damaged_files(content: str, path: Path):
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        RunLog(path).load(last_step=20)
    assert str(caught.value).startswith(f"{path} is damaged (")


def test_records_are_tracked(path: Path):
    class Tracker:
        def __init__(self) -> None:
            self.logged: list[tuple[dict[str, Any], int]] = []

        def log(self, record: dict[str, Any], step: int) -> None:
            self.logged.append((record, step))

    tracker = Tracker()
    RunLog(path, tracker).add({"step": 10, "loss": 0.5})
    assert tracker.logged == [({"step": 10, "loss": 0.5}, 10)]
