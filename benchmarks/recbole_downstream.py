"""RecBole's models with and without added interactions: ranks of the test items, compared by user.

Trains a model of RecBole on the exports of several runs of ``augment_data.py`` or
``augmentation_controls.py`` and compares each with the first, whose items are the real ones: a
paired bootstrap over users, with gains averaged over the seeds. Splits, training, validation and
early stopping are RecBole's own, by NDCG@10 over the whole catalogue.

``recbole`` is the test NDCG@10 by RecBole's rules: general models never rank a user's training
items, so added items leave fewer that compete, and sequential models rank all items. ``NDCG@10``
and ``Recall@10`` have the same rules for every row: they leave out the user's real items only.

For the installation see ``recbole_parity.py``.

Example:
    .venv-recbole/bin/python -m benchmarks.recbole_downstream --model LightGCN --seeds 42 43 44 \\
        --runs experiments/controls/none experiments/llm4idrec/ml-100k
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from benchmarks.common import Row, make_parser, report
from benchmarks.recbole_exports import SETTINGS, read_rows
from metrics import user_gains
from reporting.statistics import paired_difference

METRICS = ("NDCG@10", "Recall@10")
SHARED = {
    "valid_metric": "NDCG@10", "metrics": ["NDCG"], "topk": [10], "metric_decimal_place": 6,
    "epochs": 100, "stopping_step": 3, "show_progress": False, "embedding_size": 64,
}  # fmt: skip
SEQUENTIAL = {
    "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 20, "train_batch_size": 1024,
    "n_layers": 1, "inner_size": 128,
}  # fmt: skip
# Few epochs on a CPU. What is not listed is RecBole's default.
BY_MODEL: dict[str, dict[str, Any]] = {
    "BPR": {"eval_step": 5, "learning_rate": 0.005},
    "LightGCN": {"eval_step": 5, "learning_rate": 0.005},
    "SASRec": SEQUENTIAL | {"epochs": 15, "hidden_dropout_prob": 0.2, "attn_dropout_prob": 0.2},
    "BERT4Rec": SEQUENTIAL | {"epochs": 15},
}
History = dict[str, list[str]]


class Fit(NamedTuple):
    """A trained model on the test split.

    Attributes:
        recbole: NDCG@10 by RecBole's rules.
        ranks: 1-based rank of the test item by user, without the user's items of the first run.
        epochs: epochs until the best validation.
    """

    recbole: float
    ranks: dict[str, int]
    epochs: int


def export_folder(run: Path) -> Path:
    """The folder of a run's only export for RecBole."""
    (folder,) = (run / "exports" / "recbole").iterdir()
    return folder


def histories(folder: Path) -> History:
    """Each user's items but the last, the test item."""
    items: History = defaultdict(list)
    for user, item, *_ in read_rows(folder / f"{folder.name}.inter"):
        items[user].append(item)
    return {user: own[:-1] for user, own in items.items()}


def fit(name: str, folder: Path, seed: int, excluded: History, options: dict[str, Any]) -> Fit:
    """Train a model and rank the test items with its best weights in validation."""
    settings = SETTINGS | SHARED | BY_MODEL[name] | options
    settings |= {"data_path": str(folder.parent.resolve()), "checkpoint_dir": ".", "seed": seed}
    best: dict[str, Any] = {"score": -1.0}

    def keep(epoch: int, score: float) -> None:  # in memory: RecBole's checkpoints are pickles
        if score > best["score"]:
            weights = copy.deepcopy(model.state_dict())
            best.update(score=score, epoch=epoch + 1, weights=weights)

    # RecBole writes logs into the working directory.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        config = Config(model=name, dataset=folder.name, config_dict=settings)
        init_seed(seed, reproducibility=True)
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
        init_seed(seed, reproducibility=True)
        model = get_model(name)(config, train.dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)
        trainer.fit(train, valid, verbose=False, saved=False, callback_fn=keep)
        model.load_state_dict(best["weights"])
        recbole = trainer.evaluate(test, load_best_model=False)["ndcg@10"]
    return Fit(float(recbole), dict(test_ranks(model, dataset, test, excluded)), best["epoch"])


@torch.inference_mode()
def test_ranks(model: Any, dataset: Any, test: Any, excluded: History) -> Iterator[tuple[str, int]]:
    """The rank of each user's test item among all items but the excluded."""
    model.eval()
    for batch, _, _, targets in test:
        scores = model.full_sort_predict(batch).view(len(targets), -1)
        scores[:, 0] = -torch.inf  # RecBole's padding
        users = dataset.id2token("user_id", batch["user_id"].numpy()).tolist()
        for row, user, target in zip(scores, users, targets.tolist()):
            score = row[target].clone()
            row[[dataset.token2id("item_id", item) for item in excluded[user]]] = -torch.inf
            yield user, 1 + int((row > score).sum())


def compare(
    name: str, runs: Sequence[Path], seeds: Sequence[int], options: dict[str, Any]
) -> Iterator[Row]:
    """Yield a row for each run and seed, and for each run but the first its differences to it."""
    folders = [export_folder(run) for run in runs]
    excluded = histories(folders[0])
    gains: dict[Path, dict[str, list[np.ndarray]]] = {}
    for run, folder in zip(runs, folders):
        gains[run] = {metric: [] for metric in METRICS}
        for seed in seeds:
            fitted = fit(name, folder, seed, excluded, options)
            ranks = np.array([fitted.ranks[user] for user in sorted(excluded)])
            means = {}
            for metric in METRICS:
                values = user_gains(ranks, *_split(metric))
                gains[run][metric].append(values)
                means[metric] = round(float(values.mean()), 4)
            yield {
                "model": name, "run": run.name, "seed": seed, "epochs": fitted.epochs,
                "recbole": round(fitted.recbole, 4), **means,
            }  # fmt: skip
        if run == runs[0]:
            continue
        for metric in METRICS:
            ours, theirs = (np.mean(gains[x][metric], axis=0) for x in (run, runs[0]))
            difference = paired_difference(ours, theirs)
            yield {"model": name, "run": run.name, "metric": metric} | {
                key: round(value, 4) for key, value in difference._asdict().items()
            }


def _split(metric: str) -> tuple[str, int]:
    name, k = metric.split("@")
    return name, int(k)


def main(argv: Sequence[str] | None = None) -> None:
    """Train on all runs and print ranks and differences."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, choices=BY_MODEL)
    parser.add_argument("--runs", required=True, nargs="+", type=Path, help="the first is real")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--epochs", type=int, help="most epochs, unless the model's own")
    flags = parser.parse_args(argv)
    options = {} if flags.epochs is None else {"epochs": flags.epochs}
    report("recbole_downstream", "cpu", compare(flags.model, flags.runs, flags.seeds, options))


if __name__ == "__main__":
    main()
