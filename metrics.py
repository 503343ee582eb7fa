"""Recall, MRR and NDCG with one relevant item per user, computed from the rank of that item."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

# Gain of a hit at each rank. The ideal ranking has gain 1, so NDCG needs no normalization.
METRIC_GAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Recall": np.ones_like,
    "MRR": lambda ranks: 1 / ranks,
    "NDCG": lambda ranks: 1 / np.log2(ranks + 1),
}


def split_metric(metric: str) -> tuple[str, int]:
    """Split ``NDCG@10`` into ``NDCG`` and 10.

    Raises:
        ValueError: the metric is unknown or has no cut-off.
    """
    name, _, k = metric.partition("@")
    if name not in METRIC_GAINS or not re.fullmatch("[1-9][0-9]*", k):
        raise ValueError("use Recall, MRR or NDCG with a cut-off, e.g. Recall@10")
    return name, int(k)


def user_gains(ranks: np.ndarray, name: str, k: int) -> np.ndarray:
    """Compute Recall, MRR or NDCG at ``k`` for each user: 0 if the target's rank exceeds ``k``.

    Args:
        ranks: (users,) 1-based rank of the target among all items.
        name: ``Recall``, ``MRR`` or ``NDCG``.
        k: cut-off.

    Returns:
        (users,) float64.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    return np.where(ranks <= k, METRIC_GAINS[name](ranks), 0.0)


def ranking_metrics(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Average Recall@k, MRR@k and NDCG@k over users.

    Args:
        ranks: (users,) 1-based rank of the target among all items.
        ks: cut-offs.

    Returns:
        ``Recall@k``, ``MRR@k`` and ``NDCG@k`` for each k, and ``num_users``. Without users the
        metrics are 0.
    """
    metrics: dict[str, float] = {}
    for k in ks:
        for name in METRIC_GAINS:
            gains = user_gains(ranks, name, k)
            metrics[f"{name}@{k}"] = float(gains.mean()) if len(gains) else 0.0
    metrics["num_users"] = len(ranks)
    return metrics
