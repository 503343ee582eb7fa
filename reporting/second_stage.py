"""What a ranker does to its retriever's order: gains, ranks before and after, by user and item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets import SequenceDataset
from errors import UserError
from metrics import split_metric, user_gains
from reporting.runs import RANKER, Recipe, Run, read_run
from reporting.statistics import Difference, Gains, interval, paired_difference
from storage import read_arrays, read_json, reading

SECOND_STAGE = "What the second stage adds to its retriever, all users, with a paired bootstrap"
METRICS = ("MRR@10", "NDCG@10", "Recall@10")
NUM_EXAMPLES = 20
NUM_GROUPS = 3
SHOWN_HISTORY = 8
FUSION = "fusion.json"
SEED = 0  # of the users that are shown


class Effect(NamedTuple):
    """The S runs of a ranker beside their retrievers.

    Attributes:
        runs: the ranker's runs.
        ranks: (S, num_users) rank of each user's target by scores: ``retriever``, ``two stages``
            and ``fused``.
        retrieved: (S, num_users) whether the target is among the candidates.
        log_losses: mean log-loss on those users by the same scores, as far as it is recorded.
    """

    runs: list[Run]
    ranks: dict[str, np.ndarray]
    retrieved: np.ndarray
    log_losses: dict[str, float]

    @property
    def scores(self) -> list[str]:
        """The kinds of scores beside the retriever's."""
        return [scores for scores in self.ranks if scores != "retriever"]

    def differences(self) -> dict[str, dict[str, Difference]]:
        """By scores and metric, both stages minus the retriever, gains averaged over seeds."""
        gains = {
            scores: {
                metric: user_gains(ranks, *split_metric(metric)).mean(axis=0) for metric in METRICS
            }
            for scores, ranks in self.ranks.items()
        }
        before = gains.pop("retriever")
        return {
            scores: {metric: paired_difference(after[metric], before[metric]) for metric in METRICS}
            for scores, after in gains.items()
        }

    def shares(self, scores: str) -> dict[str, float]:
        """Shares of the retrieved users whose target rises, stays and falls."""
        change = (self.ranks[scores] - self.ranks["retriever"])[self.retrieved]
        return {
            "rises": float((change < 0).mean()),
            "stays": float((change == 0).mean()),
            "falls": float((change > 0).mean()),
        }

    def matrix(self, scores: str) -> np.ndarray:
        """(C, C) number of retrieved users by rank before and after, from 1."""
        before, after = (self.ranks[name][self.retrieved] - 1 for name in ("retriever", scores))
        counts = np.zeros((max(before.max(), after.max()) + 1,) * 2, dtype=np.int64)
        np.add.at(counts, (before, after), 1)
        return counts


def find_effects(recipes: Sequence[Recipe]) -> dict[str, Effect]:
    """The effect of each ranker among the recipes, by its name.

    Raises:
        InputError: a retriever's run or a ``fusion.json`` is damaged.
    """
    rankers = (recipe for recipe in recipes if recipe.model == RANKER)
    effects = {recipe.name: find_effect(recipe) for recipe in rankers}
    return {name: effect for name, effect in effects.items() if effect}


def find_effect(recipe: Recipe) -> Effect | None:
    """Read the retrievers of a ranker's runs; None if the scores are fused or all are gone.

    Raises:
        InputError: a retriever's run or a ``fusion.json`` is damaged.
    """
    pairs = [(run, _retriever_of(run)) for run in recipe.runs if run.fused_ranks is not None]
    found = [(run, retriever) for run, retriever in pairs if retriever is not None]
    if not found:
        return None
    runs = [run for run, _ in found]
    ranks = {
        "retriever": np.stack([retriever.ranks for _, retriever in found]),
        "two stages": np.stack([run.ranks for run in runs]),
        "fused": np.stack([run.fused_ranks for run in runs if run.fused_ranks is not None]),
    }
    return Effect(runs, ranks, np.stack([run.retrieved for run in runs]), _log_losses(runs))


