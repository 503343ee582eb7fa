"""The retriever's candidates on disk: the contract between the two stages.

``candidates.npz`` holds, for the splits ``val`` and ``test``: ``*_items`` (users, k) int32, best
first; ``*_scores`` (users, k) float32; ``*_labels`` (users,) int32, the held-out items; and
``*_label_ranks`` (users,) int32, the 1-based rank of the held-out item in the whole catalogue.
``fingerprint`` names the data set they belong to. It loads without pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError
from datasets import SequenceDataset
from storage import atomic_path, read_arrays, reading

SPLITS = ("val", "test")
FILE_NAME = "candidates.npz"


class Candidates(NamedTuple):
    """Candidates of all users in one split; shapes as in the module's docstring."""

    items: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    label_ranks: np.ndarray

    @property
    def retrieved(self) -> np.ndarray:
        """(n,) the users whose answer is among their candidates."""
        return np.flatnonzero((self.items == self.labels[:, None]).any(axis=1))


def save_candidates(path: Path, splits: dict[str, Candidates], fingerprint: str) -> None:
    """Write the candidates of both splits, whole or not at all."""
    arrays = {f"{s}_{name}": x for s, c in splits.items() for name, x in c._asdict().items()}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, fingerprint=np.array(fingerprint), **arrays)


def load_candidates(path: Path, data: SequenceDataset) -> dict[str, Candidates]:
    """Read candidates and check every value against the data set.

    Raises:
        UserError: the file is missing, damaged, edited, or belongs to other data.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist: --llm_retrieved_path must name a folder that "
            "train_retriever.py has finished"
        )
    with reading(path, "run train_retriever.py again"):
        arrays = read_arrays(path)
        fingerprint = str(arrays.pop("fingerprint"))
        splits = {
            s: Candidates(*(arrays[f"{s}_{name}"] for name in Candidates._fields)) for s in SPLITS
        }
    if fingerprint != data.fingerprint:
        raise UserError(
            f"{path} belongs to another data set than {data.code} or to other filters: "
            "run train_retriever.py with the same --dataset_code, --data_root, --min_* flags"
        )
    for split, candidates in splits.items():
        problem = _problem(candidates, data, split)
        if problem:
            raise UserError(f"{path}: {split} {problem}: run train_retriever.py again")
    return splits


def _problem(candidates: Candidates, data: SequenceDataset, split: str) -> str | None:
    """What is wrong with a split's arrays, or None."""
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
    if items.min() < 1 or items.max() > data.num_items:
        return f"items must be from 1 to {data.num_items}"
    if (np.diff(np.sort(items, axis=1), axis=1) == 0).any():
        return "items hold one item twice for a user"
    if np.isnan(scores).any() or (np.diff(scores, axis=1) > 0).any():
        return "scores do not descend"
    if (labels != data.answers(split)).any():
        return "labels are not the held-out items"
    if label_ranks.min() < 1 or label_ranks.max() > data.num_items:
        return f"label ranks must be from 1 to {data.num_items}"
    retrieved = np.zeros(users, dtype=bool)
    retrieved[candidates.retrieved] = True
    if ((label_ranks > items.shape[1]) & retrieved).any():
        return "label ranks disagree with the items"
    return None
