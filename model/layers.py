"""Layers shared by the retrievers. They act on jagged batches, see ``jagged.py``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jagged import PaddedRows


class Dropout(nn.Dropout):
    """Dropout that draws 16 random bits per element on the CPU, where torch draws 64.

    Random numbers would otherwise take a quarter of a training step. The dropout probability is
    rounded to a multiple of 1 / 65,536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with probability p and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over all int16
        kept = bits >= round(self.p * (1 << 16)) - (1 << 15)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class SelfAttention(nn.Module):
    """Multi-head self-attention within sequences, then a residual connection and a layer norm.

    Only queries, keys and values are padded. The padding is on the right, where causal attention
    does not see it.

    Args:
        hidden_units: width D.
        num_heads: attention heads, a divisor of D.
        dropout: dropout before the residual connection.
        attn_dropout: dropout of the attention weights.
        causal: whether a position attends only to itself and earlier ones.
    """

    def __init__(
        self,
        hidden_units: int,
        num_heads: int,
        dropout: float,
        attn_dropout: float,
        *,
        causal: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.in_proj = nn.Linear(hidden_units, 3 * hidden_units)
        self.out_proj = nn.Linear(hidden_units, hidden_units)
        self.attn_dropout, self.dropout = Dropout(attn_dropout), Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden_units)

    def forward(self, x: Tensor, groups: list[PaddedRows]) -> Tensor:
        """Map (N, D) to (N, D).

        Args:
            x: (N, D) input.
            groups: where the sequences of two or more items are.
        """
        qkv = self.in_proj(x)  # (N, 3 D)
        y = qkv.chunk(3, dim=-1)[2]  # (N, D) values: the output of sequences of one item
        if groups:
            source = torch.cat([rows.source for rows in groups])
            y = y.index_copy(0, source, torch.cat([self._attend(qkv, rows) for rows in groups]))
        return self.layer_norm(x + self.dropout(self.out_proj(y)))

    def _attend(self, qkv: Tensor, rows: PaddedRows) -> Tensor:
        """Attention output (M, D) of the positions in ``rows``, from all (N, 3 D) projections."""
        padded = qkv.new_zeros(rows.num_rows * rows.length, qkv.shape[-1])
        padded = padded.index_copy_(0, rows.target, qkv[rows.source])
        padded = padded.view(rows.num_rows, rows.length, 3, self.num_heads, -1)
        query, key, value = padded.permute(2, 0, 3, 1, 4)  # (R, heads, length, D / heads) each
        mask = None if rows.mask is None else rows.mask[:, None, None]
        dropout = self.attn_dropout.p if self.training else 0.0
        if dropout and qkv.device.type == "cpu":
            y = self._attend_with_dropout(query, key, value, mask)
        else:
            y = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=self.causal
            )
        return y.transpose(1, 2).flatten(0, 1).flatten(-2)[rows.target]

    def _attend_with_dropout(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The same computation as torch's on the CPU, with the cheaper ``Dropout``."""
        if mask is None:
            mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)
        return self.attn_dropout(scores.masked_fill_(~mask, -torch.inf).softmax(-1)) @ value


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward network; see ``SelfAttention`` for the arguments."""

    def __init__(
        self,
        hidden_units: int,
        num_heads: int,
        dropout: float,
        attn_dropout: float,
        *,
        causal: bool,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(
            hidden_units, num_heads, dropout, attn_dropout, causal=causal
        )
        self.feed_forward = FeedForward(hidden_units, dropout)

    def forward(self, x: Tensor, groups: list[PaddedRows]) -> Tensor:
        """Map (N, D) to (N, D)."""
        return self.feed_forward(self.attention(x, groups))


class FeedForward(nn.Module):
    """Position-wise feed-forward network, then a residual connection and a layer norm.

    Args:
        hidden_units: width D.
        dropout: dropout after the activation and before the residual connection.
    """

    def __init__(self, hidden_units: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_units, 4 * hidden_units)
        self.outer = nn.Linear(4 * hidden_units, hidden_units)
        self.activation = nn.GELU()
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden_units)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        y = self.dropout(self.activation(self.inner(x)))
        return self.layer_norm(x + self.dropout(self.outer(y)))


@torch.no_grad()
def truncated_normal_(module: nn.Module, std: float = 0.02) -> None:
    """Draw all parameters from a normal distribution truncated at two standard deviations.

    Layer norms and eigenvalues (``*_log``) keep their own initial values.
    """
    for name, parameter in module.named_parameters():
        if "layer_norm" not in name and not name.endswith("_log"):
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
