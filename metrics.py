"""Recall, MRR and NDCG for one relevant item a user, from the rank of that item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ranking_metrics(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Means over users of Recall@k, MRR@k and NDCG@k.

    With a single relevant item at rank r, for r <= k: Recall = 1, MRR = 1 / r and
    NDCG = 1 / log2(r + 1), as the ideal ranking's gain is 1; all are 0 for r > k.

    Args:
        ranks: (users,) 1-based rank of the answer among all items.
        ks: cut-offs.

    Returns:
        ``Recall@k``, ``MRR@k`` and ``NDCG@k`` for each k, and ``num_users``. Without users the
        metrics are 0.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    metrics: dict[str, float] = {}
    for k in ks:
        hit = ranks <= k
        gains = {"Recall": hit, "MRR": hit / ranks, "NDCG": hit / np.log2(ranks + 1)}
        for name, gain in gains.items():
            metrics[f"{name}@{k}"] = float(gain.mean()) if len(ranks) else 0.0
    metrics["num_users"] = len(ranks)
    return metrics
