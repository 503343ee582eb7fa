"""Jagged batches of item sequences for the retriever.

Only 13.5% of a padded batch's positions hold an item on Beauty and 15% on Games. A jagged batch
concatenates the sequences of B users on one axis of N positions instead, so that no work is spent
on padding:

- ``item_ids`` (N,) int64, the model's input;
- ``positions`` (N,) int64, the index of each position within its sequence;
- ``longest`` int, the length of the longest sequence.

A training batch also has ``labels`` (N,), the item that follows each position, and a list of its
``users``; where only some positions are trained on, they are ``keep`` (K,) and ``labels`` is (K,).
An evaluation batch has ``keep`` (B,), each sequence's last position on the flat axis, ``answers``
(B,), and the users' histories as ``history_rows`` and ``history_items``. All are int64.
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


def _tensors(arrays: dict[str, np.ndarray]) -> Batch:
    return {name: torch.from_numpy(x.astype(np.int64)) for name, x in arrays.items()}


class _Windows(Dataset):
    """Windows over the users' training sequences.

    A user's sequence of fewer than ``max_len + stride`` items is one window; a longer one is cut
    into windows of ``max_len`` items, from its end backwards by ``stride``, as in the published
    code.

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
        self.users = np.repeat(np.arange(data.num_users), windows)

    def __len__(self) -> int:
        return len(self.ends)


class TrainingWindows(_Windows):
    """Next-item training examples: each position of a window predicts the item that follows.

    A window that leaves room for it begins with the start token 0, which predicts the window's
    first item; it is a sequence of its own and does not reach the positions after it, like the
    padding of the published code. Arguments as of ``_Windows``.
    """

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """One jagged batch of the windows given, as the only micro-batch of its step."""
        indices = np.asarray(numbers) % len(self)
        starts, ends = self.starts[indices], self.ends[indices]
        lengths = np.minimum(ends - starts, self.max_len)
        targets, places = _ranges(ends - lengths, lengths)
        has_start = np.repeat(ends - starts <= self.max_len, lengths)
        item_ids = np.where((places == 0) & has_start, 0, self.item_ids[targets - 1])
        positions = np.where(has_start, np.maximum(places - 1, 0), places)
        batch = {"item_ids": item_ids, "positions": positions, "labels": self.item_ids[targets]}
        extra = {"longest": int(positions.max()) + 1, "users": self.users[indices].tolist()}
        return [_tensors(batch) | extra | {"weight": 1.0}]


class MaskedWindows(_Windows):
    """Cloze training examples of BERT4Rec: masked items of a window predict themselves.

    A window of more than ``max_len`` items is read from its end. Which items of a batch are masked
    depends on the seed and its examples' numbers, which go on from epoch to epoch.

    Args:
        data: the data set.
        max_len: most positions of a window.
        window_stride: the stride as a share of ``max_len``.
        mask_prob: share of masked items; a window without any has its last one masked.
        seed: seed of the masks.
    """

    def __init__(
        self, data: SequenceDataset, max_len: int, window_stride: float, mask_prob: float, seed: int
    ) -> None:
        super().__init__(data, max_len, window_stride)
        self.mask_token, self.mask_prob, self.seed = data.num_items + 1, mask_prob, seed

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """One jagged batch of the windows given; ``keep`` (K,) are the masked positions and
        ``labels`` (K,) their items.
        """
        indices = np.asarray(numbers) % len(self)
        lengths = np.minimum(self.ends[indices] - self.starts[indices], self.max_len)
        places, positions = _ranges(self.ends[indices] - lengths, lengths)
        masked = np.random.default_rng([self.seed, *numbers]).random(len(places)) < self.mask_prob
        last = np.cumsum(lengths) - 1
        masked[last] |= np.add.reduceat(masked, last - lengths + 1) == 0
        items = self.item_ids[places]
        batch = {
            "item_ids": np.where(masked, self.mask_token, items),
            "positions": positions,
            "keep": np.flatnonzero(masked),
            "labels": items[masked],
        }
        extra = {"longest": int(lengths.max()), "users": self.users[indices].tolist()}
        return [_tensors(batch) | extra | {"weight": 1.0}]


class Histories(Dataset):
    """Each user's history before a held-out item.

    Args:
        data: the data set.
        split: ``val`` or ``test``.
        max_len: most positions the model reads; ``history_items`` holds all items all the same.
        mask_token: put after the history for a model that predicts a masked item, if not None.
    """

    def __init__(
        self, data: SequenceDataset, split: str, max_len: int, mask_token: int | None = None
    ) -> None:
        self.item_ids, self.max_len, self.mask_token = data.item_ids, max_len, mask_token
        self.starts, self.ends = data.offsets[:-1], data.history_ends(split)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitems__(self, users: list[int]) -> Batch:
        """One jagged batch of the users or, of ``Prefixes``, the examples given."""
        starts, ends = self.starts[users], self.ends[users]
        lengths = np.minimum(ends - starts, self.max_len)
        if self.mask_token is None:
            read, positions = _ranges(ends - lengths, lengths)
            item_ids = self.item_ids[read]
        else:  # the mask stands where the answer is
            lengths = np.minimum(ends - starts + 1, self.max_len)
            read, positions = _ranges(ends + 1 - lengths, lengths)
            item_ids = self.item_ids[read]
            item_ids[np.cumsum(lengths) - 1] = self.mask_token
        history, _ = _ranges(starts, ends - starts)
        batch = {
            "item_ids": item_ids,
            "positions": positions,
            "keep": np.cumsum(lengths) - 1,
            "answers": self.item_ids[ends],
            "history_rows": np.repeat(np.arange(len(users)), ends - starts),
            "history_items": self.item_ids[history],
        }
        return _tensors(batch) | {"longest": int(lengths.max())}


class Prefixes(Histories):
    """Each training interaction but a user's first, as the answer to what came before it.

    Their numbers are those of ``SequenceDataset.training_prefixes``; arguments as of
    ``Histories``.
    """

    def __init__(self, data: SequenceDataset, max_len: int, mask_token: int | None = None) -> None:
        super().__init__(data, "train", max_len, mask_token)
        self.starts, self.ends = data.training_prefixes()
