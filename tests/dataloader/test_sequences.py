"""Jagged batches against the same computation on lists of items."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataloader.sequences import Histories, MaskedWindows, Prefixes, TrainingWindows
from datasets import SequenceDataset
from tests.helpers import make_data

user_lengths = st.lists(st.integers(3, 30), min_size=1, max_size=8)


def split_sequences(batch: dict[str, Any]) -> list[list[int]]:
    """Items of each sequence of a batch."""
    item_ids, positions, max_length, _ = batch["sequences"]
    starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
    sequences = [item_ids[a:b].tolist() for a, b in pairwise(starts)]
    assert positions.tolist() == [i for x in sequences for i in range(len(x))]
    assert max_length == max(map(len, sequences))
    return sequences


def user_sequences(data: SequenceDataset) -> list[list[int]]:
    """Items of each user."""
    return [data.item_ids[a:b].tolist() for a, b in pairwise(data.offsets)]


# Training windows -------------------------------------------------------------------------------


def test_windows_follow_the_published_rule():
    data = make_data([9 + 2, 10 + 2, 19 + 2, 20 + 2, 35 + 2])  # 2 items are held out
    windows = TrainingWindows(data, max_len=10, window_stride=1.0)
    lengths = (windows.ends - windows.starts).tolist()
    assert lengths == [9, 10, 19, 10, 10, 10, 10, 10]
    assert windows.users.tolist() == [0, 1, 2, 3, 3, 4, 4, 4]
    ends = data.history_ends("train")
    assert windows.ends[-3:].tolist() == [ends[4], ends[4] - 10, ends[4] - 20]
    (batch,) = windows.__getitems__([2])  # 19 items: the last 10 are labels, no start token
    first = data.offsets[2]
    assert batch["labels"].tolist() == data.item_ids[first + 9 : first + 19].tolist()
    assert split_sequences(batch) == [data.item_ids[first + 8 : first + 18].tolist()]
    (batch,) = windows.__getitems__([0])  # 9 items: the start token and 8 of them are inputs
    assert split_sequences(batch) == [[0], data.item_ids[:8].tolist()]
    assert batch["labels"].tolist() == data.item_ids[:9].tolist()


@given(user_lengths, st.integers(2, 12), st.sampled_from([0.5, 1.0]), st.integers(0, 3))
def test_every_position_predicts_the_next_item(
    lengths: list[int], max_len: int, stride: float, seed: int
):
    data = make_data(lengths, seed=seed)
    windows = TrainingWindows(data, max_len, stride)
    training_items = [items[:-2] for items in user_sequences(data)]
    for number in range(len(windows)):
        (batch,) = windows.__getitems__([number])
        user = windows.users[number]
        assert (batch["users"], batch["num_targets"]) == ([user], len(batch["labels"]))
        assert batch["sequences"].scored is None
        start, end = (x[number] - data.offsets[user] for x in (windows.starts, windows.ends))
        window = training_items[user][start:end]
        assert len(window) == end - start
        labels = window[-max_len:]
        assert batch["labels"].tolist() == labels
        assert batch["sequences"].item_ids.tolist() == ([0, *window])[-len(labels) - 1 : -1]


@given(user_lengths, st.integers(2, 12))
def test_batches_concatenate_windows(lengths: list[int], max_len: int):
    data = make_data(lengths)
    for windows in (TrainingWindows(data, max_len, 1.0), MaskedWindows(data, max_len, 1.0, 0.0, 0)):
        numbers = [*range(len(windows)), len(windows)]  # the last one is in the next epoch
        (batch,) = windows.__getitems__(numbers)
        alone = [windows.__getitems__([number])[0] for number in numbers]
        assert split_sequences(batch) == [x for one in alone for x in split_sequences(one)]
        assert batch["labels"].tolist() == [x for one in alone for x in one["labels"].tolist()]
        assert batch["users"] == [user for one in alone for user in one["users"]]


@given(user_lengths, st.integers(2, 12), st.floats(0, 0.9), st.integers(0, 3))
def test_masked_items_are_the_labels(lengths: list[int], max_len: int, mask_prob: float, seed: int):
    data = make_data(lengths, seed=seed)
    windows = MaskedWindows(data, max_len, 1.0, mask_prob, seed)
    (batch,) = windows.__getitems__(list(range(len(windows))))
    scored = batch["sequences"].scored
    masked = batch["sequences"].item_ids == data.num_items + 1
    assert torch.equal(masked.nonzero()[:, 0], scored)
    assert batch["users"] == windows.users.tolist()
    assert batch["num_targets"] == len(batch["labels"])
    whole = batch["sequences"].item_ids.clone()
    whole[scored] = batch["labels"]
    filled = {"sequences": batch["sequences"]._replace(item_ids=whole)}
    expected = [
        data.item_ids[start:end][-max_len:].tolist()
        for start, end in zip(windows.starts, windows.ends)
    ]
    assert split_sequences(filled) == expected
    for masked_window in split_sequences(batch):  # there is always something to predict
        assert data.num_items + 1 in masked_window


def test_masked_share():
    data = make_data([402] * 50)
    (batch,) = MaskedWindows(data, 400, 1.0, 0.25, 0).__getitems__(list(range(50)))
    share = len(batch["labels"]) / len(batch["sequences"].item_ids)
    assert share == pytest.approx(0.25, abs=0.01)
    (batch,) = MaskedWindows(data, 400, 1.0, 0.0, 0).__getitems__(list(range(50)))
    assert batch["sequences"].scored.tolist() == list(range(399, 20_000, 400))  # the last items


def test_masks_depend_on_the_seed_and_the_numbers_alone():
    data = make_data([20, 30, 40])
    numbers = list(range(len(TrainingWindows(data, 10, 1.0))))

    def masks(seed: int, epoch: int) -> list[int]:
        windows = MaskedWindows(data, 10, 1.0, 0.3, seed)
        (batch,) = windows.__getitems__([n + epoch * len(windows) for n in numbers])
        return batch["sequences"].scored.tolist()

    assert masks(7, 0) == masks(7, 0)
    assert masks(7, 0) != masks(7, 1)
    assert masks(7, 0) != masks(8, 0)


# Histories --------------------------------------------------------------------------------------


@given(user_lengths, st.integers(2, 12), st.integers(0, 3))
def test_histories(lengths: list[int], max_len: int, seed: int):
    data = make_data(lengths, seed=seed)
    sequences = user_sequences(data)
    users = list(range(len(lengths)))
    for split, held_out in (("val", 2), ("test", 1)):
        for mask_token in (None, 99):
            histories = Histories(data, split, max_len, mask_token)
            assert len(histories) == len(users)
            batch = histories.__getitems__(users)
            extra = [] if mask_token is None else [mask_token]
            expected = [(items[:-held_out] + extra)[-max_len:] for items in sequences]
            assert split_sequences(batch) == expected
            last = np.cumsum([len(items) for items in expected]) - 1
            assert batch["sequences"].scored.tolist() == last.tolist()
            assert batch["targets"].tolist() == [items[-held_out] for items in sequences]
            for user in users:
                seen = batch["history_items"][batch["history_rows"] == user].tolist()
                assert seen == sequences[user][:-held_out]


def test_examples_in_any_order():
    data = make_data([5, 9, 7])
    batch = Histories(data, "test", 4).__getitems__([2, 0, 2])
    sequences = user_sequences(data)
    assert split_sequences(batch) == [sequences[user][-5:-1] for user in (2, 0, 2)]
    assert batch["targets"].tolist() == [sequences[user][-1] for user in (2, 0, 2)]
    assert batch["history_rows"].tolist() == [0] * 6 + [1] * 4 + [2] * 6


def test_a_mask_token_does_not_change_the_data():
    data = make_data([5, 9, 7])
    before = data.item_ids.copy()
    Histories(data, "val", 4, mask_token=31).__getitems__([0, 1, 2])
    MaskedWindows(data, 4, 1.0, 0.5, 0).__getitems__([0, 1, 2])
    assert np.array_equal(data.item_ids, before)


@given(user_lengths, st.integers(2, 12), st.sampled_from([None, 99]))
def test_prefixes(lengths: list[int], max_len: int, mask_token: int | None):
    data = make_data(lengths)
    prefixes = Prefixes(data, max_len, mask_token)
    expected = [
        (items[:end], items[end])
        for items in user_sequences(data)
        for end in range(1, len(items) - 2)
    ]
    assert len(prefixes) == len(expected)
    if not expected:
        return
    batch = prefixes.__getitems__(list(range(len(expected))))
    extra = [] if mask_token is None else [mask_token]
    histories, targets = zip(*expected)
    assert split_sequences(batch) == [(history + extra)[-max_len:] for history in histories]
    assert batch["targets"].tolist() == list(targets)
    rows = [batch["history_rows"] == row for row in range(len(expected))]
    assert [batch["history_items"][row].tolist() for row in rows] == list(histories)


# The split --------------------------------------------------------------------------------------


@given(user_lengths, st.integers(2, 12), st.sampled_from([0.5, 1.0]))
def test_held_out_items_never_reach_training(lengths: list[int], max_len: int, stride: float):
    data = make_data(lengths, num_items=sum(lengths))
    data.item_ids[:] = np.arange(1, sum(lengths) + 1)  # no item occurs twice
    held_out = {*data.targets("val").tolist(), *data.targets("test").tolist()}
    for examples in (
        TrainingWindows(data, max_len, stride),
        MaskedWindows(data, max_len, stride, 0.3, 0),
    ):
        (batch,) = examples.__getitems__(list(range(len(examples))))
        seen = {*batch["sequences"].item_ids.tolist(), *batch["labels"].tolist()}
        assert not seen & held_out
    prefixes = Prefixes(data, max_len)
    if len(prefixes):
        batch = prefixes.__getitems__(list(range(len(prefixes))))
        seen = {*batch["sequences"].item_ids.tolist(), *batch["targets"].tolist()}
        assert not seen & held_out
    counts = data.training_counts()
    assert not counts[list(held_out)].any() and counts.sum() == sum(lengths) - 2 * len(lengths)
