"""Candidates from an approximate index, for catalogues that are slow to score in full.

A score is the inner product of an encoding and an item's embedding, plus a bias: the inner product
of (encoding, 1) and (embedding, bias). The index, an inverted file of faiss, clusters the items and
scores only the clusters whose centers have the largest inner products with the encoding. The items
it finds have their exact scores; items in other clusters are missed.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataloader.candidates import Candidates
from evaluation.retrieval import score_catalogue
from evaluation.sweep import sweep
from model.base import Retriever

LISTS_PER_ROOT = 4  # clusters per square root of the number of items, as faiss advises
SEARCHED_SHARE = 8  # one in this many clusters is searched
MAX_TRAINING_POINTS = 64  # per cluster; more hardly move the centers


class ItemIndex:
    """An index of a retriever's items.

    Args:
        model: the retriever.
    """

    def __init__(self, model: Retriever) -> None:
        with torch.no_grad():
            vectors = model.item_embeddings[1:].float().cpu()
            bias = model.item_bias
            column = torch.zeros(len(vectors)) if bias is None else bias[1:].float().cpu()
            points = torch.cat([vectors, column[:, None]], dim=1).numpy()
        num_lists = max(round(LISTS_PER_ROOT * len(points) ** 0.5), 1)
        num_lists = min(num_lists, len(points))
        quantizer = faiss.IndexFlatIP(points.shape[1])
        metric = faiss.METRIC_INNER_PRODUCT
        self.index = faiss.IndexIVFFlat(quantizer, points.shape[1], num_lists, metric)
        self.index.cp.max_points_per_centroid = MAX_TRAINING_POINTS
        self.index.cp.min_points_per_centroid = 1  # no warning about a small catalogue
        self.index.train(points)
        self.index.add(points)
        self.index.nprobe = max(num_lists // SEARCHED_SHARE, 1)

    def search(
        self, encodings: np.ndarray, rows: np.ndarray, items: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Find the best items of each encoding.

        Args:
            encodings: (B, D) float32.
            rows: (n,) row of each excluded item.
            items: (n,) the excluded items.
            k: number of items per encoding.

        Returns:
            (B, k) int64 items, best first, and their scores; None if some row has fewer.
        """
        most = int(np.bincount(rows, minlength=1).max(initial=0))
        queries = np.pad(encodings, ((0, 0), (0, 1)), constant_values=1)
        scores, found = self.index.search(queries, min(k + most, self.index.ntotal))
        found += 1  # 0 where nothing was found
        keys = np.arange(len(found))[:, None] * (self.index.ntotal + 1) + found
        is_excluded = np.isin(keys, rows * (self.index.ntotal + 1) + items) | (found == 0)
        if ((~is_excluded).sum(axis=1) < k).any():
            return None
        order = np.argsort(is_excluded, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)


def retrieve_approximately(
    model: Retriever,
    index: ItemIndex,
    loader: DataLoader,
    *,
    mask_history: bool,
    num_candidates: int,
    description: str,
) -> Candidates:
    """Find candidates as ``evaluation.retrieval.retrieve`` does, but without the targets' ranks.

    A batch for which the index finds too few items is scored in full.

    Args:
        model: the retriever.
        index: its index.
        loader: see ``retrieve``.
        mask_history: see ``retrieve``.
        num_candidates: see ``retrieve``.
        description: see ``retrieve``.

    Returns:
        The candidates; ``label_ranks`` are 0.
    """

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        size = len(batch["history_rows"]) if mask_history else 0
        rows, items = (batch[f"history_{name}"][:size].cpu().numpy() for name in ("rows", "items"))
        encodings = model.encode(batch["sequences"]).float().cpu().numpy()
        found = index.search(encodings, rows, items, num_candidates)
        if found is None:
            best = torch.topk(score_catalogue(model, batch, mask_history)[:, 1:], num_candidates)
            items_and_scores = best.indices + 1, best.values
        else:
            items_and_scores = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        labels = batch["targets"].int()
        return {
            "items": items_and_scores[0].int(),
            "scores": items_and_scores[1],
            "labels": labels,
            "label_ranks": torch.zeros_like(labels),
        }

    return Candidates(**sweep(model, loader, step, description=description))
