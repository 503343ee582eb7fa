"""Ranking the whole catalogue with a retriever: metrics, candidates, hard negatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataloader.candidates import Candidates
from evaluation.sweep import sweep
from model.base import Retriever


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Rank each row's target: one more than the number of items with a higher score.

    NaN counts as higher, so that a model that diverged never looks perfect.

    Args:
        scores: (B, V + 1).
        targets: (B,) item ids.

    Returns:
        (B,) 1-based ranks.
    """
    own_scores = scores.gather(1, targets[:, None])
    if scores.is_cuda:
        return 1 + (~(scores <= own_scores)).sum(1)
    # On the CPU, a sum over one dimension first converts all elements to int64.
    ranks = torch.empty_like(targets)
    for index, (row, own) in enumerate(zip(scores, own_scores)):
        ranks[index] = len(row) + 1 - (row <= own).count_nonzero()
    return ranks


def score_catalogue(model: nn.Module, batch: dict[str, Any], mask_history: bool) -> Tensor:
    """Score all items after each history of an evaluation batch.

    Args:
        model: a retriever in eval mode.
        batch: see ``dataloader.sequences``.
        mask_history: whether to exclude the items of each history.

    Returns:
        (B, V + 1) scores, minus infinity for column 0 and excluded items.
    """
    scores = model(batch["sequences"])
    scores[:, 0] = -torch.inf
    if mask_history:
        scores[batch["history_rows"], batch["history_items"]] = -torch.inf
    return scores


def retrieve(
    model: Retriever,
    loader: DataLoader,
    *,
    mask_history: bool,
    num_candidates: int,
    description: str,
) -> Candidates:
    """Rank the whole catalogue for every user.

    Args:
        model: the retriever.
        loader: batches of ``Histories``.
        mask_history: whether to exclude the items of each history.
        num_candidates: k, best items kept per user.
        description: title of the progress bar.

    Returns:
        The k best items of each user with their scores, the targets and their ranks.
    """

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        scores = score_catalogue(model, batch, mask_history)
        # Column 0 is not an item. If fewer than k items are left, items of the history follow.
        best = torch.topk(scores[:, 1:], num_candidates)
        return {
            "items": best.indices.int() + 1,
            "scores": best.values,
            "labels": batch["targets"].int(),
            "label_ranks": target_ranks(scores, batch["targets"]).int(),
        }

    return Candidates(**sweep(model, loader, step, description=description))


def hard_negatives(model: Retriever, loader: DataLoader, size: int) -> np.ndarray:
    """Find the items that a retriever ranks highest after each training prefix.

    Args:
        model: the retriever.
        loader: batches of ``Prefixes``.
        size: items per prefix.

    Returns:
        (n, size) int32 items, best first, without the target and the items of the prefix; 0 where
        no item is left.
    """

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        scores = score_catalogue(model, batch, mask_history=True)
        scores.scatter_(1, batch["targets"][:, None], -torch.inf)
        best = torch.topk(scores, min(size, scores.shape[1]))
        items = torch.where(best.values > -torch.inf, best.indices, 0).int()
        return {"items": nn.functional.pad(items, (0, size - items.shape[1]))}

    return sweep(model, loader, step, description="hard negatives")["items"]


def rank_interactions(
    model: Retriever, loader: DataLoader, users: np.ndarray, items: np.ndarray, description: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rank given items, and each user's target, in the catalogue without the user's history.

    Args:
        model: the retriever.
        loader: batches of ``Histories``, which hold every user once, in order.
        users: (n,) user of each item, ascending from 0.
        items: (n,) item ids.
        description: title of the progress bar.

    Returns:
        (n,) 1-based ranks of the items, and (num_users,) of the targets.
    """

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        scores, targets = score_catalogue(model, batch, mask_history=True), batch["targets"]
        first_user = batch["examples"][0].item()
        bounds = np.searchsorted(users, first_user + np.arange(len(scores) + 1))
        ranks = [
            target_ranks(
                row.expand(last - first, -1), torch.from_numpy(items[first:last]).to(targets)
            )
            for row, first, last in zip(scores, bounds, bounds[1:])
        ]
        return {"ranks": torch.cat(ranks), "target_ranks": target_ranks(scores, targets)}

    ranks = sweep(model, loader, step, description=description)
    return ranks["ranks"], ranks["target_ranks"]
