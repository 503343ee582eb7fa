"""Gains, bootstrap intervals and paired comparisons."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from errors import ArgumentError, UserError
from reporting.runs import Recipe, Run
from reporting.statistics import (
    BOOTSTRAP_SAMPLES,
    Gains,
    bootstrap_means,
    compare,
    interval,
    recipe_gains,
)


def test_gains_count_all_users_or_those_retrieved(make_run: Callable[..., Run]):
    recipe = Recipe("two", [make_run(), make_run(ranks=np.arange(10, 0, -1))])
    gains = recipe_gains(recipe, "Recall@3")
    assert gains.counted.all() and gains.values.shape == (2, 10)
    assert gains.values[0].tolist() == [1] * 3 + [0] * 7
    assert gains.mean() == pytest.approx(0.3) and gains.seed_deviation() == pytest.approx(0)
    retrieved = recipe_gains(recipe, "Recall@3", retrieved_only=True)
    assert retrieved.mean() == pytest.approx((3 / 5 + 0) / 2)
    assert retrieved.seed_deviation() == pytest.approx(np.std([3 / 5, 0], ddof=1))


def test_unknown_metrics_are_refused(make_run: Callable[..., Run]):
    with pytest.raises(ArgumentError) as caught:
        recipe_gains(Recipe("one", [make_run()]), "NDCG@ten")
    assert (caught.value.argument, caught.value.value) == ("metric", "NDCG@ten")


def test_interval_matches_the_normal_approximation():
    values = (np.random.default_rng(0).random(2000) < 0.3).astype(float)
    low, high = interval(Gains(values[None], np.ones((1, 2000), dtype=bool)))
    error = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / len(values))
    assert low == pytest.approx(values.mean() - error, abs=error / 10)
    assert high == pytest.approx(values.mean() + error, abs=error / 10)


def test_bootstrap_has_the_distribution_of_drawing_users():
    rng = np.random.default_rng(1)
    values, counted = rng.random((3, 50)).round(1), rng.random((3, 50)) < 0.5
    counted[:, 0] = False  # a user that never counts is never drawn
    users = np.flatnonzero(counted.any(axis=0))
    draws = users[rng.integers(len(users), size=(BOOTSTRAP_SAMPLES, len(users)))]
    totals = np.where(counted, values, 0).sum(axis=0)[draws].sum(axis=1)
    expected = totals / counted.sum(axis=0)[draws].sum(axis=1)
    means = bootstrap_means(Gains(values, counted))
    assert means.shape == (BOOTSTRAP_SAMPLES,)
    assert means.mean() == pytest.approx(expected.mean(), abs=expected.std() / 20)
    assert means.std() == pytest.approx(expected.std(), rel=0.05)
    assert (means == bootstrap_means(Gains(values, counted))).all()
    assert (means != bootstrap_means(Gains(values, counted), seed=1)).any()


def test_interval_surrounds_the_mean_of_runs_that_retrieved_different_users(
    make_run: Callable[..., Run],
):
    ranks = np.tile([1, 8], 500)
    runs = [
        make_run(ranks=ranks, retrieved=ranks == 1),
        make_run(ranks=ranks, retrieved=np.ones(1000, dtype=bool), seed=7),
    ]
    gains = recipe_gains(Recipe("both", runs), "Recall@5", retrieved_only=True)
    low, high = interval(gains)
    # 1,000 of the 1,500 gains that count; averaging each user over runs first would give 3/4.
    assert gains.mean() == pytest.approx(2 / 3)
    assert low < gains.mean() < high < 0.72


def test_comparison_of_equal_recipes(make_run: Callable[..., Run]):
    recipe = Recipe("one", [make_run()])
    comparison = compare(recipe, recipe, "NDCG@10")
    assert comparison.difference == (0, 0, 0, 1) and comparison.num_users == 10


def test_comparison_finds_a_difference(make_run: Callable[..., Run]):
    ranks = np.random.default_rng(0).integers(2, 20, 200)
    worse, better = (Recipe("", [make_run(ranks=x)]) for x in (ranks, np.maximum(ranks // 2, 1)))
    mean, low, high, p = compare(worse, better, "NDCG@10").difference
    assert 0 < low < mean < high and p == 0
    assert compare(better, worse, "NDCG@10").difference.mean == -mean


def test_comparison_averages_over_seeds(make_run: Callable[..., Run]):
    one = make_run()
    changed = make_run(seed=2, ranks=one.ranks + 1)
    comparison = compare(Recipe("one", [one]), Recipe("two", [one, changed]), "Recall@5")
    assert comparison.difference.mean == pytest.approx((0.4 - 0.5) / 2)


def test_comparison_needs_the_same_data(make_run: Callable[..., Run]):
    one = Recipe("one", [make_run()])
    other = Recipe("other", [make_run(), make_run(data_fingerprint="other")])
    with pytest.raises(UserError, match="one and other are runs on different data"):
        compare(one, other, "NDCG@10")
