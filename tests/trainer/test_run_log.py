import json
from pathlib import Path
from typing import Any

import pytest

from errors import InputError
from trainer.run_log import RunLog, TensorBoard


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

        def log(self, data: dict[str, Any], step: int) -> None:
            self.logged.append((data, step))

        def finish(self) -> None:
            self.logged.append(({}, -1))

    trackers = [Tracker(), Tracker()]
    log = RunLog(path, trackers)
    log.add({"step": 10, "loss": 0.5})
    log.close({"test_NDCG@10": 0.25})
    for tracker in trackers:
        assert tracker.logged == [
            ({"step": 10, "loss": 0.5}, 10), ({"test_NDCG@10": 0.25}, 10), ({}, -1),
        ]  # fmt: skip


def test_nothing_was_trained(path: Path):
    """A run of the augmentation that reuses an earlier adapter has a summary and no records."""
    pytest.importorskip("tensorboard")
    charts = TensorBoard(path.parent / "charts")
    RunLog(path, [charts]).close({"kept": 3})
    assert scalars(path.parent / "charts") == {"kept": [(0, 3.0)]}


def test_tensorboard(path: Path):
    pytest.importorskip("tensorboard")
    folder = path.parent / "charts"
    log = RunLog(path, [TensorBoard(folder)])
    log.add({"step": 10, "loss": 0.5})
    log = RunLog(path, [TensorBoard(folder)])  # the run is resumed
    log.load(last_step=10)
    log.add({"step": 20, "loss": 0.25})
    log.close({"test_NDCG@10": 0.125})
    assert scalars(folder) == {
        "step": [(10, 10.0), (20, 20.0)], "loss": [(10, 0.5), (20, 0.25)],
        "test_NDCG@10": [(20, 0.125)],
    }  # fmt: skip


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    charts = EventAccumulator(str(folder)).Reload()
    names = charts.Tags()["scalars"]
    return {name: [(x.step, x.value) for x in charts.Scalars(name)] for name in names}
