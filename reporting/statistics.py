"""Means of metrics over users, their bootstrap intervals, and paired comparisons."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from errors import ArgumentError, UserError
from metrics import split_metric, user_gains
from reporting.runs import Recipe

BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_CHUNKS = 20  # drawn one after another to save memory


class Gains(NamedTuple):
    """Every user's gain in one metric, for S runs of one recipe.

    Attributes:
        values: (S, num_users) each user's gain.
        counted: (S, num_users) whether the gain enters the mean.
    """

    values: np.ndarray
    counted: np.ndarray

    def mean(self) -> float:
        """Mean over all users and runs."""
        return float(self.values[self.counted].mean())

    def seed_deviation(self) -> float:
        """Sample standard deviation of the runs' means."""
        means = [values[counted].mean() for values, counted in zip(self.values, self.counted)]
        return float(np.std(means, ddof=1))


def recipe_gains(recipe: Recipe, metric: str, *, retrieved_only: bool = False) -> Gains:
    """Gains of a recipe's runs.

    Args:
        recipe: the recipe.
        metric: name and cut-off, such as ``NDCG@10``.
        retrieved_only: count a user only in those runs that retrieved the target (Table 3).

    Raises:
        ArgumentError: ``metric`` is not a metric.
    """
    try:
        name, k = split_metric(metric)
    except ValueError as error:
        raise ArgumentError("metric", metric, str(error)) from error
    values = np.stack([user_gains(run.ranks, name, k) for run in recipe.runs])
    if retrieved_only:
        return Gains(values, np.stack([run.retrieved for run in recipe.runs]))
    return Gains(values, np.ones_like(values, dtype=bool))


def bootstrap_means(gains: Gains, seed: int = 0) -> np.ndarray:
    """Means over users resampled with replacement, each user with all runs.

    With t_u the sum of user u's gains that count and n_u their number, the mean over a sample is
    sum(t_u) / sum(n_u). It depends on the sample only through how often each distinct pair (t, n)
    occurs in it, and these frequencies follow a multinomial distribution. Drawing them instead of
    users is therefore exact, and cheap because there are few distinct pairs.

    Args:
        gains: the gains, of which at least one counts.
        seed: seed of the draws.

    Returns:
        (BOOTSTRAP_SAMPLES,) means.
    """
    values, counted = gains
    rng = np.random.default_rng(seed)
    pairs = np.stack([np.where(counted, values, 0).sum(axis=0), counted.sum(axis=0)])
    pairs = pairs[:, pairs[1] > 0]  # (2, U)
    num_users = pairs.shape[1]
    distinct, frequencies = np.unique(pairs, axis=1, return_counts=True)  # (2, P), (P,)
    chunk = BOOTSTRAP_SAMPLES // BOOTSTRAP_CHUNKS
    draws = [
        rng.multinomial(num_users, frequencies / num_users, chunk) @ distinct.T
        for _ in range(BOOTSTRAP_CHUNKS)
    ]
    totals, numbers = np.concatenate(draws).T
    means: np.ndarray = totals / numbers
    return means


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of bootstrap samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def interval(gains: Gains) -> tuple[float, float]:
    """95% bootstrap interval of the mean, see ``bootstrap_means``."""
    return percentile_interval(bootstrap_means(gains))


class Summary(NamedTuple):
    """A metric of a recipe.

    Attributes:
        mean: mean over all users and runs.
        low: lower end of the mean's 95% interval.
        high: upper end of the mean's 95% interval.
        deviation: standard deviation of the runs' means; None if there is one run.
    """

    mean: float
    low: float
    high: float
    deviation: float | None


@cache
def summarize(recipe: Recipe, metric: str, *, retrieved_only: bool = False) -> Summary | None:
    """Mean and interval of a recipe's metric, computed once; see ``recipe_gains``.

    Returns:
        The summary, or None if no user counts.
    """
    gains = recipe_gains(recipe, metric, retrieved_only=retrieved_only)
    if not gains.counted.any():
        return None
    deviation = gains.seed_deviation() if len(recipe.runs) > 1 else None
    return Summary(gains.mean(), *interval(gains), deviation)


class Difference(NamedTuple):
    """Mean difference between two gains of the same users, with a paired bootstrap.

    Attributes:
        mean: mean difference over users.
        low: lower end of its 95% interval.
        high: upper end of its 95% interval.
        p: two-sided p-value; 0 if all samples have the same sign.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Compare two gains (num_users,) of the same users: ours minus theirs."""
    differences = (ours - theirs)[None]
    means = bootstrap_means(Gains(differences, np.ones_like(differences, dtype=bool)))
    p = min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))
    return Difference(float(differences.mean()), *percentile_interval(means), float(p))


class Comparison(NamedTuple):
    """The difference between two recipes in one metric.

    Attributes:
        metric: the metric.
        first: the recipe that is subtracted.
        second: the recipe from which it is subtracted.
        difference: gains of the second minus those of the first.
        num_users: number of users.
    """

    metric: str
    first: Recipe
    second: Recipe
    difference: Difference
    num_users: int


def compare(first: Recipe, second: Recipe, metric: str) -> Comparison:
    """Compare two recipes on the same users, each user's gain averaged over seeds.

    Raises:
        ArgumentError: ``metric`` is not a metric.
        UserError: the runs are on different data.
    """
    if len({run.settings["data_fingerprint"] for run in first.runs + second.runs}) > 1:
        raise UserError(f"{first.name} and {second.name} are runs on different data")
    ours, theirs = (recipe_gains(recipe, metric).values.mean(axis=0) for recipe in (second, first))
    return Comparison(metric, first, second, paired_difference(ours, theirs), len(ours))
