"""The file of generated interactions, and merging them into the training part of a data set.

``augmented.npz`` holds ``users`` (n,) int32 from 0 in ascending order, ``items`` (n,) int32 from 1
in the order of generation for each user, and the ``fingerprint`` of the data set they belong to,
which covers the sequences and thereby the split. It loads without pickle.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets import SequenceDataset
from errors import ArgumentError, InputError
from storage import read_arrays, reading, write_arrays

AUGMENTED_FILE = "augmented.npz"


class Interactions(NamedTuple):
    """Generated interactions, by user and in the order of generation.

    Attributes:
        users: (n,) int32 user indices from 0, ascending.
        items: (n,) int32 item ids from 1.
    """

    users: np.ndarray
    items: np.ndarray

    def fingerprint(self) -> str:
        """SHA-256 of users and items."""
        return hashlib.sha256(self.users.tobytes() + self.items.tobytes()).hexdigest()

    def of_users(self, selected: np.ndarray) -> Interactions:
        """The interactions of the selected users, (num_users,) bool, renumbered from 0."""
        kept = selected[self.users]
        numbers = np.cumsum(selected, dtype=np.int32) - 1
        return Interactions(numbers[self.users[kept]], self.items[kept])


def save_augmented(path: Path, interactions: Interactions, fingerprint: str) -> None:
    """Write the interactions and the fingerprint of their data set.

    Raises:
        UserError: the file cannot be written.
    """
    write_arrays(path, **interactions._asdict(), fingerprint=np.array(fingerprint))


def load_augmented(folder: Path, data: SequenceDataset) -> Interactions:
    """Load the interactions of a finished augmentation run.

    Args:
        folder: the run folder.
        data: the data set that the interactions must belong to.

    Raises:
        ArgumentError: ``folder`` has no file of interactions.
        InputError: the file is damaged or belongs to another data set.
    """
    path = folder / AUGMENTED_FILE
    if not path.exists():
        raise ArgumentError("folder", folder, f"no {AUGMENTED_FILE} there")
    with reading(path):
        arrays = read_arrays(path)
        users, items, fingerprint = arrays["users"], arrays["items"], str(arrays["fingerprint"])
    if fingerprint != data.fingerprint:
        raise InputError(f"{path} belongs to another data set than {data.code} or to other filters")
    _check_interactions(path, users, items, data)
    return Interactions(users, items)


def _check_interactions(
    path: Path, users: np.ndarray, items: np.ndarray, data: SequenceDataset
) -> None:
    are_integers = all(np.issubdtype(x.dtype, np.integer) for x in (users, items))
    if not are_integers or users.ndim != 1 or users.shape != items.shape:
        raise InputError(f"{path}: users and items must be integer arrays of the same length")
    if (np.diff(users) < 0).any() or users.min(initial=0) < 0:
        raise InputError(f"{path}: users must ascend from 0")
    if users.max(initial=0) >= data.num_users:
        raise InputError(f"{path}: users must be below {data.num_users}")
    if len(items) and not 1 <= items.min() <= items.max() <= data.num_items:
        raise InputError(f"{path}: items must be from 1 to {data.num_items}")


def merge(data: SequenceDataset, interactions: Interactions, position: str) -> SequenceDataset:
    """Insert interactions into the training part of each user's sequence.

    Args:
        data: the data set.
        interactions: the generated interactions.
        position: ``before`` the user's training items, so that the most recent items remain real,
            or ``after`` them. The last two items remain held out.
    """
    starts = data.offsets[:-1] if position == "before" else data.history_ends("train")
    counts = np.bincount(interactions.users, minlength=data.num_users)
    return replace(
        data,
        item_ids=np.insert(data.item_ids, starts[interactions.users], interactions.items),
        offsets=data.offsets + np.concatenate([[0], counts.cumsum()]),
    )
