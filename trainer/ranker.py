"""Scoring with the ranker, and the ranks of the two stages together."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import UserError
from dataloader.candidates import Candidates
from metrics import ranking_metrics
from model.verbalizer import candidate_scores


@torch.inference_mode()
def score_users(
    model: nn.Module,
    loader: DataLoader,
    label_ids: torch.Tensor,
    description: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Score the candidates of every user in the loader, one forward pass a batch.

    The scores of a user's prompts with other orders of the candidates are averaged, against
    preferences for letters.

    Args:
        model: the ranker, in eval mode.
        loader: evaluation prompts, on the model's device.
        label_ids: (C,) token ids of the labels.
        description: title of the progress bar.

    Returns:
        Users (n,) in ascending order, and their scores (n, C) float32 in the candidates' order.
    """
    users, scores = [], []
    for batch in tqdm(loader, desc=description, unit="batch", leave=False):
        by_label = candidate_scores(model, batch, label_ids)
        users.append(batch["users"].cpu())
        scores.append(torch.empty_like(by_label).scatter_(1, batch["orders"], by_label).cpu())
    if not users:
        return np.empty(0, dtype=np.int64), np.empty((0, len(label_ids)), dtype=np.float32)
    # Logits may be averaged as they are: log-probabilities differ by one number a prompt.
    found, places, counts = torch.cat(users).unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(found), len(label_ids)).index_add_(0, places, torch.cat(scores))
    broken = int((~sums.isfinite()).any(1).sum())
    if broken:  # sorting would pass them off as the retriever's order
        raise UserError(
            f"{broken:,} users have scores that are no numbers: start anew with --overwrite true "
            "and a lower --lora_lr"
        )
    return found.numpy(), (sums / counts[:, None]).numpy()


def reranked(candidates: Candidates, users: np.ndarray, scores: np.ndarray) -> Candidates:
    """The given users' candidates in the ranker's order; equal scores keep the retriever's.

    Args:
        candidates: of all users, from the retriever.
        users: (n,) users whose answer was retrieved.
        scores: (n, C) the ranker's scores in the candidates' order.

    Returns:
        The candidates of those users; ``label_ranks`` are the answers' places among them.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    items = np.take_along_axis(candidates.items[users], order, axis=1)
    labels = candidates.labels[users]
    places = (items == labels[:, None]).argmax(axis=1) if len(users) else np.empty(0)
    return Candidates(
        items,
        np.take_along_axis(scores, order, axis=1),
        labels,
        (places + 1).astype(np.int32),
    )


def fused_scores(
    candidates: Candidates, users: np.ndarray, scores: np.ndarray, weight: float
) -> np.ndarray:
    """Weighted geometric mean of both stages' distributions over the candidates, as logarithms.

    Args:
        candidates: of all users, from the retriever.
        users: (n,) users that the ranker scored.
        scores: (n, C) the ranker's scores in the candidates' order.
        weight: of the ranker, from 0 (the retriever's order) to 1 (the ranker's).

    Returns:
        (n, C) float64.
    """

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    if weight == 1:  # a retriever's score of minus infinity times 0 would be no number
        return log_softmax(scores)
    return weight * log_softmax(scores) + (1 - weight) * log_softmax(candidates.scores[users])


def fusion_weight(
    candidates: Candidates, users: np.ndarray, scores: np.ndarray, metric: str
) -> float:
    """The ranker's weight, of 0, 0.05, ..., 1, that is best on the validation split.

    Of equally good weights the smallest is taken. Arguments as of ``fused_scores``; ``metric`` is
    the one to maximise, such as ``NDCG@10``.
    """
    k = int(metric.split("@")[1])

    def quality(weight: float) -> float:
        fused = reranked(candidates, users, fused_scores(candidates, users, scores, weight))
        return ranking_metrics(fused.label_ranks, [k])[metric]

    return max((step / 20 for step in range(21)), key=quality)


def two_stage_ranks(candidates: Candidates, users: np.ndarray, ranking: Candidates) -> np.ndarray:
    """(num_users,) rank of every user's answer after both stages.

    A user whose answer was not retrieved keeps the retriever's rank.
    """
    ranks = candidates.label_ranks.copy()
    ranks[users] = ranking.label_ranks
    return ranks
