"""What is counted about added interactions."""

from pathlib import Path

import numpy as np
import pytest

from augmentation.merge import Interactions, save_augmented
from benchmarks import augmentation_hits
from benchmarks.augmentation_hits import cosines, describe, training_matrix
from benchmarks.common import add_data_flags, load_data, make_parser
from tests.benchmarks.helpers import assert_rows, result
from tests.helpers import make_data


def test_counts():
    data = make_data([6, 6, 8, 10], num_items=20)
    users = np.arange(4, dtype=np.int32)
    matrix = training_matrix(data)
    similarity = cosines(matrix)
    row = describe(data, matrix, similarity, Interactions(users, data.targets("test")))
    assert row["items"] == row["test"] == 4
    assert row["val"] == int((data.targets("test") == data.targets("val")).sum())
    assert row["test_quarters"] == [1, 1, 1, 1]
    assert row["chance"] == round(sum(1 / (20 - had.sum()) for had in matrix), 1)
    counts = data.training_counts()[data.targets("test")]
    assert row["interactions"] == round(float(counts.mean()), 1)
    distances = [
        np.abs(np.flatnonzero(had) - i).min() for had, i in zip(matrix, data.targets("test"))
    ]
    assert row["distance"] == np.median(distances)


def test_cosines():
    matrix = np.array([[0, 1, 1, 0], [0, 1, 0, 0]], dtype=np.float32)
    assert np.allclose(cosines(matrix)[1], [0, 0, 0.5**0.5, 0])


def test_rows(
    data_flags: list[str], tmp_path: Path, retrieved: Path, capsys: pytest.CaptureFixture[str]
):
    parser = make_parser(None)
    add_data_flags(parser)
    data = load_data("ml-100k", parser.parse_args(data_flags))
    added = Interactions(np.zeros(2, np.int32), np.array([1, 2], np.int32))
    (tmp_path / "run").mkdir()
    save_augmented(tmp_path / "run" / "augmented.npz", added, data.fingerprint)
    flags = ["--dataset_code", "ml-100k", *data_flags, "--runs", str(tmp_path / "run")]
    augmentation_hits.main([*flags, "--retriever", str(retrieved)])
    keys = "run items val test chance test_quarters interactions similarity distance rank"
    printed = result(capsys.readouterr().out)
    assert_rows(printed, "augmentation_hits", keys)
    assert [row["run"] for row in printed["rows"]] == ["test items", "run"]
    assert [row["items"] for row in printed["rows"]] == [data.num_users, 2]
