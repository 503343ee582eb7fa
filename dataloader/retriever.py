"""Jagged batches of item sequences for the retriever.

Only 13.5% of a padded batch's positions hold an item on Beauty and 15% on Games. A jagged batch
concatenates the sequences of B users on one axis of N positions instead, so that no work is spent
on padding:

- ``item_ids`` (N,) int64, the model's input;
- ``positions`` (N,) int64, the index of each position within its sequence;
- ``longest`` int, the length of the longest sequence.

A training batch also has ``labels`` (N,) int64, the item that follows each position; an evaluation
batch has ``keep`` (B,) int64, each sequence's last position on the flat axis, ``answers`` (B,)
int64, and the users' histories as ``history_rows`` and ``history_items``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets import SequenceDataset

Batch = dict[str, Any]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated ``arange(start, start + length)`` and each element's place in its range."""
    ends = np.cumsum(lengths)
    places = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    return np.repeat(starts, lengths) + places, places


class TrainingWindows(Dataset):
    """Next-item training examples: windows over the users' training sequences.

    A user's sequence of fewer than ``max_len + stride`` items is one window; a longer one is cut
    into windows of ``max_len`` items, from its end backwards by ``stride``, as in the published
    code. Each position predicts the item that follows. A window that leaves room for it begins
    with the start token 0, which predicts the window's first item; it is a sequence of its own
    and does not reach the positions after it, like the padding of the published code.

    Args:
        data: the data set.
        max_len: most positions of a window.
        window_stride: the stride as a share of ``max_len``.
    """

    def __init__(self, data: SequenceDataset, max_len: int, window_stride: float) -> None:
        self.item_ids, self.max_len = data.item_ids, max_len
        stride = int(window_stride * max_len)
        starts, ends = data.offsets[:-1], data.history_ends("train")
        lengths = ends - starts
        windows = np.where(lengths < max_len + stride, 1, (lengths - max_len) // stride + 1)
        steps = _ranges(np.zeros_like(windows), windows)[1] * stride
        whole = np.repeat(windows == 1, windows)
        self.ends = np.repeat(ends, windows) - steps
        self.starts = np.where(whole, np.repeat(starts, windows), self.ends - max_len)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """One jagged batch of the windows given, as the only micro-batch of its step."""
        indices = np.asarray(indices) % len(self)
        starts, ends = self.starts[indices], self.ends[indices]
        lengths = np.minimum(ends - starts, self.max_len)
        targets, places = _ranges(ends - lengths, lengths)
        has_start = np.repeat(ends - starts <= self.max_len, lengths)
        item_ids = np.where((places == 0) & has_start, 0, self.item_ids[targets - 1])
        positions = np.where(has_start, np.maximum(places - 1, 0), places)
        batch = {
            "item_ids": torch.from_numpy(item_ids.astype(np.int64)),
            "positions": torch.from_numpy(positions),
            "longest": int(positions.max()) + 1,
            "labels": torch.from_numpy(self.item_ids[targets].astype(np.int64)),
            "weight": 1.0,
        }
        return [batch]


class Histories(Dataset):
    """Each user's history before a held-out item.

    Args:
        data: the data set.
        split: ``val`` or ``test``.
        max_len: most items the model reads; ``history_items`` holds all of them all the same.
    """

    def __init__(self, data: SequenceDataset, split: str, max_len: int) -> None:
        self.item_ids, self.max_len = data.item_ids, max_len
        self.starts, self.ends = data.offsets[:-1], data.history_ends(split)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitems__(self, users: list[int]) -> Batch:
        """One jagged batch of the users given."""
        starts, ends = self.starts[users], self.ends[users]
        lengths = np.minimum(ends - starts, self.max_len)
        read, positions = _ranges(ends - lengths, lengths)
        history, _ = _ranges(starts, ends - starts)
        batch = {
            "item_ids": self.item_ids[read],
            "positions": positions,
            "keep": np.cumsum(lengths) - 1,
            "answers": self.item_ids[ends],
            "history_rows": np.repeat(np.arange(len(users)), ends - starts),
            "history_items": self.item_ids[history],
        }
        tensors = {name: torch.from_numpy(x.astype(np.int64)) for name, x in batch.items()}
        return tensors | {"longest": int(lengths.max())}
