"""Loss, full-catalogue ranking and candidates of the retriever."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataloader.candidates import Candidates
from model.losses import linear_cross_entropy


def catalogue_loss(
    model: nn.Module,
    batch: dict[str, Any],
    cross_entropy: Callable[..., Tensor] = linear_cross_entropy,
) -> Tensor:
    """Mean loss of a training batch's labels.

    Args:
        model: a retriever.
        batch: a jagged training batch.
        cross_entropy: one of ``model.losses``.
    """
    output = partial(cross_entropy, labels=batch["labels"])
    return model(batch["item_ids"], batch["positions"], batch["longest"], batch.get("keep"), output)


def answer_ranks(scores: Tensor, answers: Tensor) -> Tensor:
    """(B,) 1-based rank of each row's answer: one more than the number of items scored higher.

    Scores that are no numbers count as higher, so that a broken model never looks perfect.
    """
    return 1 + (~(scores <= scores.gather(1, answers[:, None]))).sum(1)


def score_histories(model: nn.Module, batch: dict[str, Any], mask_history: bool) -> Tensor:
    """(B, V + 1) scores of all items after each history of an evaluation batch.

    What cannot be recommended has minus infinity: column 0 and, if asked, the user's own items.
    """
    scores = model(batch["item_ids"], batch["positions"], batch["longest"], batch["keep"])
    scores[:, 0] = -torch.inf
    if mask_history:
        scores[batch["history_rows"], batch["history_items"]] = -torch.inf
    return scores


@torch.inference_mode()
def retrieve(
    model: nn.Module,
    loader: DataLoader,
    *,
    mask_history: bool,
    num_candidates: int,
    description: str,
) -> Candidates:
    """Rank the whole catalogue for every user.

    Args:
        model: the retriever, in eval mode.
        loader: evaluation batches, on the model's device.
        mask_history: whether a user's own items cannot be recommended.
        num_candidates: best items kept for each user.
        description: title of the progress bar.
    """
    parts = []
    for batch in tqdm(loader, desc=description, unit="batch", leave=False):
        scores = score_histories(model, batch, mask_history)
        # Without the start token: where too few items are left, those had before fill up.
        best = torch.topk(scores[:, 1:], num_candidates)
        ranks = answer_ranks(scores, batch["answers"])
        parts.append([x.cpu() for x in (best.indices + 1, best.values, batch["answers"], ranks)])
    items, top_scores, answers, ranks = (torch.cat(x).numpy() for x in zip(*parts))
    return Candidates(
        items.astype(np.int32),
        top_scores.astype(np.float32),
        answers.astype(np.int32),
        ranks.astype(np.int32),
    )


@torch.inference_mode()
def hard_negatives(model: nn.Module, loader: DataLoader, size: int) -> np.ndarray:
    """(n, size) int32 what the retriever ranks highest for each training prefix but the answer
    and what the user has had; 0 where no item is left.

    Args:
        model: the retriever, in eval mode.
        loader: batches of ``dataloader.retriever.Prefixes``.
        size: items for each prefix.
    """
    device = next(model.parameters()).device
    parts = []
    for batch in tqdm(loader, desc="hard negatives", unit="batch", dynamic_ncols=True):
        batch = send_to_device(batch, device)
        scores = score_histories(model, batch, mask_history=True)
        scores.scatter_(1, batch["answers"][:, None], -torch.inf)
        best = torch.topk(scores, min(size, scores.shape[1]))
        items = torch.where(best.values > -torch.inf, best.indices, 0).int().cpu()
        parts.append(nn.functional.pad(items, (0, size - items.shape[1])))
    return torch.cat(parts).numpy()
