"""How a ranker changes its retriever's order: gains, ranks before and after, groups of users."""

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
SEED = 0  # selects the users that are shown


class Effect(NamedTuple):
    """The S runs of a ranker compared with their retrievers.

    Attributes:
        runs: the ranker's runs.
        ranks: (S, num_users) rank of each user's target by kind of scores: ``retriever``, ``two
            stages`` and ``fused``.
        retrieved: (S, num_users) whether the target is among the candidates.
        log_losses: mean log-loss on the retrieved users by the same keys; empty if not recorded.
    """

    runs: list[Run]
    ranks: dict[str, np.ndarray]
    retrieved: np.ndarray
    log_losses: dict[str, float]

    @property
    def scores(self) -> list[str]:
        """The kinds of scores other than the retriever's."""
        return [scores for scores in self.ranks if scores != "retriever"]

    def differences(self) -> dict[str, dict[str, Difference]]:
        """Both stages minus the retriever by kind of scores and metric, averaged over seeds."""
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
    """The effect of each ranker among the recipes, by the recipe's name.

    Raises:
        InputError: a retriever's run or a ``fusion.json`` is damaged.
    """
    rankers = (recipe for recipe in recipes if recipe.model == RANKER)
    effects = {recipe.name: find_effect(recipe) for recipe in rankers}
    return {name: effect for name, effect in effects.items() if effect}


def find_effect(recipe: Recipe) -> Effect | None:
    """Read the retrievers of a ranker's runs; None if its ranks are fused or no retriever is left.

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
    """Log-losses on the test split from the runs' ``fusion.json``, averaged over the runs."""
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
        means: mean of a metric, lower and upper end of its 95% interval, by kind of scores.
    """

    label: str
    num_users: int
    means: dict[str, tuple[float, float, float]]


def groups(effect: Effect, values: np.ndarray, metric: str, k: int) -> list[Group]:
    """Means of a metric for groups of users of about equal size, by some property.

    Users for whom the property is 0 form a group of their own.

    Args:
        effect: the ranks.
        values: (num_users,) the property, a whole number for each user.
        metric: name of the metric.
        k: its cut-off.
    """
    positive, shares = values[values > 0], np.linspace(0, 1, NUM_GROUPS + 1)[1:]
    quantiles = np.quantile(positive, shares, method="lower") if len(positive) else positive
    edges = np.unique(np.append(quantiles, values[values == 0]))
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
    """(num_users,) properties of the users, by their description in the report."""
    popularity = data.training_counts()[data.targets("test")]
    return {
        "interactions before the target": np.diff(data.offsets) - 1,
        "training interactions with the target (0: a cold item)": popularity,
    }


class Letters(NamedTuple):
    """What a ranker chose among C letters, and where it was right.

    Attributes:
        targets: (C,) shares of users whose target has the letter.
        chosen: (C,) shares of users for whom the letter was chosen.
        accuracy: (C,) shares of right choices where the target has the letter; NaN if it never has.
    """

    targets: np.ndarray
    chosen: np.ndarray
    accuracy: np.ndarray


def letters(effect: Effect) -> Letters | None:
    """Which letters the runs of a ranker chose; None without letters, or with permutations.

    Without permutations, letters are in the retriever's order in evaluation.

    Raises:
        InputError: the rankings or candidates are damaged.
        UserError: they do not belong together.
    """
    settings = effect.runs[0].settings
    if settings.get("verbalizer") != "letters" or settings.get("permutations") != 1:
        return None
    found = []
    for run, ranks in zip(effect.runs, effect.ranks["retriever"]):
        users, after, before = _orders(run)
        found.append(np.stack([ranks[users] - 1, (before == after[:, :1]).argmax(axis=1)]))
    target, chosen = np.concatenate(found, axis=1)
    size = before.shape[1]
    targets, choices, hits = (
        np.bincount(letter, minlength=size) for letter in (target, chosen, target[target == chosen])
    )
    accuracy = np.divide(hits, targets, out=np.full(size, np.nan), where=targets > 0)
    return Letters(targets / len(target), choices / len(target), accuracy)


def _orders(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) retrieved users, (n, C) their candidates in the ranker's order and the retriever's.

    Raises:
        InputError: the rankings or candidates are damaged.
        UserError: they do not belong together.
    """
    with reading(run.folder / "rankings.npz"):
        rankings = read_arrays(run.folder / "rankings.npz")
        users, after = rankings["users"], rankings["items"]
    source = Path(run.settings["retrieved_from"]) / "candidates.npz"
    with reading(source):
        before = read_arrays(source)["test_items"][users]
    if before.shape != after.shape or (np.sort(before, axis=1) != np.sort(after, axis=1)).any():
        raise UserError(f"{run.folder} was made with other candidates than {source.parent}")
    return users, after, before


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
    users, after, before = _orders(effect.runs[0])
    chosen = np.random.default_rng(SEED).permutation(len(users))[:NUM_EXAMPLES]
    found = []
    for row in np.sort(chosen).tolist():
        user = int(users[row])
        rank_of = {int(item): rank for rank, item in enumerate(before[row], 1)}
        start, end = data.offsets[user], data.history_ends("test")[user]
        target = int(data.item_ids[end])
        history = [data.titles[item] for item in data.item_ids[start:end][-SHOWN_HISTORY:]]
        candidates = [
            (data.titles[item], rank_of[item], rank, item == target)
            for rank, item in enumerate(after[row].tolist(), 1)
        ]
        found.append(Example(data.user_names[user], history, int(end - start), candidates))
    return found
