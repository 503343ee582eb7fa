"""What a ranker does to its retriever's order: ranks before and after, by user and by item."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets import SequenceDataset
from errors import UserError
from metrics import user_gains
from reporting.runs import RANKER, Run, read_run
from reporting.statistics import Gains, interval
from storage import read_arrays, reading

NUM_EXAMPLES = 20
NUM_GROUPS = 3
SHOWN_HISTORY = 8
SEED = 0  # of the users that are shown


class Effect(NamedTuple):
    """A finished ranker beside its retriever.

    Attributes:
        run: the ranker's run.
        ranks: (num_users,) rank of each user's target by scores: ``retriever``, ``two stages`` and
            ``fused``.
        retrieved: (num_users,) whether the target is among the candidates.
    """

    run: Run
    ranks: dict[str, np.ndarray]
    retrieved: np.ndarray

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


def find_effect(run: Run) -> Effect | None:
    """Read a ranker's retriever; None if the run is no ranker's or the retriever is gone.

    Raises:
        InputError: the retriever's run is damaged.
    """
    if run.model != RANKER or run.is_fused or run.fused_ranks is None:
        return None
    retriever = read_run(Path(run.settings.get("retrieved_from", "")))
    if retriever is None or len(retriever.ranks) != len(run.ranks):
        return None
    if retriever.settings["data_fingerprint"] != run.settings["data_fingerprint"]:
        return None
    ranks = {"retriever": retriever.ranks, "two stages": run.ranks, "fused": run.fused_ranks}
    return Effect(run, ranks, run.retrieved)


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
            gains = user_gains(ranks[members], metric, k)[None]
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
    """Some retrieved users, chosen at random, with their candidates in the ranker's order.

    Raises:
        InputError: the rankings or candidates are damaged.
        UserError: they do not belong together.
    """
    folder = effect.run.folder
    with reading(folder / "rankings.npz"):
        rankings = read_arrays(folder / "rankings.npz")
        users, items = rankings["users"], rankings["items"]
    source = Path(effect.run.settings["retrieved_from"]) / "candidates.npz"
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
