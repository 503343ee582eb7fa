"""Types of this package: raw data, its source, filters and the preprocessed data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd


class Filters(NamedTuple):
    """Which interactions are kept, and how a user's simultaneous interactions are ordered.

    Attributes:
        min_rating: minimum rating of an interaction.
        min_uc: minimum number of interactions per user.
        min_sc: minimum number of interactions per item.
        ties: order of a user's simultaneous interactions: ``item``, by item number, or ``file``, as
            in the file.
    """

    min_rating: float = 0.0
    min_uc: int = 5
    min_sc: int = 5
    ties: str = "item"


class RawData(NamedTuple):
    """Raw interactions and titles of one data set.

    Attributes:
        interactions: columns ``user`` and ``item`` (strings or categories of strings),
            ``timestamp`` and ``rating`` (numbers); all ratings are infinite if the data has none.
        titles: title by item; items without a title are absent.
    """

    interactions: pd.DataFrame
    titles: dict[str, str]


@dataclass(frozen=True)
class RawSource:
    """Where a data set comes from.

    Attributes:
        code: the data set's code, or None to derive it from the first file's name and the content
            of all files.
        files: the raw files that determine the result.
        fetch: downloads the raw files that are missing.
        read: reads the raw files.
        statistics: numbers of users, items and interactions that the paper reports (Table 2), or
            None; they are compared with the data under the default filters.
    """

    code: str | None
    files: tuple[Path, ...]
    fetch: Callable[[], None]
    read: Callable[[], RawData]
    statistics: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class SequenceDataset:
    """Chronological item sequences of all users with the leave-one-out split.

    The sequences are concatenated: user ``u``, numbered from 0, has
    ``item_ids[offsets[u]:offsets[u + 1]]``. Its last item is the test target, the one before it
    the validation target, and the rest is for training. Items are numbered from 1; 0 is padding.

    Attributes:
        code: the data set's code.
        item_ids: (num_interactions,) int32.
        offsets: (num_users + 1,) int64.
        titles: ``titles[i]`` is the title of item ``i``; ``titles[0]`` is empty.
        user_names: the users' original identifiers, in order.
        item_names: the items' original identifiers; ``item_names[0]`` is empty.
        fingerprint: hash of sequences and titles; files made from a data set store it.
        num_tied_targets: number of users whose test target has the timestamp of the item before it.
    """

    code: str
    item_ids: np.ndarray
    offsets: np.ndarray
    titles: list[str]
    user_names: list[str]
    item_names: list[str]
    fingerprint: str
    num_tied_targets: int = 0

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """Number of items, which is also the highest item id."""
        return len(self.titles) - 1

    def targets(self, split: str) -> np.ndarray:
        """(num_users,) each user's held-out item in ``split``, ``val`` or ``test``."""
        targets: np.ndarray = self.item_ids[self.history_ends(split)]
        return targets

    def history_ends(self, split: str) -> np.ndarray:
        """(num_users,) index into ``item_ids`` of the end of each user's history, exclusive.

        In ``val`` and ``test`` it is the index of the target. In ``train`` it is the end of the
        training sequence, the same as in ``val``.
        """
        return self.offsets[1:] - {"train": 2, "val": 2, "test": 1}[split]

    def training_prefixes(self) -> tuple[np.ndarray, np.ndarray]:
        """Enumerate the prefixes of training sequences that have a next training item.

        Returns:
            (n,) starts and (n,) ends in ``item_ids``, ends exclusive; ``item_ids[ends]`` are the
            next items.
        """
        starts, ends = self.offsets[:-1], self.history_ends("train")
        counts = np.maximum(ends - starts - 1, 0)
        first_prefix = np.cumsum(counts) - counts
        index_in_user = np.arange(counts.sum()) - np.repeat(first_prefix, counts)
        starts = np.repeat(starts, counts)
        return starts, starts + 1 + index_in_user

    def num_repeated_targets(self) -> int:
        """Count the users whose test target also occurs in their history."""
        targets = np.repeat(self.targets("test"), np.diff(self.offsets))
        occurrences = np.add.reduceat(
            self.item_ids == targets, self.offsets[:-1], dtype=np.int64
        )  # the target itself is one
        return int((occurrences > 1).sum())

    def training_counts(self) -> np.ndarray:
        """(num_items + 1,) number of training interactions per item; 0 for padding."""
        # The running sum of +1 at each start and -1 at each end is 1 inside training sequences.
        changes = np.zeros(len(self.item_ids) + 1, dtype=np.int64)
        np.add.at(changes, self.offsets[:-1], 1)
        np.add.at(changes, self.history_ends("train"), -1)
        is_training = changes.cumsum()[:-1] > 0
        return np.bincount(self.item_ids[is_training], minlength=self.num_items + 1)

    def summary(self) -> str:
        """Format the statistics of the paper's Table 2 as one line."""
        mean_length = len(self.item_ids) / self.num_users
        return (
            f"{self.code}: {self.num_users:,} users, {self.num_items:,} items, "
            f"{len(self.item_ids):,} interactions, mean length {mean_length:.2f}"
        )
