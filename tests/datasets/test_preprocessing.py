from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.base import Filters, RawData
from datasets.preprocessing import build, k_core
from datasets.tables import read_interactions
from errors import ArgumentError, InputError
from tests.helpers import load, toy_interactions


@pytest.mark.parametrize(
    ("code", "users", "items", "interactions", "length"),
    [
        ("ml-100k", 610, 3650, 90274, 147.99),
        ("beauty", 22332, 12086, 198215, 8.88),
        ("games", 15264, 7676, 147861, 9.69),
    ],
)
def test_statistics_equal_table_2(
    code: str, users: int, items: int, interactions: int, length: float, shared: Path, tmp_path
):
    data = load(code, shared / "data", tmp_path)
    assert (data.num_users, data.num_items, len(data.item_ids)) == (users, items, interactions)
    assert f"mean length {length:.2f}" in data.summary()
    assert np.bincount(data.item_ids)[1:].min() >= 5
    assert np.diff(data.offsets).min() >= 5
    assert all(data.titles[1:]) and not any("\n" in title for title in data.titles)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_k_core_equals_one_removal_at_a_time(pairs: list, min_uc: int, min_sc: int):
    users = np.array([user for user, _ in pairs], dtype=np.int64)
    items = np.array([item for _, item in pairs], dtype=np.int64)
    remaining = list(range(len(pairs)))
    while True:
        user_counts = Counter(pairs[n][0] for n in remaining)
        item_counts = Counter(pairs[n][1] for n in remaining)
        too_rare = [
            n
            for n in remaining
            if user_counts[pairs[n][0]] < min_uc or item_counts[pairs[n][1]] < min_sc
        ]
        if not too_rare:
            break
        remaining.remove(too_rare[0])
    assert np.flatnonzero(k_core(users, items, min_uc, min_sc)).tolist() == remaining


def frame(rows: list[tuple]) -> pd.DataFrame:
    """Interactions without ratings."""
    table = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    return table.assign(rating=np.inf)


def test_sequences_are_in_order_of_time_and_item():
    rows = [("7", "10", 3), ("7", "9", 3), ("7", "2", 1), ("10", "2", 5), ("10", "9", 4)]
    rows += [("10", "10", 6)]
    titles = {"2": "two", "9": "nine", "10": "ten"}
    data = build("x", RawData(frame(rows), titles), Filters(min_uc=3, min_sc=1))
    assert data.user_names == ["7", "10"] and data.item_names[1:] == ["2", "9", "10"]
    assert data.titles == ["", "two", "nine", "ten"]
    assert data.item_ids.tolist() == [1, 2, 3, 2, 1, 3]  # 9 before 10 at the same time
    assert data.item_ids.dtype == np.int32 and data.offsets.dtype == np.int64
    assert data.targets("val").tolist() == [2, 1] and data.targets("test").tolist() == [3, 3]
    assert data.history_ends("train").tolist() == [1, 4]


def test_simultaneous_interactions():
    rows = [
        ("a", "1", 1),
        ("a", "3", 2),
        ("a", "2", 2),
        ("b", "2", 5),
        ("b", "3", 6),
        ("b", "1", 7),
    ]
    raw = RawData(frame(rows), {"1": "one", "2": "two", "3": "three"})
    orders = {"item": [1, 2, 3, 2, 3, 1], "file": [1, 3, 2, 2, 3, 1]}
    for ties, expected in orders.items():
        data = build("x", raw, Filters(min_uc=3, min_sc=1, ties=ties))
        assert data.item_ids.tolist() == expected and data.num_tied_targets == 1


def test_negative_ratings_are_pointed_out(capsys: pytest.CaptureFixture[str]):
    rows = [("a", "1", time) for time in range(6)]
    table = frame(rows).assign(rating=[-1.0, 0, 1, 2, 3, 4])
    data = build("x", RawData(table, {"1": "one"}), Filters(min_sc=1))
    assert len(data.item_ids) == 5
    printed = capsys.readouterr().err
    assert "note: x: dropped 1 of 6 interactions with a negative rating" in printed


names = st.text(min_size=1, max_size=8)


@given(
    st.lists(st.tuples(names, names, st.integers(0, 5)), min_size=1, max_size=60),
    st.randoms(use_true_random=False),
)
def test_sequences_hold_every_interaction_once_and_in_order(rows: list, random: Any):
    titles = {item: f"title of {item!r}" for _, item, _ in rows}
    filters = Filters(min_uc=1, min_sc=1)
    data = build("x", RawData(frame(rows), titles), filters)
    pairs = []
    for user, (start, end) in enumerate(pairwise(data.offsets)):
        for item in data.item_ids[start:end]:
            pairs.append((data.user_names[user], data.item_names[item]))
            assert data.titles[item] == titles[data.item_names[item]]
    distinct = set(rows)
    assert sorted(pairs) == sorted((user, item) for user, item, _ in distinct)
    timestamps: dict[tuple[str, str], list[int]] = {}
    for user, item, timestamp in distinct:
        timestamps.setdefault((user, item), []).append(timestamp)
    for user in data.user_names:
        earliest = 0
        for item in [item for name, item in pairs if name == user]:
            later = sorted(x for x in timestamps[user, item] if x >= earliest)
            assert later  # some assignment of timestamps ascends
            earliest = later[0]
            timestamps[user, item].remove(earliest)
    shuffled = rows.copy()
    random.shuffle(shuffled)
    again = build("x", RawData(frame(shuffled), titles), filters)
    assert np.array_equal(data.item_ids, again.item_ids)
    assert data.fingerprint == again.fingerprint and data.user_names == again.user_names


