import numpy as np

from tests.helpers import make_data


def test_leave_one_out_split():
    data = make_data([5, 3])
    data.item_ids[:] = [1, 2, 3, 4, 5, 6, 7, 8]
    assert data.targets("val").tolist() == [4, 7] and data.targets("test").tolist() == [5, 8]
    assert data.history_ends("train").tolist() == data.history_ends("val").tolist() == [3, 6]
    assert data.history_ends("test").tolist() == [4, 7]


def test_training_prefixes():
    data = make_data([5, 3, 6, 2])
    expected = [(0, 1), (0, 2), (8, 9), (8, 10), (8, 11)]  # 3, 1, 4 and 0 training items
    starts, ends = data.training_prefixes()
    assert list(zip(starts.tolist(), ends.tolist())) == expected


def test_training_counts():
    data = make_data([5, 4, 3], num_items=4)
    data.item_ids[:] = [1, 2, 1, 3, 4, 1, 4, 3, 3, 2, 2, 2]
    assert data.training_counts().tolist() == [0, 3, 2, 0, 1]


def test_num_repeated_targets():
    data = make_data([4, 3, 3])
    data.item_ids[:] = [2, 1, 3, 2, 4, 4, 5, 6, 7, 7]
    assert data.num_repeated_targets() == 2


def test_summary():
    data = make_data([5, 4], num_items=1234)
    assert data.summary() == "test: 2 users, 1,234 items, 9 interactions, mean length 4.50"
    assert data.num_users == 2 and data.num_items == 1234 and np.diff(data.offsets).sum() == 9
