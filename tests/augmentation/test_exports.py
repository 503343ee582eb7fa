"""Files for RecBole, SELFRec and OpenP5, read in the way of their loaders."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from augmentation.exports import export
from augmentation.merge import merge
from datasets import SequenceDataset
from tests.augmentation.helpers import random_interactions


@pytest.fixture(scope="module")
def merged(data: SequenceDataset) -> SequenceDataset:
    """The data set with generated interactions, and user names that need escaping."""
    names = [f'user "{n}"\t' for n in range(data.num_users)]
    interactions = random_interactions(data, 60, seed=1)
    return merge(replace(data, user_names=names), interactions, "before")


@pytest.fixture(scope="module")
def exports(merged: SequenceDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "exports"
    export(merged, folder, "toy")
    return folder


def test_recbole_files_hold_every_interaction_once(merged: SequenceDataset, exports: Path):
    folder = exports / "recbole" / "toy"
    header, *lines = (folder / "toy.inter").read_text().splitlines()
    assert header == "user_id:token\titem_id:token\ttimestamp:float"
    assert len(lines) == len(merged.item_ids)
    rows = [line.split("\t") for line in lines]
    for user in range(merged.num_users):
        user_rows = [row for row in rows if row[0] == f"user '{user}'"]
        sequence = merged.item_ids[merged.offsets[user] : merged.offsets[user + 1]]
        names = [merged.item_names[item] for item in sequence]
        positions = [str(position) for position in range(len(sequence))]
        assert [row[1:] for row in user_rows] == [list(pair) for pair in zip(names, positions)]
    header, *titles = (folder / "toy.item").read_text().splitlines()
    assert header == "item_id:token\ttitle:token_seq" and len(titles) == merged.num_items


def test_selfrec_files_hold_training_and_test_items(merged: SequenceDataset, exports: Path):
    folder = exports / "selfrec"
    train = [line.split() for line in (folder / "train.txt").read_text().splitlines()]
    counts = {item: n for item, n in enumerate(merged.training_counts().tolist()) if n}
    assert Counter(int(item) for _, item, _ in train) == Counter(counts)
    test = (folder / "test.txt").read_text().splitlines()
    assert test == [f"{user} {item} 1" for user, item in enumerate(merged.targets("test"))]
    for split, pairs in (("train", train), ("test", [line.split() for line in test])):
        lines = (folder / f"sequences_{split}.txt").read_text().splitlines()
        sequences = [
            [user, item, "1"]
            for user, items in (line.split(":") for line in lines)
            for item in items.split()
        ]
        assert sequences == pairs


def test_openp5_holds_out_the_last_two_items(merged: SequenceDataset, exports: Path):
    lines = (exports / "openp5" / "toy" / "user_sequence.txt").read_text().split("\n")
    assert lines.pop() == "" and len(lines) == merged.num_users
    for user, line in enumerate(lines):
        name, *items = line.split(" ")
        held_out = [merged.targets("val")[user], merged.targets("test")[user]]
        training = merged.item_ids[merged.offsets[user] : merged.history_ends("train")[user]]
        assert name == str(user) and items == [str(item) for item in [*training, *held_out]]


@pytest.mark.parametrize("names", [("NA", "b"), ('a"', "a'"), ("a  b", "a b")])
def test_ambiguous_names_become_numbers(
    names: tuple[str, str], data: SequenceDataset, tmp_path: Path
):
    users = [*names, *(f"u{n}" for n in range(2, data.num_users))]
    export(replace(data, user_names=users), tmp_path / "exports", "toy")
    table = pd.read_csv(tmp_path / "exports" / "recbole" / "toy" / "toy.inter", sep="\t")
    sizes = table.groupby("user_id:token").size()  # pandas drops missing values
    assert sizes.tolist() == np.diff(data.offsets).tolist()