def _retriever_of(run: Run) -> Run | None:
    """The run of a ranker's retriever; None if it is gone or another run has taken its place."""
    retriever = read_run(Path(run.settings.get("retrieved_from", "")))
    if retriever is None or len(retriever.ranks) != len(run.ranks):
        return None
    same = retriever.settings["data_fingerprint"] == run.settings["data_fingerprint"]
    return retriever if same else None


def _log_losses(runs: Sequence[Run]) -> dict[str, float]:
    """The test's log-losses in the runs' ``fusion.json``, means over the runs."""
    paths = [run.folder / FUSION for run in runs]
    if not all(path.exists() for path in paths):
        return {}
    losses = []
    for path in paths:
        with reading(path):
            test = read_json(path)["log_loss"]["test"]
            names = {"retriever": "retriever", "two stages": "ranker", "fused": "fused"}
            losses.append({scores: float(test[name]) for scores, name in names.items()})
    return {scores: float(np.mean([loss[scores] for loss in losses])) for scores in losses[0]}


class Group(NamedTuple):
    """A group of users.

    Attributes:
        label: which users.
        num_users: how many.
        means: mean of a metric with its 95% interval, by scores.
    """

    label: str
    num_users: int
    means: dict[str, tuple[float, float, float]]


def groups(effect: Effect, values: np.ndarray, metric: str, k: int) -> list[Group]:
    """Means of a metric for groups of users of about equal size, by some property.

    Args:
        effect: the ranks.
        values: (num_users,) the property, whole numbers.
        metric: name of the metric.
        k: its cut-off.
    """
    edges = np.unique(np.quantile(values, np.linspace(0, 1, NUM_GROUPS + 1)[1:], method="lower"))
    group_of = np.searchsorted(edges, values)
    found = []
    for index in range(len(edges)):
        members = group_of == index
        low, high = values[members].min(), values[members].max()
        means = {}
        for name, ranks in effect.ranks.items():
            gains = user_gains(ranks[:, members], metric, k)
            counted = Gains(gains, np.ones_like(gains, dtype=bool))
            means[name] = (counted.mean(), *interval(counted))
        label = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        found.append(Group(label, int(members.sum()), means))
    return found


def user_properties(data: SequenceDataset) -> dict[str, np.ndarray]:
    """Properties of the users by what they are called."""
    popularity = data.training_counts()[data.targets("test")]
    return {
        "interactions before the target": np.diff(data.offsets) - 1,
        "training interactions with the target": popularity,
    }


class Example(NamedTuple):
    """A user to look at.

    Attributes:
        user: identifier.
        history: the last titles before the target, oldest first.
        length: items before the target.
        candidates: title, rank before, rank after and whether it is the target, in the order after.
    """

    user: str
    history: list[str]
    length: int
    candidates: list[tuple[str, int, int, bool]]


def examples(effect: Effect, data: SequenceDataset) -> list[Example]:
    """Some retrieved users of the first run, at random, with candidates in the ranker's order.

    Raises:
        InputError: the rankings or candidates are damaged.
        UserError: they do not belong together.
    """
    run = effect.runs[0]
    folder = run.folder
    with reading(folder / "rankings.npz"):
        rankings = read_arrays(folder / "rankings.npz")
        users, items = rankings["users"], rankings["items"]
    source = Path(run.settings["retrieved_from"]) / "candidates.npz"
    with reading(source):
        before = read_arrays(source)["test_items"]
    chosen = np.random.default_rng(SEED).permutation(len(users))[:NUM_EXAMPLES]
    found = []
    for row in np.sort(chosen).tolist():
        user = int(users[row])
        rank_of = {int(item): rank for rank, item in enumerate(before[user], 1)}
        if set(rank_of) != set(items[row].tolist()):
            raise UserError(f"{folder} was made with other candidates than {source.parent}")
        start, end = data.offsets[user], data.history_ends("test")[user]
        target = int(data.item_ids[end])
        history = [data.titles[item] for item in data.item_ids[start:end][-SHOWN_HISTORY:]]
        candidates = [
            (data.titles[item], rank_of[item], rank, item == target)
            for rank, item in enumerate(items[row].tolist(), 1)
        ]
        found.append(Example(data.user_names[user], history, int(end - start), candidates))
    return found
