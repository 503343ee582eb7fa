"""The conditional logit over both stages' features."""

import numpy as np
import pytest

from evaluation.fusion import ALONE, RETRIEVER, fit_fusion, log_losses, log_softmax
from evaluation.reranking import targets_among


def simulated(weights: dict[str, float], n: int = 2000, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Features, and targets drawn from the model with these weights."""
    rng = np.random.default_rng(seed)
    features = {name: rng.normal(size=(n, 20)) for name in weights}
    scores = np.sum([w * features[name] for name, w in weights.items()], axis=0)
    probabilities = np.exp(log_softmax(scores))
    targets = np.array([rng.choice(20, p=p) for p in probabilities])
    return features, targets


def test_log_loss_by_hand():
    scores = np.log([[1.0, 2.0, 1.0], [3.0, 1.0, 4.0]])
    assert log_losses(scores, np.array([1, 0])) == pytest.approx([np.log(2), np.log(8 / 3)])
    items = np.array([[4, 7, 9], [2, 5, 1]])
    assert targets_among(items, np.array([9, 2])).tolist() == [2, 0]


def test_weights_are_recovered():
    truth = {RETRIEVER: 0.9, "title": 0.5, "length": -0.3}
    features, targets = simulated(truth, n=6000)
    fusion = fit_fusion(features, targets, base=RETRIEVER)
    assert fusion.strength != ALONE
    for name, weight in truth.items():
        assert fusion.weights[name] == pytest.approx(weight, abs=0.06)


def test_fit_is_a_minimum():
    features, targets = simulated({RETRIEVER: 1.0, "title": 0.4}, n=500)
    fusion = fit_fusion(features, targets, base=RETRIEVER)
    penalty = fusion.strength * features["title"].var()

    def objective(retriever: float, title: float) -> float:
        scores = retriever * features[RETRIEVER] + title * features["title"]
        return log_losses(scores, targets).mean() + penalty * title**2

    best = fusion.weights[RETRIEVER], fusion.weights["title"]
    for step in ((1e-2, 0), (-1e-2, 0), (0, 1e-2), (0, -1e-2)):
        assert objective(*np.add(best, step)) > objective(*best)


@pytest.mark.parametrize("seed", range(5))
def test_features_that_predict_nothing_are_ignored(seed: int):
    features, targets = simulated({RETRIEVER: 1.0, "title": 0.0}, n=300, seed=seed)
    fusion = fit_fusion(features, targets, base=RETRIEVER)
    order = (-fusion.scores(features)).argsort(axis=1)
    if fusion.strength == ALONE:
        assert fusion.weights["title"] == 0
        assert (order == (-features[RETRIEVER]).argsort(axis=1)).all()
    loss = log_losses(fusion.scores(features), targets).mean()
    assert loss <= log_losses(features[RETRIEVER], targets).mean() + 1e-9


def test_noise_is_mostly_ignored():
    chosen = [
        fit_fusion(*simulated({RETRIEVER: 1.0, "title": 0.0}, n=200, seed=s), base=RETRIEVER)
        for s in range(20)
    ]
    assert sum(fusion.strength == ALONE for fusion in chosen) >= 14


def test_a_retriever_that_is_always_right_and_constant_features():
    rng = np.random.default_rng(0)
    retriever = rng.normal(size=(50, 5))
    targets = retriever.argmax(axis=1)
    features = {"constant": np.ones((50, 5)), RETRIEVER: retriever}
    fusion = fit_fusion(features, targets, base=RETRIEVER)
    assert np.isfinite(list(fusion.weights.values())).all()
    assert (
        fusion.scores({"constant": np.ones((50, 5)), RETRIEVER: retriever}).argmax(1) == targets
    ).all()


def test_scores_may_hold_minus_infinity_where_the_weight_is_zero():
    features, targets = simulated({RETRIEVER: 1.0}, n=50)
    fusion = fit_fusion(features, targets, base=RETRIEVER)
    fusion.weights["title"] = 0.0
    assert np.isfinite(fusion.scores(features | {"title": np.full((50, 20), -np.inf)})).all()
