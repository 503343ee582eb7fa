"""The retrievers on padded sequences: the same models as one static graph.

Training and evaluation run on jagged batches, whose shapes depend on the data. The functions here
compute the same with the same weights from (B, L) item numbers padded with 0. They serve to export
a model (``model/export.py``) and to compare it with plain padded code (``benchmarks/padded.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from model.base import Retriever
from model.lru import LRURec
from model.narm import NARM
from model.transformer import TransformerRec


def encode_all(model: Retriever, item_ids: Tensor) -> Tensor:
    """Encode all positions of left-padded sequences.

    NARM's recurrence reads the padding, as in its published code.

    Args:
        model: the retriever.
        item_ids: (B, L), padded with 0.

    Returns:
        (B, L, D).

    Raises:
        TypeError: there is no padded computation of the model.
    """
    if isinstance(model, LRURec):
        return _lru(model, item_ids)
    if isinstance(model, TransformerRec):
        return _transformer(model, item_ids)
    if isinstance(model, NARM):
        return _narm(model, item_ids)
    raise TypeError(f"no padded computation of {type(model).__name__}")


def encode_last(model: Retriever, item_ids: Tensor) -> Tensor:
    """Encode the last position of left-padded sequences, as ``Retriever.encode`` does.

    Args:
        model: the retriever.
        item_ids: (B, L), padded with 0, at least one item per sequence.

    Returns:
        (B, D).
    """
    if isinstance(model, NARM):
        length = item_ids.shape[1]
        first = (item_ids == 0).sum(1, keepdim=True)
        columns = (torch.arange(length, device=item_ids.device) + first) % length
        return _narm_last(model, item_ids.gather(1, columns))
    return encode_all(model, item_ids)[:, -1]


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

    Each round joins neighboring runs of positions in pairs: the last state of the first run, times
    powers of the eigenvalues, is added to the states of the second, unless it is padding.
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
    allowed = real[:, None, :] | torch.eye(length, dtype=torch.bool, device=real.device)
    if model.causal:
        allowed = allowed & torch.ones_like(allowed[0]).tril()
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
    real = item_ids > 0
    h = _gru_states(model, model.dropout(model.embedding(item_ids)))
    gates = torch.sigmoid(model.query(h)[:, :, None] + model.key(h)[:, None])  # (B, L, L, D)
    visible = torch.ones_like(gates[0, :, :, 0]).tril() * real[:, None]
    local = (model.energy(gates).squeeze(-1) * visible) @ h
    encodings: Tensor = model.bilinear(model.encoding_dropout(torch.cat([h, local], dim=-1)))
    return encodings


def _narm_last(model: NARM, item_ids: Tensor) -> Tensor:
    """(B, D) encodings of whole histories, (B, L) padded on the right."""
    real = item_ids > 0
    h = _gru_states(model, model.embedding(item_ids))
    ends = (real.sum(1) - 1)[:, None, None].expand(-1, 1, h.shape[2])
    last = h.gather(1, ends)[:, 0]
    gates = torch.sigmoid(model.query(last)[:, None] + model.key(h))  # (B, L, D)
    local = ((model.energy(gates).squeeze(-1) * real)[:, :, None] * h).sum(1)
    encodings: Tensor = model.bilinear(torch.cat([last, local], dim=-1))
    return encodings


def _gru_states(model: NARM, x: Tensor) -> Tensor:
    """(B, L, D) states for embeddings (B, L, D)."""
    states: Tensor = model.gru(x.transpose(0, 1))[0]
    return states.transpose(0, 1)
