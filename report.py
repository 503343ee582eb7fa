"""Tables 1 and 3 of the paper beside the runs under ``experiments/``, from their per-user ranks.

Example:
    python report.py
    python report.py --compare experiments/lru/games experiments/smollm2-135m/games
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError, run_main
from metrics import METRIC_GAINS, ranking_metrics, user_gains
from storage import atomic_path, read_json

PAPER = Path(__file__).parent / "experiments" / "paper.json"
PAPER_MODELS = {"lru": "LRURec", "sas": "SASRec", "bert": "BERT4Rec", "narm": "NARM"}
RANKER = "LlamaRec"
METRICS = ("MRR@5", "NDCG@5", "Recall@5", "MRR@10", "NDCG@10", "Recall@10")
BOOTSTRAP_SAMPLES = 10_000


class Run(NamedTuple):
    """One finished run.

    Attributes:
        folder: where it lies.
        model: its folder's name.
        dataset: the data set's code.
        ranks: (num_users,) rank of every user's answer in the test split.
        retrieved: (num_users,) whose answers are among the candidates.
    """

    folder: Path
    model: str
    dataset: str
    ranks: np.ndarray
    retrieved: np.ndarray

    @property
    def column(self) -> str:
        """The paper's column it belongs to."""
        return PAPER_MODELS.get(self.model, RANKER)


def read_run(folder: Path) -> Run | None:
    """The run in a folder, or None if there is none that has finished.

    Raises:
        UserError: a file of it cannot be read.
    """
    try:
        if (folder / "overall_metrics.json").exists():
            with np.load(folder / "rankings.npz", allow_pickle=False) as file:
                ranks = file["label_ranks"]
                retrieved = np.zeros(len(ranks), dtype=bool)
                retrieved[file["users"]] = True
        elif (folder / "test_metrics.json").exists():
            with np.load(folder / "candidates.npz", allow_pickle=False) as file:
                ranks = file["test_label_ranks"]
                retrieved = (file["test_items"] == file["test_labels"][:, None]).any(axis=1)
        else:
            return None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged: {error}") from error
    dataset = read_json(folder / "config.json")["dataset_code"]
    return Run(folder, folder.parent.name, dataset, ranks, retrieved)


def gains(ranks: np.ndarray, metric: str) -> np.ndarray:
    """(num_users,) each user's share in a metric such as ``NDCG@10``."""
    name, _, k = metric.partition("@")
    if name not in METRIC_GAINS or not k.isdigit() or int(k) < 1:
        raise UserError(f"--metric {metric}: use {', '.join(METRIC_GAINS)} and a cut-off, NDCG@10")
    return user_gains(ranks, name, int(k))


def bootstrap_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """(samples,) means of ``values`` over users drawn anew with replacement."""
    rng = np.random.default_rng(seed)
    size = len(values)
    # Few distinct values stand for many users: drawing their counts costs the same and less memory.
    distinct, counts = np.unique(values, return_counts=True)
    return rng.multinomial(size, counts / size, BOOTSTRAP_SAMPLES) @ distinct / size


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of a mean."""
    low, high = np.quantile(bootstrap_means(values), [0.025, 0.975])
    return float(low), float(high)


def table(runs: Sequence[Run], paper: dict, *, subset: bool) -> list[str]:
    """Lines of Markdown: a block of six metrics for each run, beside the paper."""
    numbers = paper["retrieved_users" if subset else "all_users"]
    lines = ["| data set | model | metric | ours | 95% interval | paper | difference |"]
    lines.append("|---|---|---|---|---|---|---|")
    for run in runs:
        ranks = run.ranks[run.retrieved] if subset else run.ranks
        ours = ranking_metrics(ranks, [5, 10])
        theirs = numbers.get(run.dataset, {}).get(run.column, {})
        for metric in METRICS:
            low, high = interval(gains(ranks, metric))
            line = f"| `{run.dataset}` | {run.model} | {metric} | {ours[metric]:.4f} |"
            line += f" {low:.4f} to {high:.4f} |"
            if metric in theirs:
                difference = ours[metric] / theirs[metric] - 1
                line += f" {theirs[metric]:.4f} ({run.column}) | {difference:+.1%} |"
            else:
                line += " | |"
            lines.append(line)
    return lines


def compare(first: Run, second: Run, metric: str) -> str:
    """A paired bootstrap of the difference between two runs on the same users.

    Raises:
        UserError: the runs are of different data.
    """
    fingerprints = [
        read_json(r.folder / "config.json")["data_fingerprint"] for r in (first, second)
    ]
    if fingerprints[0] != fingerprints[1]:
        raise UserError(f"{first.folder} and {second.folder} are runs on different data")
    differences = gains(second.ranks, metric) - gains(first.ranks, metric)
    low, high = interval(differences)
    means = bootstrap_means(differences)
    p = min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))
    return (
        f"{metric}: {second.folder} minus {first.folder} = {differences.mean():+.4f}, "
        f"95% interval {low:+.4f} to {high:+.4f}, paired bootstrap p = {p:.4f} "
        f"({len(differences):,} users)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables and write ``report.md``, or compare two runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--experiment_root", default="experiments")
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="two run folders")
    parser.add_argument("--metric", default="NDCG@10", help="metric to compare (default: NDCG@10)")
    flags = parser.parse_args(argv)
    if flags.compare:
        pair = []
        for name in flags.compare:
            run = read_run(Path(name))
            if run is None:
                raise UserError(f"--compare {name}: no finished run there")
            pair.append(run)
        print(compare(*pair, flags.metric))
        return
    folders = sorted(path.parent for path in Path(flags.experiment_root).glob("*/*/config.json"))
    runs = [run for run in map(read_run, folders) if run is not None]
    if not runs:
        raise UserError(f"--experiment_root {flags.experiment_root}: no finished run there")
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    lines = ["# All users (Table 1)", "", *table(runs, paper, subset=False), ""]
    lines += ["# Users whose answer was retrieved (Table 3)", "", *table(runs, paper, subset=True)]
    text = "\n".join(lines) + "\n"
    target = Path(flags.experiment_root, "report.md")
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {target}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
