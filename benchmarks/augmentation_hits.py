"""What added interactions are like: how often they are held-out items, against chance.

Reads folders with ``augmented.npz``, of ``augment_data.py`` or ``augmentation_controls.py``. The
more of a user's added items the user takes next, the more there is to learn from them. For each
folder:

- ``val`` and ``test``: users whose held-out item is among their added items; ``chance`` is the
  expected number if as many were drawn at random from the items that each user does not have.
- ``test_quarters``: ``test`` by quarter of the users, from the shortest training histories on.
- ``interactions``: mean number of training interactions of an added item.
- ``similarity``: mean cosine, over an added item and the user's training items, of their columns in
  the matrix of users and training items.
- ``distance``: median distance of an added item's number to the nearest of the user's.
- ``rank``: median rank by a retriever given the training history, with ``--retriever``.

The first row is about the test items themselves, in place of added ones.

Example:
    python -m benchmarks.augmentation_hits --dataset_code ml-100k \\
        --runs experiments/llm4idrec/ml-100k experiments/controls/popularity
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from augmentation.filters import judge
from augmentation.merge import Interactions, load_augmented
from augmentation.prompts import training_history
from benchmarks.common import DATASETS, Row, add_data_flags, load_data, make_parser, report, run
from datasets import SequenceDataset
from errors import advice, flag_names

QUARTERS = 4


def training_matrix(data: SequenceDataset) -> np.ndarray:
    """(U, V + 1) float32, 1 where a user has an item in training."""
    matrix = np.zeros((data.num_users, data.num_items + 1), dtype=np.float32)
    for user, row in enumerate(matrix):
        row[training_history(data, user)] = 1
    return matrix


def cosines(matrix: np.ndarray) -> np.ndarray:
    """(V + 1, V + 1) cosines between different columns, 0 on the diagonal."""
    unit = matrix / np.maximum(np.linalg.norm(matrix, axis=0), 1)
    products: np.ndarray = unit.T @ unit
    np.fill_diagonal(products, 0)
    return products


def describe(
    data: SequenceDataset, matrix: np.ndarray, similarity: np.ndarray, added: Interactions
) -> Row:
    """What is counted about a folder, but for the ranks; see the module."""
    users, items = added
    lengths = matrix.sum(axis=1)
    order = np.argsort(np.argsort(lengths, kind="stable"), kind="stable")
    quarters = order * QUARTERS // data.num_users
    hits = {split: items == data.targets(split)[users] for split in ("val", "test")}
    nearest = [np.abs(np.flatnonzero(matrix[u]) - i).min() for u, i in zip(users, items)]
    return {
        "items": len(items),
        **{split: int(hit.sum()) for split, hit in hits.items()},
        "chance": round(float((1 / (data.num_items - lengths))[users].sum()), 1),
        "test_quarters": np.bincount(quarters[users[hits["test"]]], minlength=QUARTERS).tolist(),
        "interactions": round(float(data.training_counts()[items].mean()), 1),
        "similarity": round(
            float(((similarity[items] * matrix[users]).sum(1) / lengths[users]).mean()), 3
        ),
        "distance": float(np.median(nearest)),
    }


def rows(data: SequenceDataset, runs: Sequence[Path], retriever: Path | None) -> Iterator[Row]:
    """Yield the row of the test items, then one for each folder."""
    matrix = training_matrix(data)
    similarity = cosines(matrix)
    users = np.arange(data.num_users, dtype=np.int32)
    added = {"test items": Interactions(users, data.targets("test"))}
    with flag_names(folder="runs"), advice("name a finished run with the same data"):
        added |= {folder.name: load_augmented(folder, data) for folder in runs}
    for name, interactions in added.items():
        row: Row = {"run": name} | describe(data, matrix, similarity, interactions)
        if retriever is not None:
            with flag_names(folder="retriever"):
                ranks, _ = judge(retriever, data, interactions, torch.device("cpu"))
            row["rank"] = float(np.median(ranks))
        yield row


def main(argv: Sequence[str] | None = None) -> None:
    """Count and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--dataset_code", required=True, choices=DATASETS)
    add_data_flags(parser)
    parser.add_argument("--runs", required=True, nargs="+", type=Path, help="folders to describe")
    parser.add_argument("--retriever", type=Path, help="run of train_retriever.py")
    flags = parser.parse_args(argv)
    data = load_data(flags.dataset_code, flags)
    with torch.inference_mode():
        report("augmentation_hits", "cpu", rows(data, flags.runs, flags.retriever))


if __name__ == "__main__":
    run(main)
