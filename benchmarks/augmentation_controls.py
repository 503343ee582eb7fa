"""Controls for generated interactions: the same number per user, from another source.

Reads a finished run of ``augment_data.py`` and writes a folder for ``train_retriever.py
--augmented``, with exports for other libraries. For each user it draws as many items as the run
has, without replacement and without those of the training history: ``popularity`` in proportion to
their training interactions, ``retriever`` from the softmax of a retriever's scores given the
training history. ``generated`` keeps the run's own items. With ``--per_user`` a user gets at most
that many, and with ``--shortest`` only users with the shortest training histories get any.
``--per_user 0`` exports the real interactions alone.

If a language model adds something of its own, its items must help more than the controls.

Example:
    python -m benchmarks.augmentation_controls --run experiments/llm4idrec/ml-100k \\
        --kind popularity --output experiments/controls/popularity
    python train_retriever.py --dataset_code ml-100k --augmented experiments/controls/popularity
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from augmentation.exports import export_merged
from augmentation.filters import BATCH_SIZE
from augmentation.merge import AUGMENTED_FILE, Interactions, load_augmented, save_augmented
from augmentation.prompts import training_history
from benchmarks.common import make_parser, report, run
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories
from datasets import SequenceDataset
from errors import UserError, advice, flag_names
from evaluation.retrieval import score_catalogue
from evaluation.sweep import sweep
from model.registry import load_retriever
from recipes.runs import check_own_folder, data_config, load_data
from storage import atomic_folder, read_json
from trainer.run_folder import CONFIG

KINDS = ("generated", "popularity", "retriever")


def select(
    data: SequenceDataset, interactions: Interactions, per_user: int | None, shortest: float
) -> Interactions:
    """The first ``per_user`` items of the ``shortest`` share of users by training history."""
    lengths = data.history_ends("train") - data.offsets[:-1]
    ranks = np.empty(data.num_users, dtype=np.int64)
    ranks[np.argsort(lengths, kind="stable")] = np.arange(data.num_users)
    starts = np.searchsorted(interactions.users, interactions.users)
    numbers = np.arange(len(interactions.users)) - starts  # of an item among its user's
    kept = ranks[interactions.users] < shortest * data.num_users
    if per_user is not None:
        kept &= numbers < per_user
    return Interactions(interactions.users[kept], interactions.items[kept])


def draw(weights: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw items without replacement in proportion to their weights, by the Gumbel-max trick.

    Args:
        weights: (V + 1,) logarithms, minus infinity for what cannot be drawn.
        size: number of items.
        rng: source of randomness.

    Returns:
        (size,) item ids, or fewer if fewer can be drawn.
    """
    noisy = weights + rng.gumbel(size=len(weights))
    size = min(size, int(np.isfinite(weights).sum()))
    return np.argsort(-noisy, kind="stable")[:size]


def by_popularity(data: SequenceDataset, sizes: np.ndarray, seed: int) -> list[np.ndarray]:
    """Items by user, in proportion to their training interactions."""
    with np.errstate(divide="ignore"):
        popularity = np.log(data.training_counts())
    popularity[0] = -np.inf
    items = []
    for user, size in enumerate(sizes):
        weights = popularity.copy()
        weights[training_history(data, user)] = -np.inf
        items.append(draw(weights, size, np.random.default_rng([seed, user])))
    return items


def by_retriever(
    data: SequenceDataset, sizes: np.ndarray, seed: int, folder: Path
) -> list[np.ndarray]:
    """Items by user, from the softmax of a retriever's scores."""
    retriever = load_retriever(folder, data.num_items)
    spec = retriever.spec
    items: list[np.ndarray] = []

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        for row in score_catalogue(retriever, batch, mask_history=True).double().numpy():
            user = len(items)
            items.append(draw(row, sizes[user], np.random.default_rng([seed, user])))
        return {"users": batch["targets"]}

    loader = evaluation_loader(Histories(data, "val", spec.max_len, spec.mask_token), BATCH_SIZE, 0)
    sweep(retriever, loader, step, description="retriever")
    return items


def main(argv: Sequence[str] | None = None) -> None:
    """Write the control that the flags select."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", required=True, help="finished run of augment_data.py")
    parser.add_argument("--kind", required=True, choices=KINDS)
    parser.add_argument("--retriever", help="run of train_retriever.py, for that kind")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--per_user", type=int, help="most items per user; no limit if absent")
    parser.add_argument("--shortest", type=float, default=1.0, help="share of the users")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--data_root", help="folder of raw data; the run's if not given")
    parser.add_argument("--cache_root", help="folder of preprocessed data; the run's if not given")
    flags = parser.parse_args(argv)
    if (flags.kind == "retriever") != (flags.retriever is not None):
        raise UserError("--retriever belongs to --kind retriever: give both or neither")
    run_dir, output = Path(flags.run), Path(flags.output)
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"--run {run_dir}: no finished run of augment_data.py there")
    check_own_folder(output, is_ours=(output / AUGMENTED_FILE).exists())
    settings = read_json(run_dir / CONFIG)
    data = load_data(data_config(run_dir, settings, flags.data_root, flags.cache_root))
    with flag_names(folder="run"), advice("name a finished run with the same data"):
        generated = load_augmented(run_dir, data)
    chosen = select(data, generated, flags.per_user, flags.shortest)
    sizes = np.bincount(chosen.users, minlength=data.num_users)
    if flags.kind != "generated":
        if flags.kind == "popularity":
            items = by_popularity(data, sizes, flags.seed)
        else:
            with torch.inference_mode(), flag_names(folder="retriever"):
                items = by_retriever(data, sizes, flags.seed, Path(flags.retriever))
        users = np.repeat(np.arange(data.num_users), [len(x) for x in items])
        chosen = Interactions(users.astype(np.int32), np.concatenate(items).astype(np.int32))
    with atomic_folder(output) as temporary:
        save_augmented(temporary / AUGMENTED_FILE, chosen, data.fingerprint)
        export_merged(data, chosen, temporary)
    row = {"kind": flags.kind, "items": len(chosen.items), "users": len(set(chosen.users.tolist()))}
    report("augmentation_controls", "cpu", [row])


if __name__ == "__main__":
    run(main)
