"""Operations on the flat axis of jagged batches, against the same operations on lists."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from jagged import MAX_ROW_RATIO, flat_ranges, padded_rows, positions_from_end, time_major

lengths_of_sequences = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def positions_of(lengths: list[int]) -> torch.Tensor:
    """(N,) positions of sequences with the given lengths."""
    return torch.cat([torch.arange(length) for length in lengths])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), min_size=1, max_size=9))
def test_flat_ranges(ranges: list[tuple[int, int]]):
    starts, lengths = np.array(ranges).T
    if lengths.sum() == 0:
        return
    values, positions = flat_ranges(starts, lengths)
    assert values.tolist() == [x for start, size in ranges for x in range(start, start + size)]
    assert positions.tolist() == [x for _, size in ranges for x in range(size)]


def test_positions_from_end():
    item_ids = torch.tensor([5, 9, 2, 7, 0, 3, 3])  # sequences of 3, 1, the start token and 2
    positions = torch.tensor([0, 1, 2, 0, 0, 0, 1])
    expected = [7, 8, 9, 9, 0, 8, 9]
    assert positions_from_end(item_ids, positions, max_len=10).tolist() == expected


@given(lengths_of_sequences)
def test_time_major_is_the_order_of_a_recurrence(lengths: list[int]):
    positions = positions_of(lengths)
    order, counts = time_major(positions)
    assert sorted(order.tolist()) == list(range(len(positions)))
    assert counts.tolist() == [sum(x > t for x in lengths) for t in range(max(lengths))]
    steps = order.split(counts.tolist())
    for t, step in enumerate(steps):
        assert (positions[step] == t).all()
    for step, later in pairwise(steps):  # the same sequences, the longest first
        assert (later == step[: len(later)] + 1).all()


def test_rows_hold_each_sequence_once_and_waste_little():
    lengths = torch.tensor([1, 200, 3, 1, 12, 13, 50, 51, 2, 199, 7])
    positions = positions_of(lengths.tolist())
    groups = padded_rows(positions, 200, with_mask=True)
    assert len(groups) > 2
    held = torch.cat([rows.source for rows in groups]).sort().values
    assert torch.equal(held, (lengths.repeat_interleave(lengths) > 1).nonzero()[:, 0])
    for rows in groups:
        assert torch.equal(rows.mask.flatten().nonzero()[:, 0], rows.target.sort().values)
        assert torch.equal(rows.target % rows.length, positions[rows.source])
        per_row = rows.mask.sum(1)
        assert per_row.sum() == len(rows.source)
        assert rows.length < (MAX_ROW_RATIO + 1) * per_row.min()


@given(lengths_of_sequences)
def test_a_row_is_one_sequence(lengths: list[int]):
    positions = positions_of(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = []
    for rows in padded_rows(positions, max(lengths), with_mask=False):
        assert rows.mask is None
        row = rows.target // rows.length
        assert row.max() == rows.num_rows - 1
        for number in range(rows.num_rows):
            (member,) = sequence[rows.source[row == number]].unique().tolist()
            assert (row == number).sum() == lengths[member] <= rows.length
            seen.append(member)
    assert sorted(seen) == [i for i, length in enumerate(lengths) if length > 1]
