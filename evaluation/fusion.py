"""Fusion of both stages: a conditional logit over the candidates of each user.

With features x[c] of candidate c and weights w, the fused scores and probabilities are

    s[c] = w . x[c]        p[c] = exp(s[c]) / sum over c' of exp(s[c'])

(D. McFadden, Conditional Logit Analysis of Qualitative Choice Behavior, 1974). The weights minimize
the mean log-loss of the targets on the validation split plus a penalty on all features but one, the
base, which is usually the retriever's log-probability:

    L(w) = mean of -log p[target]  +  strength * sum over j != base of (sd[j] w[j])^2

where sd[j] is the standard deviation of feature j over the candidates of a user. Without the other
features this is the retriever with a temperature, which does not change its ranking.
Cross-validation over users chooses the strength. Unless the improvement exceeds its standard error,
only the base gets a weight, so that features without predictive value are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RETRIEVER = "retriever_log_probability"
ALONE = float("inf")  # the strength at which only the base has a weight
STRENGTHS = (ALONE, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
BASE_STRENGTH = 1e-4  # keeps the base's weight finite even if the base ranks every target first
NUM_FOLDS = 10
MAX_NEWTON_STEPS = 50
TOLERANCE = 1e-10


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """(n, C) log-probabilities of the candidates, in float64."""
    scores = scores.astype(np.float64)
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def log_losses(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(n,) log-loss of each user.

    Args:
        scores: (n, C) scores whose softmax gives the probabilities.
        targets: (n,) index of the target among the candidates.
    """
    return -log_softmax(scores)[np.arange(len(targets)), targets]


@dataclass(frozen=True)
class Fusion:
    """A fitted fusion.

    Attributes:
        weights: weight by feature.
        strength: strength of the penalty that cross-validation chose.
        cv_log_loss: cross-validated log-loss by strength.
    """

    weights: dict[str, float]
    strength: float = ALONE
    cv_log_loss: dict[float, float] = field(default_factory=dict)

    def penalty_record(self) -> dict[str, Any]:
        """The choice of the strength as JSON values; an infinite strength becomes ``None``."""
        return {
            "strength": self.strength if np.isfinite(self.strength) else None,
            "cross_validated_log_loss": {f"{k:g}": v for k, v in self.cv_log_loss.items()},
        }

    def scores(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """(n, C) fused scores of candidates, from features (n, C) by name."""
        # Features without a weight may be infinite.
        terms = [weight * features[name] for name, weight in self.weights.items() if weight]
        return np.sum(terms, axis=0)


def fit_fusion(
    features: Mapping[str, np.ndarray], targets: np.ndarray, *, base: str, seed: int = 0
) -> Fusion:
    """Fit the weights of the features, with a penalty chosen by cross-validation.

    Args:
        features: (n, C) by name.
        targets: (n,) index of the target among the candidates.
        base: the feature without a penalty, except for ``BASE_STRENGTH`` on its distance from 1.
        seed: seed of the folds.
    """
    names = [base, *(name for name in features if name != base)]
    x = np.stack([features[name].astype(np.float64) for name in names], axis=-1)  # (n, C, F)
    losses = _cross_validated_losses(x, targets, seed)
    best = min(STRENGTHS, key=lambda strength: losses[strength].mean())
    gains = losses[ALONE] - losses[best]
    if gains.mean() <= gains.std() / np.sqrt(len(gains)):
        best = ALONE
    weights = _fit(x, targets, best)
    means = {strength: float(loss.mean()) for strength, loss in losses.items()}
    return Fusion(dict(zip(names, weights.tolist())), best, means)


def _cross_validated_losses(
    x: np.ndarray, targets: np.ndarray, seed: int
) -> dict[float, np.ndarray]:
    """(n,) log-loss of each user under weights fitted to the others, by strength."""
    folds = np.random.default_rng(seed).permutation(len(targets)) % min(NUM_FOLDS, len(targets))
    losses = {strength: np.empty(len(targets)) for strength in STRENGTHS}
    for fold in np.unique(folds):
        held_out = folds == fold
        for strength in STRENGTHS:
            weights = _fit(x[~held_out], targets[~held_out], strength)
            losses[strength][held_out] = log_losses(x[held_out] @ weights, targets[held_out])
    return losses


def _fit(x: np.ndarray, targets: np.ndarray, strength: float) -> np.ndarray:
    """(F,) weights that minimize the penalized log-loss; the first feature is the base.

    Args:
        x: (n, C, F) features.
        targets: (n,) index of the target.
        strength: strength of the penalty.
    """
    weights = np.zeros(x.shape[-1])
    weights[0] = 1.0
    if not len(targets):
        return weights
    variances = x.var(axis=1).mean(axis=0)  # within users: constants per user have no effect
    if strength == ALONE:
        weights[:1] = _newton(x[..., :1], targets, BASE_STRENGTH * variances[:1], weights[:1])
        return weights
    # Constant features would make the Hessian singular.
    penalty = strength * np.maximum(variances, 1e-12)
    penalty[0] = BASE_STRENGTH * variances[0]
    return _newton(x, targets, penalty, weights)


def _newton(
    x: np.ndarray, targets: np.ndarray, penalty: np.ndarray, prior: np.ndarray
) -> np.ndarray:
    """(F,) weights w that minimize mean log-loss + sum of penalty * (w - prior)^2.

    With p the probabilities and x[t] the features of the target, the gradient and Hessian of the
    log-loss are the mean of E[x] - x[t] and the mean covariance of x under p. The problem is
    convex; a step that does not decrease the objective is halved.
    """
    chosen = x[np.arange(len(targets)), targets]

    def objective(w: np.ndarray) -> float:
        return float(log_losses(x @ w, targets).mean() + (penalty * (w - prior) ** 2).sum())

    weights, value = prior, objective(prior)
    for _ in range(MAX_NEWTON_STEPS):
        p = np.exp(log_softmax(x @ weights))
        expected = np.einsum("nc,ncf->nf", p, x)
        gradient = (expected - chosen).mean(axis=0) + 2 * penalty * (weights - prior)
        second = np.einsum("nc,ncf,ncg->fg", p, x, x, optimize=True) / len(targets)
        hessian = second - expected.T @ expected / len(targets) + np.diag(2 * penalty)
        step = np.linalg.solve(hessian, gradient)
        while (reached := objective(weights - step)) > value and np.abs(step).max() > TOLERANCE:
            step = step / 2
        if value - reached < TOLERANCE:
            break
        weights, value = weights - step, reached
    return weights
