"""Plain reference implementation of the retrievers on left-padded batches of ``max_len``.

As in LRURec's published code, sequences are padded one by one as Python lists, every position
passes every layer and the output layer, and evaluation scores all positions, takes the last one,
masks the history position by position and sorts the catalogue. Only NARM's evaluation attends from
the last position alone and scores that one. The functions take our own models and use their
weights, so that nothing but the computation differs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from datasets import SequenceDataset
from model.base import Retriever
from model.narm import NARM
from model.padded import encode_all, encode_last

MASKED_SCORE = -1e9
NUM_CANDIDATES = 20


# Batches ------------------------------------------------------------------------------------------


def histories(data: SequenceDataset, split: str) -> list[list[int]]:
    """Return every user's items before the held-out one."""
    ends = data.history_ends(split)
    return [data.item_ids[a:b].tolist() for a, b in zip(data.offsets[:-1], ends)]


def pad_sequences(sequences: list[list[int]], max_len: int) -> Tensor:
    """Pad the last ``max_len`` items of sequences with 0 on the left.

    Returns:
        (B, max_len) int64.
    """
    rows = []
    for sequence in sequences:
        cut = sequence[-max_len:]
        rows.append([0] * (max_len - len(cut)) + cut)
    return torch.LongTensor(rows)


def training_batch(windows: list[list[int]], max_len: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and the next items, (B, max_len) each, of windows."""
    inputs = pad_sequences([window[:-1] for window in windows], max_len)
    return inputs, pad_sequences(windows, max_len)


# Models -------------------------------------------------------------------------------------------


def scores(model: Retriever, item_ids: Tensor) -> Tensor:
    """Score all items after every position of left-padded sequences.

    Args:
        model: one of our retrievers.
        item_ids: (B, L).

    Returns:
        (B, L, V + 1).
    """
    return linear(encode_all(model, item_ids), model.item_embeddings, model.item_bias)


# Training and evaluation --------------------------------------------------------------------------


def next_item_loss(model: Retriever, windows: list[list[int]], max_len: int) -> Tensor:
    """Compute the mean cross-entropy of the next items."""
    inputs, labels = training_batch(windows, max_len)
    return cross_entropy(scores(model, inputs).flatten(0, 1), labels.flatten(), ignore_index=0)


def masked_loss(
    model: Retriever, windows: list[list[int]], max_len: int, mask_prob: float
) -> Tensor:
    """Compute the mean cross-entropy of masked items; all positions are scored."""
    items = pad_sequences(windows, max_len)
    masked = (torch.rand(items.shape) < mask_prob) & (items > 0)
    inputs = torch.where(masked, model.spec.num_items + 1, items)
    labels = torch.where(masked, items, 0)
    return cross_entropy(scores(model, inputs).flatten(0, 1), labels.flatten(), ignore_index=0)


@torch.no_grad()
def evaluate(
    model: Retriever, sequences: list[list[int]], targets: list[int], max_len: int
) -> tuple[Tensor, Tensor]:
    """Rank the catalogue after each history, without the items that the model reads of it.

    Args:
        model: one of our retrievers in eval mode.
        sequences: B histories.
        targets: B held-out items.
        max_len: items that the model reads.

    Returns:
        (B,) 1-based ranks of the targets, and (B, 20) the best items.
    """
    if isinstance(model, NARM):
        rows = pad_sequences(sequences, max_len)
        table = encode_last(model, rows) @ model.item_embeddings.T  # (B, V + 1)
    else:
        suffix = [] if model.spec.mask_token is None else [model.spec.mask_token]
        rows = pad_sequences([items + suffix for items in sequences], max_len)
        table = scores(model, rows)[:, -1]
    for position in range(max_len):
        items = rows[:, position]
        items = torch.where(items > model.spec.num_items, 0, items)
        table[torch.arange(len(table)), items] = MASKED_SCORE
    table[:, 0] = MASKED_SCORE
    order = (-table).argsort(dim=1)
    ranks = (order == torch.tensor(targets)[:, None]).int().argmax(1) + 1
    return ranks, order[:, :NUM_CANDIDATES]
