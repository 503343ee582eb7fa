"""The retrievers on left-padded batches, written out as their papers and published code have them.

The models compute on jagged batches with other algorithms. Their tests compare both with the same
weights, in eval mode or without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dataloader.sequences import TrainingWindows
from datasets import SequenceDataset


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.layer_norm(x + layer.outer(layer.activation(layer.inner(x))))


def padded_lru(model: Any, item_ids: Tensor) -> Tensor:
    """LRURec on left-padded sequences (B, L), one time step after the other."""
    x = model.layer_norm(model.embedding(item_ids))
    is_item = item_ids > 0
    for block in model.blocks:
        layer = block.lru
        u = torch.view_as_complex(layer.in_proj(x).unflatten(-1, (-1, 2)))
        u = u * torch.exp(layer.gamma_log)
        eigenvalues = torch.exp(torch.complex(-torch.exp(layer.nu_log), torch.exp(layer.theta_log)))
        states = [u[:, 0]]
        for t in range(1, item_ids.shape[1]):
            before = torch.where(is_item[:, t - 1, None], states[-1], 0)  # not from padding
            states.append(u[:, t] + eigenvalues * before)
        h = torch.view_as_real(torch.stack(states, dim=1)).flatten(-2)
        x = layer.layer_norm(x + layer.out_proj(h))
        x = feed_forward(block.feed_forward, x)
    return x @ model.embedding.weight.T + model.output_bias


def padded_transformer(model: Any, item_ids: Tensor) -> Tensor:
    """SASRec or BERT4Rec on left-padded sequences (B, L), attention written out."""
    is_item = item_ids > 0
    length = item_ids.shape[1]
    last = model.position_embedding.num_embeddings
    position = torch.where(is_item, torch.arange(last - length, last), 0)  # 0 for padding
    x = model.layer_norm(model.embedding(item_ids) + model.position_embedding(position))
    allowed = is_item[:, None, :].expand(-1, length, -1)
    if model.causal:
        allowed = allowed & torch.ones(length, length).tril().bool()
    allowed = allowed & is_item[:, :, None] | torch.eye(length).bool()
    for block in model.blocks:
        layer = block.attention
        heads = layer.num_heads
        q, k, v = (
            y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in layer.in_proj(x).chunk(3, dim=-1)
        )
        energy = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = energy.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(-2)
        x = layer.layer_norm(x + layer.out_proj(y))
        x = feed_forward(block.feed_forward, x)
    return x @ model.embedding.weight[: model.spec.num_items + 1].T + model.output_bias


def padded_narm(model: Any, item_ids: Tensor) -> Tensor:
    """NARM on left-padded sequences (B, L), each sequence and each padding on its own."""
    rows = []
    for ids in item_ids:
        scores = []
        for sequence in (*ids[ids == 0][:, None], ids[ids > 0]):
            if len(sequence) == 0:
                continue
            h = model.gru(model.embedding(sequence)[:, None])[0][:, 0]
            for t in range(len(h)):
                seen = h[: t + 1]
                energy = model.energy(torch.sigmoid(model.query(h[t]) + model.key(seen)))
                encoding = torch.cat([h[t], (energy * seen).sum(0)])
                scores.append(model.embedding.weight @ model.bilinear(encoding))
        rows.append(torch.stack(scores))
    return torch.stack(rows)


PADDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "lru": padded_lru, "sas": padded_transformer, "bert": padded_transformer, "narm": padded_narm,
}  # fmt: skip


def padded_batch(
    data: SequenceDataset, windows: TrainingWindows, max_len: int
) -> tuple[Tensor, Tensor]:
    """Inputs and labels (B, max_len), padded as in the published code."""
    inputs, labels = [], []
    for start, end in zip(windows.starts, windows.ends):
        window = data.item_ids[start:end].tolist()
        tokens, targets = window[:-1][-max_len:], window[-max_len:]
        inputs.append([0] * (max_len - len(tokens)) + tokens)
        labels.append([0] * (max_len - len(targets)) + targets)
    return torch.tensor(inputs), torch.tensor(labels)


def assert_same_loss_and_gradients(model: nn.Module, jagged: Tensor, padded: Tensor) -> None:
    """Compare two losses and their gradients by all parameters."""
    assert jagged.item() == pytest.approx(padded.item(), rel=1e-5)
    gradients = [
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for loss in (jagged, padded)
    ]
    for (name, _), ours, expected in zip(model.named_parameters(), *gradients):
        assert (ours - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
