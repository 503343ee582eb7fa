"""Scoring candidates with the ranker, and the ranks of both stages together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataloader.candidates import Candidates
from errors import InputError
from evaluation.fusion import log_softmax
from evaluation.sweep import sweep
from model.title_likelihood import title_scores
from model.verbalizer import candidate_scores

MIN_LOG_PROBABILITY = -50.0


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
    _check_finite(sums)
    return users.numpy(), (sums / counts[:, None]).numpy()


def _check_finite(scores: Tensor) -> None:
    """Refuse scores that sorting would silently turn into the retriever's order.

    Raises:
        InputError: scores are infinite or NaN.
    """
    num_broken = int((~scores.isfinite()).any(1).sum())
    if num_broken:
        raise InputError(f"the ranker's scores of {num_broken:,} users are infinite or NaN")


def score_titles(
    model: nn.Module,
    loader: DataLoader,
    score: Callable[[nn.Module, dict[str, Any]], Tensor],
    description: str,
) -> np.ndarray:
    """Score the candidates of every user in the loader by their titles.

    Args:
        model: the ranker.
        loader: batches of ``CandidateTitles``.
        score: computes scores (B, C) from model and batch.
        description: title of the progress bar.

    Returns:
        (n, C) float32 scores in the candidates' order, by ascending user.

    Raises:
        InputError: scores are infinite or NaN.
    """

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"users": batch["users"], "scores": score(model, batch)}

    rows = sweep(model, loader, step, description=description)
    _check_finite(torch.from_numpy(rows["scores"]))
    return rows["scores"][np.argsort(rows["users"])]


def score_catalogue_titles(model: nn.Module, loader: DataLoader, num_items: int) -> np.ndarray:
    """Score the titles of all items without a history.

    Args:
        model: the ranker.
        loader: batches of ``CatalogueTitles``.
        num_items: V.

    Returns:
        (V + 1,) float32 log-likelihoods, 0 for item 0.
    """

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"items": batch["items"], "scores": title_scores(model, batch)}

    rows = sweep(model, loader, step, description="titles without a history")
    scores = np.zeros(num_items + 1, dtype=np.float32)
    scores[rows["items"].ravel()] = rows["scores"].ravel()
    return scores


def retriever_log_probabilities(candidates: Candidates, users: np.ndarray) -> np.ndarray:
    """(n, C) log-softmax of the retriever's scores over the candidates of ``users`` (n,)."""
    # Items of the history that fill up short lists have a score of minus infinity.
    return np.maximum(log_softmax(candidates.scores[users]), MIN_LOG_PROBABILITY)


def targets_among(items: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) index of each label (n,) among its candidates (n, C), which must include it."""
    return (items == labels[:, None]).argmax(axis=1)


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
    return Candidates(
        items,
        np.take_along_axis(scores, order, axis=1),
        labels,
        (targets_among(items, labels) + 1).astype(np.int32),
    )


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
