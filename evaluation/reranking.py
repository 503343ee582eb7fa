"""Scoring candidates with the ranker, fusing both stages, and their ranks together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataloader.candidates import Candidates
from errors import InputError
from evaluation.sweep import sweep
from metrics import ranking_metrics, split_metric
from model.verbalizer import candidate_scores

FUSION_STEPS = 20  # weights tried between 0 and 1


def score_candidates(
    model: nn.Module, loader: DataLoader, letter_ids: Tensor, description: str
) -> tuple[np.ndarray, np.ndarray]:
    """Score the candidates of every user in the loader, one forward pass per batch.

    If a user has several prompts with the candidates in different orders, their scores are
    averaged, which reduces the effect of a preference for certain letters.

    Args:
        model: the ranker.
        loader: batches of ``EvaluationPrompts``.
        letter_ids: (C,) token ids of the letters, on the model's device.
        description: title of the progress bar.

    Returns:
        (n,) users in ascending order, and (n, C) float32 scores in the candidates' order.

    Raises:
        InputError: scores are infinite or NaN.
    """

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        by_letter = candidate_scores(model, batch, letter_ids)
        by_candidate = torch.empty_like(by_letter).scatter_(1, batch["orders"], by_letter)
        return {"users": batch["users"], "scores": by_candidate}

    rows = sweep(model, loader, step, description=description)
    if not rows:
        return np.empty(0, dtype=np.int64), np.empty((0, len(letter_ids)), dtype=np.float32)
    # Logits can be averaged without a softmax: log-probabilities differ by a constant per prompt.
    users, index, counts = torch.from_numpy(rows["users"]).unique(
        return_inverse=True, return_counts=True
    )
    sums = torch.zeros(len(users), len(letter_ids))
    sums.index_add_(0, index, torch.from_numpy(rows["scores"]))
    num_broken = int((~sums.isfinite()).any(1).sum())
    if num_broken:  # sorting would silently keep the retriever's order
        raise InputError(f"the ranker's scores of {num_broken:,} users are infinite or NaN")
    return users.numpy(), (sums / counts[:, None]).numpy()


def reranked(candidates: Candidates, users: np.ndarray, scores: np.ndarray) -> Candidates:
    """Sort candidates by the ranker's scores; equal scores keep the retriever's order.

    Args:
        candidates: candidates of all users, from the retriever.
        users: (n,) users whose target was retrieved.
        scores: (n, C) scores in the candidates' order.

    Returns:
        The candidates of those users; ``label_ranks`` are the targets' ranks among them.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    items = np.take_along_axis(candidates.items[users], order, axis=1)
    labels = candidates.labels[users]
    positions = (items == labels[:, None]).argmax(axis=1) if len(users) else np.empty(0)
    return Candidates(
        items,
        np.take_along_axis(scores, order, axis=1),
        labels,
        (positions + 1).astype(np.int32),
    )


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores.astype(np.float64)
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def fused_scores(
    candidates: Candidates, users: np.ndarray, scores: np.ndarray, weight: float
) -> np.ndarray:
    """Fuse both stages: the weighted mean of their log-probabilities over the candidates.

    Args:
        candidates: candidates of all users, from the retriever.
        users: (n,) users that the ranker scored.
        scores: (n, C) the ranker's scores in the candidates' order.
        weight: weight of the ranker, from 0 (the retriever's order) to 1 (the ranker's).

    Returns:
        (n, C) float64.
    """
    if weight == 1:  # the retriever's scores may be minus infinity, and 0 times that is NaN
        return _log_softmax(scores)
    return weight * _log_softmax(scores) + (1 - weight) * _log_softmax(candidates.scores[users])


def fusion_weight(
    candidates: Candidates, users: np.ndarray, scores: np.ndarray, metric: str
) -> float:
    """Choose the ranker's weight, of 0, 0.05, ..., 1, that is best on the validation split.

    Args:
        candidates: see ``fused_scores``.
        users: see ``fused_scores``.
        scores: see ``fused_scores``.
        metric: metric to maximize, e.g. ``NDCG@10``.

    Returns:
        The best weight, the smallest of equally good ones.
    """
    _, k = split_metric(metric)

    def quality(weight: float) -> float:
        fused = reranked(candidates, users, fused_scores(candidates, users, scores, weight))
        return ranking_metrics(fused.label_ranks, [k])[metric]

    return max((step / FUSION_STEPS for step in range(FUSION_STEPS + 1)), key=quality)


def two_stage_ranks(candidates: Candidates, users: np.ndarray, ranking: Candidates) -> np.ndarray:
    """Rank every user's target after both stages.

    Args:
        candidates: candidates of all users, from the retriever.
        users: (n,) users whose target was retrieved.
        ranking: their candidates in the final order.

    Returns:
        (num_users,) 1-based ranks; the retriever's rank for all other users.
    """
    ranks = candidates.label_ranks.copy()
    ranks[users] = ranking.label_ranks
    return ranks
