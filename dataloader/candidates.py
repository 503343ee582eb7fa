"""The retriever's candidates on disk, the interface between the two stages.

``candidates.npz`` holds the ``fingerprint`` of the data set and, for each of the splits ``val`` and
``test``, these arrays, prefixed with the split's name and an underscore:

=============== ============ ======= ============================================================
name            shape        type    values
=============== ============ ======= ============================================================
``items``       (users, k)   int32   item ids of the candidates, best first
``scores``      (users, k)   float32 their scores
``labels``      (users,)     int32   targets, the held-out items
``label_ranks`` (users,)     int32   rank of the target in the whole catalogue, from 1
=============== ============ ======= ============================================================

The file loads without pickle. This module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.base import SequenceDataset
from errors import InputError
from storage import read_arrays, reading, write_arrays

CANDIDATES_FILE = "candidates.npz"
SPLITS = ("val", "test")


class Candidates(NamedTuple):
    """Candidates of all users in one split; the module's docstring describes the arrays."""

    items: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    label_ranks: np.ndarray

    @property
    def retrieved(self) -> np.ndarray:
        """(n,) users whose target is among their candidates, in ascending order."""
        return np.flatnonzero((self.items == self.labels[:, None]).any(axis=1))


def save_candidates(path: Path, splits: dict[str, Candidates], fingerprint: str) -> None:
    """Write the candidates of all splits, complete or not at all.

    Args:
        path: the file.
        splits: candidates by split.
        fingerprint: fingerprint of the data set.

    Raises:
        UserError: the file cannot be written.
    """
    arrays = {
        f"{split}_{name}": array
        for split, candidates in splits.items()
        for name, array in candidates._asdict().items()
    }
    write_arrays(path, fingerprint=np.array(fingerprint), **arrays)


def load_candidates(path: Path, data: SequenceDataset) -> dict[str, Candidates]:
    """Read candidates and check all values against the data set.

    Returns:
        Candidates by split.

    Raises:
        InputError: the file is missing, damaged or inconsistent, or belongs to other data.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    with reading(path):
        arrays = read_arrays(path)
        fingerprint = str(arrays.pop("fingerprint"))
        splits = {
            split: Candidates(*(arrays[f"{split}_{name}"] for name in Candidates._fields))
            for split in SPLITS
        }
    if fingerprint != data.fingerprint:
        raise InputError(f"{path} belongs to other data than {data.code}, or to other filters")
    for split, candidates in splits.items():
        problem = _format_problem(candidates, data) or _value_problem(candidates, data, split)
        if problem:
            raise InputError(f"{path}: {split} {problem}")
    return splits


def _format_problem(candidates: Candidates, data: SequenceDataset) -> str | None:
    """Return what is wrong with the shapes and types of a split's arrays, or None."""
    items, scores, labels, label_ranks = candidates
    users = data.num_users
    if items.ndim != 2 or items.shape[0] != users or items.shape[1] < 2:
        return f"items have shape {items.shape}, not ({users}, candidates)"
    if scores.shape != items.shape:
        return f"scores have shape {scores.shape}, not {items.shape}"
    if labels.shape != (users,) or label_ranks.shape != (users,):
        return f"labels and label ranks must have shape ({users},)"
    if any(not np.issubdtype(x.dtype, np.integer) for x in (items, labels, label_ranks)):
        return "items, labels and label ranks must be integers"
    if not np.issubdtype(scores.dtype, np.floating):
        return "scores must be floating-point numbers"
    return None


def _value_problem(candidates: Candidates, data: SequenceDataset, split: str) -> str | None:
    """Return what is wrong with the values of a split's arrays, or None."""
    items, scores, labels, label_ranks = candidates
    if items.min() < 1 or items.max() > data.num_items:
        return f"items must be from 1 to {data.num_items}"
    if (np.diff(np.sort(items, axis=1), axis=1) == 0).any():
        return "items contain the same item twice for a user"
    if np.isnan(scores).any() or (scores[:, 1:] > scores[:, :-1]).any():
        return "scores do not descend"
    if (labels != data.targets(split)).any():
        return "labels are not the held-out items"
    if label_ranks.min() < 1 or label_ranks.max() > data.num_items:
        return f"label ranks must be from 1 to {data.num_items}"
    if (label_ranks[candidates.retrieved] > items.shape[1]).any():
        return "label ranks disagree with the items"
    return None