def test_names_that_are_not_numbers_are_numbered_by_text():
    rows = [(u, i, t) for u in ("b", "a") for t, i in enumerate(["10", "9", "007"])]
    data = build("x", RawData(frame(rows), {"10": "t", "9": "n", "007": "s"}), Filters(0, 3, 1))
    assert data.item_names[1:] == ["007", "10", "9"] and data.user_names == ["a", "b"]


def test_duplicate_rows_count_once(capsys: pytest.CaptureFixture):
    rows = [("u", str(i), i) for i in (3, 1, 2, 4)]
    titles = {str(i): f"t{i}" for i in range(9)}
    filters = Filters(min_uc=3, min_sc=1)
    once = build("x", RawData(frame(rows), titles), filters)
    assert capsys.readouterr().err == ""
    twice = build("x", RawData(frame([*rows, *rows]), titles), filters)
    assert twice.fingerprint == once.fingerprint
    assert capsys.readouterr().err == "note: x: dropped 4 duplicate interactions\n"


@pytest.mark.parametrize("ties", ["item", "file"])
def test_duplicates_need_not_be_neighbours(ties: str, capsys: pytest.CaptureFixture):
    rows = [
        ("u", "2", 1),
        ("v", "1", 1),
        ("u", "1", 1),
        ("u", "2", 1),
        ("v", "2", 0),
        ("u", "3", 0),
    ]
    titles = {str(i): f"t{i}" for i in range(4)}
    data = build("x", RawData(frame(rows), titles), Filters(min_uc=2, min_sc=1, ties=ties))
    expected = [3, 1, 2, 2, 1] if ties == "item" else [3, 2, 1, 2, 1]
    assert data.item_ids.tolist() == expected and data.offsets.tolist() == [0, 3, 5]
    assert capsys.readouterr().err == "note: x: dropped 1 duplicate interactions\n"


def test_an_item_may_repeat_at_another_time():
    rows = [("u", str(i), i) for i in (3, 1, 2, 4)]
    rows += [("u", "1", 9), ("v", "1", 1), ("v", "2", 2), ("v", "3", 3)]
    titles = {str(i): f"t{i}" for i in range(9)}
    data = build("x", RawData(frame(rows), titles), Filters(min_uc=3, min_sc=1))
    assert len(data.item_ids) == 8 and data.num_repeated_targets() == 1


def test_timestamps_beyond_float_precision_keep_their_order(tmp_path: Path):
    timestamps = [(f"i{n}", 1_700_000_000_000_000_000 + 7 * (4 - n)) for n in range(5)]
    log = tmp_path / "log.csv"
    log.write_text("user,item,timestamp\n" + "".join(f"u,{i},{t}\n" for i, t in timestamps))
    columns = {"user": [], "item": [], "timestamp": [], "rating": []}
    raw = RawData(read_interactions(log, columns), {f"i{n}": f"t{n}" for n in range(5)})
    data = build("x", raw, Filters(min_uc=3, min_sc=1))
    assert [data.item_names[i] for i in data.item_ids] == ["i4", "i3", "i2", "i1", "i0"]


def test_low_ratings_and_untitled_items_are_dropped():
    rows = [("u", str(i), i) for i in range(6)]
    table = frame(rows).assign(rating=[5, 5, 5, 5, 1, 5])
    titles = {str(i): f"t{i}" for i in range(5)}
    data = build("x", RawData(table, titles), Filters(min_rating=3, min_uc=3, min_sc=1))
    assert data.item_names[1:] == ["0", "1", "2", "3"]


def test_minimum_rating_needs_ratings():
    raw = RawData(frame([("u", "1", 1)]), {"1": "t"})
    with pytest.raises(ArgumentError) as caught:
        build("x", raw, Filters(min_rating=3.5))
    assert (caught.value.argument, caught.value.value) == ("min_rating", "3.5")


@pytest.mark.parametrize("titles", [{"1": "t"}, {"2": "t"}])
def test_no_interactions_remain(titles: dict[str, str]):
    raw = RawData(frame([("u", "1", 1)]), titles)
    with pytest.raises(InputError, match="x: no interactions remain with at least 5 per user"):
        build("x", raw, Filters())


def test_toy_data_covers_its_catalogue():
    assert len({item for _, item, _ in toy_interactions()}) == 40
