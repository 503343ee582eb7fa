"""``augmented.npz``: written interactions on disk, and a data set whose training part has them.

The file holds ``users`` (n,) int32 from 0, ascending, ``items`` (n,) int32 from 1, in the order
they were written for each user, and the ``fingerprint`` of the data they belong to, which covers
sequences and so the split. It loads without pickle.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError
from datasets import SequenceDataset
from storage import atomic_path, read_arrays, reading

FILE_NAME = "augmented.npz"


class Interactions(NamedTuple):
    """Written interactions, by user and in the order they were written.

    Attributes:
        users: (n,) int32, from 0, ascending.
        items: (n,) int32, from 1.
    """

    users: np.ndarray
    items: np.ndarray

    def fingerprint(self) -> str:
        """Hash of both."""
        return hashlib.sha256(self.users.tobytes() + self.items.tobytes()).hexdigest()


def save_augmented(path: Path, interactions: Interactions, fingerprint: str) -> None:
    """Write the interactions, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **interactions._asdict(), fingerprint=np.array(fingerprint))


def load_augmented(folder: Path, data: SequenceDataset) -> Interactions:
    """Read the interactions of a finished run and check them against the data set.

    Raises:
        UserError: the file is missing, damaged, or belongs to other data.
    """
    path = folder / FILE_NAME
    if not path.exists():
        raise UserError(
            f"--augmented {folder}: no {FILE_NAME} there; name the folder of a finished run of "
            "augment_data.py"
        )
    again = "run augment_data.py again"
    with reading(path, again):
        arrays = read_arrays(path)
        users, items, fingerprint = arrays["users"], arrays["items"], str(arrays["fingerprint"])
    if fingerprint != data.fingerprint:
        raise UserError(
            f"{path} belongs to another data set than {data.code} or to other filters: {again} "
            "with the same --dataset_code, --data_root, --min_* flags"
        )
    whole = all(np.issubdtype(x.dtype, np.integer) for x in (users, items))
    if not whole or users.ndim != 1 or users.shape != items.shape:
        raise UserError(f"{path}: users and items must be integers, one each: {again}")
    if (np.diff(users) < 0).any() or users.min(initial=0) < 0:
        raise UserError(f"{path}: users must ascend from 0: {again}")
    if users.max(initial=0) >= data.num_users:
        raise UserError(f"{path}: users must be below {data.num_users}: {again}")
    if len(items) and not 1 <= items.min() <= items.max() <= data.num_items:
        raise UserError(f"{path}: items must be from 1 to {data.num_items}: {again}")
    return Interactions(users, items)


def merge(data: SequenceDataset, interactions: Interactions, place: str) -> SequenceDataset:
    """The data set with written interactions in each user's training part.

    Args:
        data: the data set.
        interactions: what was written.
        place: ``before`` the user's training items, so that the last steps stay real, or ``after``
            them. The held-out items stay the last two.
    """
    at = data.offsets[:-1] if place == "before" else data.history_ends("train")
    counts = np.bincount(interactions.users, minlength=data.num_users)
    return replace(
        data,
        item_ids=np.insert(data.item_ids, at[interactions.users], interactions.items),
        offsets=data.offsets + np.concatenate([[0], counts.cumsum()]),
    )
