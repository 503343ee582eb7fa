"""Plain reference implementation of the retrievers on left-padded batches of ``max_len``.

As in LRURec's published code, sequences are padded one by one as Python lists, every position
passes every layer and the output layer, and evaluation scores all positions, takes the last one,
masks the history position by position and sorts the catalogue. Only NARM's evaluation attends from
the last position alone and scores that one. The functions take our own models and use their
weights, so that nothing but the computation differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, pad, scaled_dot_product_attention

from datasets import SequenceDataset
from model.base import Retriever
from model.lru import LRURec
from model.narm import NARM
from model.transformer import BERT4Rec, SASRec, TransformerRec

MASKED_SCORE = -1e9
NUM_CANDIDATES = 20


# Batches ------------------------------------------------------------------------------------------


def histories(data: SequenceDataset, split: str) -> list[list[int]]:
    """Return every user's items before the held-out one."""
    ends = data.history_ends(split)
    return [data.item_ids[a:b].tolist() for a, b in zip(data.offsets[:-1], ends)]


def pad_sequences(sequences: list[list[int]], max_len: int, *, left: bool = True) -> Tensor:
    """Pad the last ``max_len`` items of sequences with 0, on the left or on the right.

    Returns:
        (B, max_len) int64.
    """
    rows = []
    for sequence in sequences:
        cut = sequence[-max_len:]
        padding = [0] * (max_len - len(cut))
        rows.append(padding + cut if left else cut + padding)
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
    encoders: dict[type[Retriever], Callable[[Any, Tensor], Tensor]] = {
        LRURec: _lru,
        SASRec: _transformer,
        BERT4Rec: _transformer,
        NARM: _narm,
    }
    encode = encoders[type(model)]
    return linear(encode(model, item_ids), model.item_embeddings, model.item_bias)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    y = layer.dropout(layer.activation(layer.inner(x)))
    output: Tensor = layer.layer_norm(x + layer.dropout(layer.outer(y)))
    return output


def _lru(model: LRURec, item_ids: Tensor) -> Tensor:
    length = item_ids.shape[1]
    rounds = math.ceil(math.log2(length))
    extra = 2**rounds - length  # the scan needs a power of two
    real = pad(item_ids > 0, (extra, 0))
    x = model.layer_norm(model.dropout(model.embedding(item_ids)))
    x = pad(x, (0, 0, extra, 0))
    block: Any
    for block in model.blocks:
        layer = block.lru
        u = torch.view_as_complex(layer.in_proj(x).unflatten(-1, (-1, 2)))
        h = _parallel_scan(u * torch.exp(layer.gamma_log), layer.eigenvalues(), real, rounds)
        y = layer.out_proj(torch.view_as_real(h).flatten(-2))
        x = _feed_forward(block.feed_forward, layer.layer_norm(x + layer.dropout(y)))
    return x[:, -length:]


def _parallel_scan(u: Tensor, eigenvalues: Tensor, real: Tensor, rounds: int) -> Tensor:
    """Compute the states (B, L, H) of the recurrence for inputs (B, L, H), L = 2 ** rounds.

    Each round joins pairs of neighboring runs into one of twice the length: the last state of the
    first run, times powers of the eigenvalues, is added to the second run, unless it is padding.
    """
    h, powers = u, eigenvalues[None]
    for k in range(1, rounds + 1):
        half = 2 ** (k - 1)
        h = h.reshape(-1, 2 * half, u.shape[-1])
        is_real = real.reshape(-1, 2 * half)[:, half - 1, None, None]
        first, second = h[:, :half], h[:, half:]
        second = second + powers * first[:, -1:] * is_real
        h = torch.cat([first, second], dim=1)
        powers = torch.cat([powers, powers * powers[-1]])
    return h.reshape(u.shape)


def _transformer(model: TransformerRec, item_ids: Tensor) -> Tensor:
    real, length = item_ids > 0, item_ids.shape[1]
    x = model.embedding(item_ids) + model.position_embedding.weight[:length]
    x = model.dropout(model.layer_norm(x))
    allowed = real[:, None, :] | torch.eye(length, dtype=torch.bool)
    if model.causal:
        allowed = allowed & torch.ones(length, length).tril().bool()
    block: Any
    for block in model.blocks:
        layer = block.attention
        query, key, value = (
            y.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
            for y in layer.in_proj(x).chunk(3, dim=-1)
        )
        dropout = layer.attn_dropout.p if model.training else 0.0
        y = scaled_dot_product_attention(query, key, value, allowed[:, None], dropout)
        y = y.transpose(1, 2).flatten(-2)
        x = layer.layer_norm(x + layer.dropout(layer.out_proj(y)))
        x = _feed_forward(block.feed_forward, x)
    return x


def _narm(model: NARM, item_ids: Tensor) -> Tensor:
    real, length = item_ids > 0, item_ids.shape[1]
    h = _gru_states(model, model.dropout(model.embedding(item_ids)))
    gates = torch.sigmoid(model.query(h)[:, :, None] + model.key(h)[:, None])  # (B, L, L, D)
    visible = torch.ones(length, length).tril() * real[:, None]
    local = (model.energy(gates).squeeze(-1) * visible) @ h
    encodings: Tensor = model.bilinear(model.encoding_dropout(torch.cat([h, local], dim=-1)))
    return encodings


def _narm_last(model: NARM, item_ids: Tensor) -> Tensor:
    """(B, D) encodings of whole histories, (B, L) padded on the right."""
    real = item_ids > 0
    h = _gru_states(model, model.embedding(item_ids))
    last = h[torch.arange(len(h)), real.sum(1) - 1]
    gates = torch.sigmoid(model.query(last)[:, None] + model.key(h))  # (B, L, D)
    local = ((model.energy(gates).squeeze(-1) * real)[:, :, None] * h).sum(1)
    encodings: Tensor = model.bilinear(torch.cat([last, local], dim=-1))
    return encodings


def _gru_states(model: NARM, x: Tensor) -> Tensor:
    """(B, L, D) states for embeddings (B, L, D)."""
    states: Tensor = model.gru(x.transpose(0, 1))[0]
    return states.transpose(0, 1)


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
        rows = pad_sequences(sequences, max_len, left=False)
        table = _narm_last(model, rows) @ model.item_embeddings.T  # (B, V + 1)
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
