"""Layers shared by the retriever models."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

# Rows are as long as at most so many times the sequences in them.
ROW_LENGTH_RATIO = 4


class Dropout(nn.Dropout):
    """Dropout that draws 16 random bits an element on the CPU, where torch's own draws 64.

    The share of dropped elements is rounded to a multiple of 1 / 65,536. Random numbers are a
    quarter of a training step otherwise.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element with probability p and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over all int16
        kept = bits >= round(self.p * (1 << 16)) - (1 << 15)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


class Rows(NamedTuple):
    """Where sequences of similar length lie among B rows padded on the right.

    Attributes:
        source: (M,) their positions on the flat axis.
        places: (M,) where, on the flattened (B * length,) axis.
        num_rows: B.
        length: length of a row.
        filled: (B, length) which positions of the rows are sequence, or None if it is not needed.
    """

    source: Tensor
    places: Tensor
    num_rows: int
    length: int
    filled: Tensor | None


def _sequences(positions: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) number of the sequence that each position lies in, and (S,) the sequences' lengths."""
    sequence = (positions == 0).cumsum(0) - 1
    return sequence, torch.bincount(sequence)


class TimeMajor(NamedTuple):
    """The positions of a jagged batch step by step, in each step the longest sequences first.

    Attributes:
        order: (N,) positions on the flat axis.
        counts: (longest,) how many of them are in each step.
    """

    order: Tensor
    counts: Tensor


def time_major(positions: Tensor) -> TimeMajor:
    """The order in which a recurrence takes the positions.

    Args:
        positions: (N,) index of each position within its sequence.
    """
    sequence, lengths = _sequences(positions)
    rank = torch.empty_like(lengths)  # place of each sequence among them, longest first
    rank[lengths.argsort(descending=True, stable=True)] = torch.arange(
        len(lengths), device=positions.device
    )
    order = (positions * len(lengths) + rank[sequence]).argsort()
    return TimeMajor(order, torch.bincount(positions))


def positions_from_end(item_ids: Tensor, positions: Tensor, max_len: int) -> Tensor:
    """(N,) positions as in sequences padded to ``max_len`` on the left: the last one's is the same.

    So a learned position says how far an item lies from the end, as in the published models. The
    start token, a sequence of its own, gets 0.

    Args:
        item_ids: (N,) items, 0 for the start token.
        positions: (N,) index of each position within its sequence.
        max_len: longest sequence.
    """
    sequence, lengths = _sequences(positions)
    return torch.where(item_ids == 0, 0, positions + max_len - lengths[sequence])


def jagged_rows(positions: Tensor, longest: int, *, filled: bool) -> list[Rows]:
    """Lay the sequences of a jagged batch out in rows, short ones apart from long ones.

    A sequence of one item attends to itself alone and needs no row.

    Args:
        positions: (N,) index of each position within its sequence.
        longest: length of the longest sequence.
        filled: whether to mark the rows' filled positions.
    """
    sequence, lengths = _sequences(positions)
    groups, length = [], longest
    while length > 1:
        shorter = max(length // ROW_LENGTH_RATIO, 1)
        chosen = (lengths > shorter) & (lengths <= length)
        num_rows = int(chosen.sum())
        if num_rows:
            source = chosen[sequence].nonzero()[:, 0]
            places = (chosen.cumsum(0) - 1)[sequence[source]] * length + positions[source]
            mask = None
            if filled:
                mask = torch.zeros(num_rows * length, dtype=torch.bool, device=positions.device)
                mask[places] = True
                mask = mask.view(num_rows, length)
            groups.append(Rows(source, places, num_rows, length, mask))
        length = shorter
    return groups


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
        self.num_heads, self.causal = num_heads, causal
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.attn_dropout, self.dropout = Dropout(attn_dropout), Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, groups: list[Rows]) -> Tensor:
        """(N, D) to (N, D)."""
        qkv = self.in_proj(x)  # (N, 3 D)
        y = qkv.chunk(3, dim=-1)[2]  # (N, D) values: what a single item attends to
        if groups:
            source = torch.cat([rows.source for rows in groups])
            y = y.index_copy(0, source, torch.cat([self._attend(qkv, rows) for rows in groups]))
        return self.layer_norm(x + self.dropout(self.out_proj(y)))

    def _attend(self, qkv: Tensor, rows: Rows) -> Tensor:
        """Queries, keys and values (N, 3 D) to what the positions in rows attend to, (M, D)."""
        padded = qkv.new_zeros(rows.num_rows * rows.length, qkv.shape[-1])
        padded = padded.index_copy_(0, rows.places, qkv[rows.source])
        padded = padded.view(rows.num_rows, rows.length, 3, self.num_heads, -1)
        query, key, value = padded.permute(2, 0, 3, 1, 4)  # (B, heads, length, D / heads) each
        mask = None if self.causal else rows.filled[:, None, None]
        dropout = self.attn_dropout.p if self.training else 0.0
        if dropout and qkv.device.type == "cpu":
            y = self._attend_with_dropout(query, key, value, mask)
        else:
            y = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=self.causal
            )
        return y.transpose(1, 2).flatten(0, 1).flatten(-2)[rows.places]

    def _attend_with_dropout(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What torch does on the CPU when attention drops out, with cheaper random bits."""
        if mask is None:
            mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)
        return self.attn_dropout(scores.masked_fill_(~mask, -torch.inf).softmax(-1)) @ value


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward network; arguments as of ``SelfAttention``."""

    def __init__(
        self, dim: int, num_heads: int, dropout: float, attn_dropout: float, *, causal: bool
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, num_heads, dropout, attn_dropout, causal=causal)
        self.feed_forward = FeedForward(dim, dropout)

    def forward(self, x: Tensor, groups: list[Rows]) -> Tensor:
        """(N, D) to (N, D)."""
        return self.feed_forward(self.attention(x, groups))


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
        self.dropout = Dropout(dropout)
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
