"""Generated interactions on disk and in the training part of a data set."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from augmentation.merge import Interactions, load_augmented, merge, save_augmented
from augmentation.prompts import training_history
from dataloader.sequences import TrainingWindows
from datasets import SequenceDataset
from errors import ArgumentError, InputError
from tests.augmentation.helpers import random_interactions


@pytest.fixture(scope="module")
def interactions(data: SequenceDataset) -> Interactions:
    return random_interactions(data, 60, seed=1)


@pytest.mark.parametrize("position", ["before", "after"])
def test_merging_changes_the_training_part_only(
    data: SequenceDataset, interactions: Interactions, position: str
):
    merged = merge(data, interactions, position)
    for user in range(data.num_users):
        real = training_history(data, user).tolist()
        generated = interactions.items[interactions.users == user].tolist()
        expected = generated + real if position == "before" else real + generated
        assert training_history(merged, user).tolist() == expected
    for split in ("val", "test"):
        assert np.array_equal(merged.targets(split), data.targets(split))
    counts = np.bincount(interactions.items, minlength=data.num_items + 1)
    assert np.array_equal(merged.training_counts(), data.training_counts() + counts)


def test_training_windows_hold_every_merged_item(data: SequenceDataset, interactions: Interactions):
    merged = merge(data, interactions, "before")
    windows = TrainingWindows(merged, 100, 1.0)
    labels = windows.__getitems__(list(range(len(windows))))[0]["labels"]
    counts = {item: n for item, n in enumerate(merged.training_counts().tolist()) if n}
    assert Counter(labels.tolist()) == Counter(counts)


@pytest.mark.parametrize("position", ["before", "after"])
def test_merging_nothing_changes_nothing(data: SequenceDataset, position: str):
    merged = merge(data, Interactions(*(np.empty(0, np.int32) for _ in range(2))), position)
    assert np.array_equal(merged.item_ids, data.item_ids)
    assert np.array_equal(merged.offsets, data.offsets)


def test_file_of_interactions(data: SequenceDataset, interactions: Interactions, tmp_path: Path):
    path = tmp_path / "augmented.npz"
    save_augmented(path, interactions, data.fingerprint)
    for loaded, expected in zip(load_augmented(tmp_path, data), interactions):
        assert np.array_equal(loaded, expected) and loaded.dtype == np.int32
    with pytest.raises(InputError, match="another data set"):
        load_augmented(tmp_path, replace(data, fingerprint="other"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_augmented(tmp_path, data)
    path.unlink()
    with pytest.raises(ArgumentError, match=r"no augmented\.npz there") as error:
        load_augmented(tmp_path, data)
    assert error.value.argument == "folder"


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        ([0, 1], [1], "the same length"),
        ([1, 0], [1, 1], "ascend"),
        ([-1, 0], [1, 1], "ascend"),
        ([0, 25], [1, 1], "below 25"),
        ([0, 1], [1, 0], "from 1 to 2500"),
        ([0, 1], [1, 2501], "from 1 to 2500"),
        ([0.0, 1.0], [1, 1], "integer"),
    ],
)
def test_invalid_interactions_are_refused(
    users: list, items: list, message: str, data: SequenceDataset, tmp_path: Path
):
    interactions = Interactions(np.array(users), np.array(items))
    save_augmented(tmp_path / "augmented.npz", interactions, data.fingerprint)
    with pytest.raises(InputError, match=message):
        load_augmented(tmp_path, data)
