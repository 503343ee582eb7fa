"""Jagged batches of item sequences: training windows, masked windows, histories.

A training step is a list of one micro-batch, a dict of

- ``sequences``: a ``JaggedBatch``, see ``jagged.py``;
- ``labels`` (K,) int64: the item to predict at each scored position;
- ``users``: the users' indices, for messages;
- ``num_targets``: K.

An evaluation batch is a dict of

- ``sequences``: a ``JaggedBatch`` with the last position of each of the B sequences scored;
- ``examples`` (B,) int64: index of each example in the data set;
- ``targets`` (B,) int64: the held-out items;
- ``history_rows`` and ``history_items`` (n,) int64: row and item of every interaction before the
  target, including those beyond the model's ``max_len``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets import SequenceDataset
from jagged import JaggedBatch, flat_ranges

Batch = dict[str, Any]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


class _Windows(Dataset):
    """Windows over the users' training sequences.

    A sequence of fewer than ``max_len + stride`` items is one window. A longer one is cut into
    windows of ``max_len`` items, from its end backwards by ``stride``, as in the published code.

    Args:
        data: the data set.
        max_len: maximum number of positions in a window.
        window_stride: the stride as a fraction of ``max_len``.
    """

    def __init__(self, data: SequenceDataset, max_len: int, window_stride: float) -> None:
        self.item_ids, self.max_len = data.item_ids, max_len
        stride = int(window_stride * max_len)
        starts, ends = data.offsets[:-1], data.history_ends("train")
        lengths = ends - starts
        windows = np.where(lengths < max_len + stride, 1, (lengths - max_len) // stride + 1)
        shifts = flat_ranges(np.zeros_like(windows), windows)[1] * stride
        is_whole = np.repeat(windows == 1, windows)
        self.ends = np.repeat(ends, windows) - shifts
        self.starts = np.where(is_whole, np.repeat(starts, windows), self.ends - max_len)
        self.users = np.repeat(np.arange(data.num_users), windows)

    def __len__(self) -> int:
        return len(self.ends)

    def _step(self, indices: np.ndarray, sequences: JaggedBatch, labels: np.ndarray) -> list[Batch]:
        """A training step of one micro-batch."""
        batch = {"sequences": sequences, "labels": _tensor(labels), "num_targets": len(labels)}
        return [batch | {"users": self.users[indices].tolist()}]


class TrainingWindows(_Windows):
    """Next-item prediction: each position of a window predicts the item that follows it.

    If there is room, a window begins with the start token 0, which predicts the window's first
    item. In the published code, this token is padding and invisible to the positions after it; here
    it is a sequence of its own for the same effect.
    """

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """Build the training step of the given windows."""
        indices = np.asarray(numbers) % len(self)
        starts, ends = self.starts[indices], self.ends[indices]
        lengths = np.minimum(ends - starts, self.max_len)
        label_indices, positions = flat_ranges(ends - lengths, lengths)
        has_start = np.repeat(ends - starts <= self.max_len, lengths)
        is_start = (positions == 0) & has_start
        item_ids = np.where(is_start, 0, self.item_ids[label_indices - 1])
        positions = np.where(has_start, np.maximum(positions - 1, 0), positions)
        sequences = JaggedBatch(_tensor(item_ids), _tensor(positions), int(positions.max()) + 1)
        return self._step(indices, sequences, self.item_ids[label_indices])


class MaskedWindows(_Windows):
    """Cloze task of BERT4Rec: the masked items of a window are predicted.

    A window of more than ``max_len`` items is read from its end. Which items of a batch are masked
    depends on the seed and the examples' numbers, which differ from epoch to epoch.

    Args:
        data: the data set.
        max_len: maximum number of positions in a window.
        window_stride: the stride as a fraction of ``max_len``.
        mask_prob: probability that an item is masked; if none is, the window's last item is.
        seed: seed of the masks.
    """

    def __init__(
        self, data: SequenceDataset, max_len: int, window_stride: float, mask_prob: float, seed: int
    ) -> None:
        super().__init__(data, max_len, window_stride)
        self.mask_token, self.mask_prob, self.seed = data.num_items + 1, mask_prob, seed

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """Build the training step of the given windows."""
        indices = np.asarray(numbers) % len(self)
        lengths = np.minimum(self.ends[indices] - self.starts[indices], self.max_len)
        item_indices, positions = flat_ranges(self.ends[indices] - lengths, lengths)
        rng = np.random.default_rng([self.seed, *numbers])
        masked = rng.random(len(item_indices)) < self.mask_prob
        last = np.cumsum(lengths) - 1
        masked[last] |= np.add.reduceat(masked, last - lengths + 1) == 0
        items = self.item_ids[item_indices]
        sequences = JaggedBatch(
            _tensor(np.where(masked, self.mask_token, items)),
            _tensor(positions),
            int(lengths.max()),
            _tensor(np.flatnonzero(masked)),
        )
        return self._step(indices, sequences, items[masked])


class Histories(Dataset):
    """Each user's history before a held-out item.

    Args:
        data: the data set.
        split: ``val`` or ``test``.
        max_len: maximum number of positions that the model reads.
        mask_token: token appended to the history, for a model that predicts a masked item.
    """

    def __init__(
        self, data: SequenceDataset, split: str, max_len: int, mask_token: int | None = None
    ) -> None:
        self.item_ids, self.max_len, self.mask_token = data.item_ids, max_len, mask_token
        self.starts, self.ends = data.offsets[:-1], data.history_ends(split)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitems__(self, indices: list[int]) -> Batch:
        """Build the evaluation batch of the given examples."""
        starts, ends = self.starts[indices], self.ends[indices]
        history, _ = flat_ranges(starts, ends - starts)
        return {
            "sequences": self._sequences(starts, ends),
            "examples": torch.tensor(indices),
            "targets": _tensor(self.item_ids[ends]),
            "history_rows": _tensor(np.repeat(np.arange(len(indices)), ends - starts)),
            "history_items": _tensor(self.item_ids[history]),
        }

    def _sequences(self, starts: np.ndarray, ends: np.ndarray) -> JaggedBatch:
        """What the model reads of the histories ``item_ids[start:end]``."""
        extra = 0 if self.mask_token is None else 1  # the mask is where the target would be
        lengths = np.minimum(ends - starts + extra, self.max_len)
        item_indices, positions = flat_ranges(ends + extra - lengths, lengths)
        item_ids = self.item_ids[item_indices]
        last = np.cumsum(lengths) - 1
        if self.mask_token is not None:
            item_ids[last] = self.mask_token
        return JaggedBatch(_tensor(item_ids), _tensor(positions), int(lengths.max()), _tensor(last))


class Prefixes(Histories):
    """Each training interaction except a user's first, as the target of the prefix before it.

    Examples are numbered as in ``SequenceDataset.training_prefixes``. See ``Histories`` for the
    arguments.
    """

    def __init__(self, data: SequenceDataset, max_len: int, mask_token: int | None = None) -> None:
        super().__init__(data, "train", max_len, mask_token)
        self.starts, self.ends = data.training_prefixes()
