"""The plain way that the retriever is measured against: left-padded batches of ``max_len``.

Sequences are padded one by one with Python lists, every position passes every layer and the output
layer; evaluation scores all positions, takes the last, masks the history position by position and
sorts the catalogue, as LRURec's published code does. NARM's evaluation attends from the last
position alone and scores no other. The functions use the weights of our own models, so that nothing
but the computation differs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention

from datasets import SequenceDataset
from model.lru import LRURec
from model.narm import NARM
from model.transformer import TransformerRec


def padded_rows(sequences: list[list[int]], max_len: int, *, left: bool = True) -> Tensor:
    """(B, max_len) item ids, padded with 0 on the left or on the right."""
    rows = []
    for sequence in sequences:
        cut = sequence[-max_len:]
        padding = [0] * (max_len - len(cut))
        rows.append(padding + cut if left else cut + padding)
    return torch.LongTensor(rows)


def training_batch(windows: list[list[int]], max_len: int) -> tuple[Tensor, Tensor]:
    """Inputs and next items (B, max_len) of windows."""
    inputs = padded_rows([window[:-1] for window in windows], max_len)
    return inputs, padded_rows(windows, max_len)


def _feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer.dropout(layer.activation(layer.inner(x)))
    return layer.layer_norm(x + layer.dropout(layer.outer(y)))


def _lru(model: LRURec, item_ids: Tensor) -> Tensor:
    length = item_ids.shape[1]
    rounds = math.ceil(math.log2(length))
    extra = 2**rounds - length
    real = pad(item_ids > 0, (extra, 0))
    x = model.layer_norm(model.dropout(model.embedding(item_ids)))
    x = pad(x, (0, 0, extra, 0))
    for block in model.blocks:
        layer = block.lru
        h = torch.view_as_complex(layer.in_proj(x).unflatten(-1, (-1, 2)))
        h = h * torch.exp(layer.gamma_log)
        eigenvalues = layer.eigenvalues()
        powers = eigenvalues[None]
        shape = h.shape
        for k in range(1, rounds + 1):  # join pairs of runs of 2**(k - 1) steps
            half = 2 ** (k - 1)
            h = h.reshape(-1, 2 * half, shape[-1])
            passes = real.reshape(-1, 2 * half)[:, half - 1, None, None]
            first, second = h[:, :half], h[:, half:]
            second = second + powers * first[:, -1:] * passes
            h = torch.cat([first, second], dim=1)
            powers = torch.cat([powers, powers * powers[-1]])
        h = torch.view_as_real(h.reshape(shape)).flatten(-2)
        x = layer.layer_norm(x + layer.dropout(layer.out_proj(h)))
        x = _feed_forward(block.feed_forward, x)
    return x[:, -length:]


def _transformer(model: TransformerRec, item_ids: Tensor) -> Tensor:
    real, length = item_ids > 0, item_ids.shape[1]
    x = model.embedding(item_ids) + model.position_embedding.weight[:length]
    x = model.dropout(model.layer_norm(x))
    allowed = real[:, None, :] | torch.eye(length, dtype=torch.bool)
    if model.causal:
        allowed = allowed & torch.ones(length, length).tril().bool()
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
    real = item_ids > 0
    h, _ = model.gru(model.dropout(model.embedding(item_ids)).transpose(0, 1))
    h = h.transpose(0, 1)  # (B, L, D)
    energy = torch.sigmoid(model.query(h)[:, :, None] + model.key(h)[:, None])  # (B, L, L, D)
    seen = torch.ones(item_ids.shape[1], item_ids.shape[1]).tril() * real[:, None]
    local = (model.energy(energy).squeeze(-1) * seen) @ h
    return model.bilinear(model.encoding_dropout(torch.cat([h, local], dim=-1)))


def _last_narm(model: NARM, item_ids: Tensor) -> Tensor:
    """(B, D) encodings of whole histories, (B, L) padded on the right."""
    real = item_ids > 0
    h, _ = model.gru(model.embedding(item_ids).transpose(0, 1))
    h = h.transpose(0, 1)  # (B, L, D)
    last = h[torch.arange(len(h)), real.sum(1) - 1]
    energy = torch.sigmoid(model.query(last)[:, None] + model.key(h))  # (B, L, D)
    local = ((model.energy(energy).squeeze(-1) * real)[:, :, None] * h).sum(1)
    return model.bilinear(torch.cat([last, local], dim=-1))


def scores(model: nn.Module, item_ids: Tensor) -> Tensor:
    """(B, L, V + 1) scores of all items at every position."""
    forward = {LRURec: _lru, TransformerRec: _transformer, NARM: _narm}[type(model)]
    weight = model.embedding.weight[: model.num_items + 1]
    bias = getattr(model, "output_bias", None)
    return nn.functional.linear(forward(model, item_ids), weight, bias)


def next_item_loss(model: nn.Module, windows: list[list[int]], max_len: int) -> Tensor:
    """Cross-entropy of the next items."""
    inputs, labels = training_batch(windows, max_len)
    return cross_entropy(scores(model, inputs).flatten(0, 1), labels.flatten(), ignore_index=0)


def masked_loss(
    model: nn.Module, windows: list[list[int]], max_len: int, mask_prob: float
) -> Tensor:
    """Cross-entropy of masked items; all positions are scored and most ignored."""
    labels = padded_rows(windows, max_len)
    masked = (torch.rand(labels.shape) < mask_prob) & (labels > 0)
    inputs = torch.where(masked, model.num_items + 1, labels)
    labels = torch.where(masked, labels, 0)
    return cross_entropy(scores(model, inputs).flatten(0, 1), labels.flatten(), ignore_index=0)


@torch.no_grad()
def evaluate(
    model: nn.Module, histories: list[list[int]], answers: list[int], max_len: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Ranks (B,) of the answers and the 20 best items (B, 20)."""
    mask = [] if causal else [model.num_items + 1]
    last_only = isinstance(model, NARM)
    rows = padded_rows([history + mask for history in histories], max_len, left=not last_only)
    if last_only:
        table = _last_narm(model, rows) @ model.embedding.weight.T
    else:
        table = scores(model, rows)[:, -1]
    for place in range(max_len):
        seen = rows[:, place]
        seen = torch.where(seen > model.num_items, 0, seen)
        table[torch.arange(len(table)), seen] = -1e9
    table[:, 0] = -1e9
    order = (-table).argsort(dim=1)
    ranks = (order == torch.tensor(answers)[:, None]).int().argmax(1) + 1
    return ranks, order[:, :20]


def sequences(data: SequenceDataset, split: str) -> list[list[int]]:
    """Every user's items before the held-out one, as lists."""
    ends = data.history_ends(split)
    return [data.item_ids[a:b].tolist() for a, b in zip(data.offsets[:-1], ends)]
