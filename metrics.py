"""Recall, MRR and NDCG for one relevant item a user, from the rank of that item."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# What a hit at a rank is worth. The ideal ranking's gain is 1, so NDCG needs no division.
METRIC_GAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Recall": np.ones_like,
    "MRR": lambda ranks: 1 / ranks,
    "NDCG": lambda ranks: 1 / np.log2(ranks + 1),
}


def user_gains(ranks: np.ndarray, name: str, k: int) -> np.ndarray:
    """(users,) each user's Recall, MRR or NDCG at ``k``: 0 if the answer's rank is beyond it.

    Args:
        ranks: (users,) 1-based rank of the answer among all items.
        name: ``Recall``, ``MRR`` or ``NDCG``.
        k: cut-off.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    return np.where(ranks <= k, METRIC_GAINS[name](ranks), 0.0)


def ranking_metrics(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Means over users of Recall@k, MRR@k and NDCG@k.

    Args:
        ranks: (users,) 1-based rank of the answer among all items.
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
