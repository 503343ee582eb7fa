"""LRURec: sequential recommendation with linear recurrent units.

Z. Yue et al., Linear Recurrent Units for Sequential Recommendation, WSDM 2024
(https://arxiv.org/abs/2310.02367), after A. Orvieto et al., Resurrecting Recurrent Neural Networks
for Long Sequences, ICML 2023 (https://arxiv.org/abs/2303.06349). Sequences come jagged: several on
one axis of N positions, see ``dataloader/retriever.py``.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from model.layers import Dropout, FeedForward, time_major, truncated_normal_
from model.losses import Output


class LinearRecurrence(torch.autograd.Function):
    """h[t] = u[t] + lambda * h[t - 1], started anew at every position 0.

    The gradient is the same recurrence run backwards, which needs no intermediate result.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, eigenvalues: Tensor, positions: Tensor, longest: int
    ) -> Tensor:
        """States (N, H) for the input ``u`` (N, H); see ``linear_recurrence``."""
        h = _recur(u, eigenvalues, positions, longest, backwards=False)
        ctx.save_for_backward(h, eigenvalues, positions)
        ctx.longest = longest
        return h

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of input and eigenvalues."""
        h, eigenvalues, positions = ctx.saved_tensors
        conjugates = eigenvalues.conj_physical()
        grad_u = _recur(grad_h, conjugates, positions, ctx.longest, backwards=True)
        follows = (positions[1:] >= 1).unsqueeze(-1)
        grad_eigenvalues = torch.where(follows, h[:-1].conj() * grad_u[1:], 0).sum(0)
        return grad_u, grad_eigenvalues, None, None


def _recur(
    x: Tensor, factors: Tensor, positions: Tensor, longest: int, *, backwards: bool
) -> Tensor:
    """(N, H) sums x[t] + factors * x[t - 1] + factors^2 * x[t - 2] + ... within each sequence, or
    with t + 1, t + 2, ... if backwards.
    """
    if x.device.type == "cpu":
        return step_by_step(x, factors, positions, backwards=backwards)
    return by_doubling(x, factors, positions, longest, backwards=backwards)


def step_by_step(x: Tensor, factors: Tensor, positions: Tensor, *, backwards: bool) -> Tensor:
    """All sequences' first positions, then their second ones, ...: the least work, and in the
    cache of a CPU; but a GPU would wait for each step.
    """
    order, counts = time_major(positions)
    sums = x[order]
    steps = sums.split(counts.tolist())
    if backwards:
        for later, step in pairwise(reversed(steps)):
            step[: len(later)].addcmul_(later, factors)
    else:
        for step, later in pairwise(steps):
            later.addcmul_(step[: len(later)], factors)
    return torch.empty_like(sums).index_copy_(0, order, sums)


def by_doubling(
    x: Tensor, factors: Tensor, positions: Tensor, longest: int, *, backwards: bool
) -> Tensor:
    """All positions at once: the sums of 2k terms follow from those of k terms as
    sum[t] + factors^k * sum[t - k], wherever t lies at least k into its sequence.
    """
    sums, k = x.clone(), 1
    while k < longest:
        reached = (positions[k:] >= k).unsqueeze(-1)
        if backwards:
            sums[:-k] += torch.where(reached, factors * sums[k:], 0)
        else:
            sums[k:] += torch.where(reached, factors * sums[:-k], 0)
        factors, k = factors * factors, 2 * k
    return sums


def linear_recurrence(u: Tensor, eigenvalues: Tensor, positions: Tensor, longest: int) -> Tensor:
    """Diagonal linear recurrence over jagged sequences.

    Args:
        u: (N, H) complex input.
        eigenvalues: (H,) complex, inside the unit circle.
        positions: (N,) index of each position within its sequence.
        longest: at least the length of the longest sequence.

    Returns:
        (N, H) complex states.
    """
    return LinearRecurrence.apply(u, eigenvalues, positions, longest)


class LRULayer(nn.Module):
    """Linear recurrent unit with residual connection and layer norm after it.

    The complex input and output maps are pairs of real ones: the states' real and imaginary parts
    lie side by side on the last axis.

    Args:
        dim: width D; the recurrence has H = 2 D complex states.
        dropout: before the residual connection.
        r_min: least modulus of the initial eigenvalues.
        r_max: greatest modulus of the initial eigenvalues.
    """

    def __init__(self, dim: int, dropout: float, r_min: float = 0.8, r_max: float = 0.99) -> None:
        super().__init__()
        states = 2 * dim
        # Uniform on the ring between r_min and r_max (Orvieto et al., lemma 3.2).
        modulus_squared = r_min**2 + torch.rand(states) * (r_max**2 - r_min**2)
        phase = 2 * math.pi * torch.rand(states)
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(modulus_squared)))
        self.theta_log = nn.Parameter(torch.log(phase))
        self.gamma_log = nn.Parameter(0.5 * torch.log(1 - modulus_squared))
        self.in_proj = nn.Linear(dim, 2 * states)
        self.out_proj = nn.Linear(2 * states, dim)
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def eigenvalues(self) -> Tensor:
        """(H,) complex eigenvalues exp(-exp(nu_log) + i exp(theta_log))."""
        return torch.exp(torch.complex(-torch.exp(self.nu_log), torch.exp(self.theta_log)))

    def forward(self, x: Tensor, positions: Tensor, longest: int) -> Tensor:
        """(N, D) to (N, D)."""
        # The input's scale goes into its map: the weights are far fewer than the states.
        gamma = torch.exp(self.gamma_log).repeat_interleave(2)
        u = nn.functional.linear(x, gamma[:, None] * self.in_proj.weight, gamma * self.in_proj.bias)
        u = torch.view_as_complex(u.unflatten(-1, (-1, 2)))  # (N, H)
        h = linear_recurrence(u, self.eigenvalues(), positions, longest)
        y = self.out_proj(torch.view_as_real(h).flatten(-2))  # (N, D)
        return self.layer_norm(x + self.dropout(y))


class LRUBlock(nn.Module):
    """A linear recurrent unit and a feed-forward network."""

    def __init__(self, dim: int, dropout: float, attn_dropout: float) -> None:
        super().__init__()
        self.lru = LRULayer(dim, attn_dropout)
        self.feed_forward = FeedForward(dim, dropout)

    def forward(self, x: Tensor, positions: Tensor, longest: int) -> Tensor:
        """(N, D) to (N, D)."""
        return self.feed_forward(self.lru(x, positions, longest))


class LRURec(nn.Module):
    """LRURec over a catalogue of V items.

    Args:
        num_items: V.
        hidden_dim: width D.
        num_blocks: number of LRU blocks.
        dropout: dropout of embeddings and feed-forward layers.
        attn_dropout: dropout after the recurrence.
    """

    def __init__(
        self,
        num_items: int,
        hidden_dim: int = 64,
        num_blocks: int = 2,
        dropout: float = 0.5,
        attn_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.embedding = nn.Embedding(num_items + 1, hidden_dim)
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden_dim)
        self.blocks = nn.ModuleList(
            LRUBlock(hidden_dim, dropout, attn_dropout) for _ in range(num_blocks)
        )
        self.output_bias = nn.Parameter(torch.zeros(num_items + 1))
        truncated_normal_(self)

    def forward(
        self,
        item_ids: Tensor,
        positions: Tensor,
        longest: int,
        keep: Tensor | None = None,
        output: Output = nn.functional.linear,
    ) -> Tensor:
        """Scores of all items as the next one.

        Args:
            item_ids: (N,) items of all sequences, 0 for the start token.
            positions: (N,) index of each position within its sequence.
            longest: length of the longest sequence.
            keep: (K,) positions to score, all if None.
            output: what to make of the encodings (K, D), the item embeddings (V + 1, D) and the
                biases; by default the scores, in training one of ``model.losses``.

        Returns:
            (K, V + 1) scores, of which column 0 belongs to the start token and is no item; or what
            else ``output`` returns.
        """
        x = self.layer_norm(self.dropout(self.embedding(item_ids)))
        for block in self.blocks:
            x = block(x, positions, longest)
        if keep is not None:
            x = x[keep]
        return output(x, self.embedding.weight, self.output_bias)
