"""Layers shared by the retriever models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rows(NamedTuple):
    """Where the N positions of a jagged batch lie among B padded rows of ``longest`` positions.

    Attributes:
        places: (N,) index of each position on the flattened (B * longest,) axis.
        num_rows: B.
        longest: length of a row.
        filled: (B, longest) which positions of the rows are sequence, or None if it is not needed.
    """

    places: Tensor
    num_rows: int
    longest: int
    filled: Tensor | None


def jagged_rows(positions: Tensor, longest: int, *, filled: bool) -> Rows:
    """Lay the sequences of a jagged batch out in rows that are padded on the right.

    Args:
        positions: (N,) index of each position within its sequence.
        longest: length of the longest sequence.
        filled: whether to mark the rows' filled positions.
    """
    row = (positions == 0).cumsum(0) - 1
    num_rows = int(row[-1]) + 1
    places = row * longest + positions
    mask = None
    if filled:
        mask = torch.zeros(num_rows * longest, dtype=torch.bool, device=positions.device)
        mask[places] = True
        mask = mask.view(num_rows, longest)
    return Rows(places, num_rows, longest, mask)


class SelfAttention(nn.Module):
    """Multi-head self-attention within the sequences of a jagged batch.

    Residual connection and layer norm come after it. Only queries, keys and values are padded;
    padding stands on the right, so that causal attention does not reach it.

    Args:
        dim: width D.
        num_heads: attention heads, a divisor of D.
        dropout: before the residual connection.
        attn_dropout: on the attention weights.
        causal: attend to no later position.
    """

    def __init__(
        self, dim: int, num_heads: int, dropout: float, attn_dropout: float, *, causal: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.attn_dropout, self.causal = num_heads, attn_dropout, causal
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(N, D) to (N, D)."""
        qkv = self.in_proj(x)  # (N, 3 D)
        padded = qkv.new_zeros(rows.num_rows * rows.longest, qkv.shape[-1])
        padded = padded.index_copy(0, rows.places, qkv)
        padded = padded.view(rows.num_rows, rows.longest, 3, self.num_heads, -1)
        query, key, value = padded.permute(2, 0, 3, 1, 4)  # (B, heads, longest, D / heads) each
        y = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if self.causal else rows.filled[:, None, None],
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=self.causal,
        )
        y = y.transpose(1, 2).flatten(0, 1).flatten(-2)[rows.places]  # (N, D)
        return self.layer_norm(x + self.dropout(self.out_proj(y)))


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward network; arguments as of ``SelfAttention``."""

    def __init__(
        self, dim: int, num_heads: int, dropout: float, attn_dropout: float, *, causal: bool
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, num_heads, dropout, attn_dropout, causal=causal)
        self.feed_forward = FeedForward(dim, dropout)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """(N, D) to (N, D)."""
        return self.feed_forward(self.attention(x, rows))


class FeedForward(nn.Module):
    """Position-wise feed-forward network with residual connection and layer norm after it.

    Args:
        dim: width D.
        dropout: after the activation and before the residual connection.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, 4 * dim)
        self.outer = nn.Linear(4 * dim, dim)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        y = self.dropout(self.activation(self.inner(x)))
        return self.layer_norm(x + self.dropout(self.outer(y)))


@torch.no_grad()
def truncated_normal_(module: nn.Module, std: float = 0.02) -> None:
    """Draw all parameters from a normal distribution cut at two standard deviations.

    Layer norms and eigenvalues (``*_log``) keep their own initial values.
    """
    for name, parameter in module.named_parameters():
        if "layer_norm" not in name and not name.endswith("_log"):
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
