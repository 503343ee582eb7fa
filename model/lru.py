"""LRURec: sequential recommendation with linear recurrent units.

Z. Yue et al., Linear Recurrent Units for Sequential Recommendation, WSDM 2024
(https://arxiv.org/abs/2310.02367), after A. Orvieto et al., Resurrecting Recurrent Neural Networks
for Long Sequences, ICML 2023 (https://arxiv.org/abs/2303.06349).

The recurrence within each sequence, for H complex channels, and its gradient are

    h[t] = u[t] + lambda * h[t-1]                        h[-1] = 0
    du[t] = dh[t] + conj(lambda) * du[t+1]               du after the last step = 0
    dlambda = sum over t of conj(h[t-1]) * du[t]

where dx stands for the gradient of the loss with respect to x. The gradient of the input is the
same recurrence backwards in time, so the states are all that the backward pass needs.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from jagged import JaggedBatch, time_major
from model.base import Retriever, RetrieverSpec
from model.layers import Dropout, FeedForward, truncated_normal_


class LinearRecurrence(torch.autograd.Function):
    """The recurrence and the gradient of the module's docstring; see ``linear_recurrence``."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, eigenvalues: Tensor, positions: Tensor, max_length: int
    ) -> Tensor:
        """Compute the states (N, H) for the input ``u`` (N, H)."""
        h = _recur(u, eigenvalues, positions, max_length, backwards=False)
        ctx.save_for_backward(h, eigenvalues, positions)
        ctx.max_length = max_length
        return h

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Compute the gradients of input and eigenvalues."""
        (grad_h,) = grad_outputs
        h, eigenvalues, positions = ctx.saved_tensors
        conjugates = eigenvalues.conj_physical()
        grad_u = _recur(grad_h, conjugates, positions, ctx.max_length, backwards=True)
        has_previous = (positions[1:] >= 1).unsqueeze(-1)
        grad_eigenvalues = torch.where(has_previous, h[:-1].conj() * grad_u[1:], 0).sum(0)
        return grad_u, grad_eigenvalues, None, None


def _recur(
    x: Tensor, factors: Tensor, positions: Tensor, max_length: int, *, backwards: bool
) -> Tensor:
    """(N, H) sums x[t] + factors * x[t-1] + factors^2 * x[t-2] + ... within each sequence, or of
    x[t], x[t+1], ... if backwards.
    """
    if x.device.type == "cpu":
        return step_by_step(x, factors, positions, backwards=backwards)
    return by_doubling(x, factors, positions, max_length, backwards=backwards)


def step_by_step(x: Tensor, factors: Tensor, positions: Tensor, *, backwards: bool) -> Tensor:
    """Compute the sums one time step after the other, for all sequences at once.

    This needs the least arithmetic and fits in a CPU's cache, but a GPU would wait at every step.

    Args:
        x: (N, H) complex terms.
        factors: (H,) complex factors.
        positions: (N,) index of each position within its sequence.
        backwards: whether to sum over later positions instead of earlier ones.

    Returns:
        (N, H) complex sums.
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
    x: Tensor, factors: Tensor, positions: Tensor, max_length: int, *, backwards: bool
) -> Tensor:
    """Compute the sums for all positions at once, in log2(max_length) steps.

    If sum_k[t] has the k terms up to t, then for every t that is at least k into its sequence

        sum_2k[t] = sum_k[t] + factors^k * sum_k[t-k]

    and sum_2k[t] = sum_k[t] elsewhere, as there are no further terms.

    Args:
        x: (N, H) complex terms.
        factors: (H,) complex factors.
        positions: (N,) index of each position within its sequence.
        max_length: length of the longest sequence.
        backwards: whether to sum over later positions instead of earlier ones.

    Returns:
        (N, H) complex sums.
    """
    sums, k = x.clone(), 1
    while k < max_length:
        reached = (positions[k:] >= k).unsqueeze(-1)
        if backwards:
            sums[:-k] += torch.where(reached, factors * sums[k:], 0)
        else:
            sums[k:] += torch.where(reached, factors * sums[:-k], 0)
        factors, k = factors * factors, 2 * k
    return sums


def linear_recurrence(u: Tensor, eigenvalues: Tensor, positions: Tensor, max_length: int) -> Tensor:
    """Apply a diagonal linear recurrence to jagged sequences.

    Args:
        u: (N, H) complex input.
        eigenvalues: (H,) complex, inside the unit circle.
        positions: (N,) index of each position within its sequence.
        max_length: length of the longest sequence, or more.

    Returns:
        (N, H) complex states.
    """
    return LinearRecurrence.apply(u, eigenvalues, positions, max_length)


class LRULayer(nn.Module):
    """Linear recurrent unit, followed by a residual connection and a layer norm.

    The complex input and output maps are stored as real ones: the real and imaginary parts of a
    state are adjacent on the last axis.

    Args:
        hidden_units: width D; the recurrence has H = 2 D complex states.
        dropout: dropout before the residual connection.
        r_min: smallest modulus of the initial eigenvalues.
        r_max: largest modulus of the initial eigenvalues.
    """

    def __init__(
        self, hidden_units: int, dropout: float, r_min: float = 0.8, r_max: float = 0.99
    ) -> None:
        super().__init__()
        states = 2 * hidden_units
        # Uniform on the ring between r_min and r_max (Orvieto et al., lemma 3.2).
        modulus_squared = r_min**2 + torch.rand(states) * (r_max**2 - r_min**2)
        phase = 2 * math.pi * torch.rand(states)
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(modulus_squared)))
        self.theta_log = nn.Parameter(torch.log(phase))
        self.gamma_log = nn.Parameter(0.5 * torch.log(1 - modulus_squared))
        self.in_proj = nn.Linear(hidden_units, 2 * states)
        self.out_proj = nn.Linear(2 * states, hidden_units)
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden_units)

    def eigenvalues(self) -> Tensor:
        """(H,) complex eigenvalues exp(-exp(nu_log) + i exp(theta_log))."""
        return torch.exp(torch.complex(-torch.exp(self.nu_log), torch.exp(self.theta_log)))

    def forward(self, x: Tensor, positions: Tensor, max_length: int) -> Tensor:
        """Map (N, D) to (N, D)."""
        # The input is scaled by gamma. Scaling the weights instead is exact and cheaper.
        gamma = torch.exp(self.gamma_log).repeat_interleave(2)
        u = nn.functional.linear(x, gamma[:, None] * self.in_proj.weight, gamma * self.in_proj.bias)
        u = torch.view_as_complex(u.unflatten(-1, (-1, 2)))  # (N, H)
        h = linear_recurrence(u, self.eigenvalues(), positions, max_length)
        y = self.out_proj(torch.view_as_real(h).flatten(-2))  # (N, D)
        return self.layer_norm(x + self.dropout(y))


class LRUBlock(nn.Module):
    """A linear recurrent unit and a feed-forward network."""

    def __init__(self, hidden_units: int, dropout: float, attn_dropout: float) -> None:
        super().__init__()
        self.lru = LRULayer(hidden_units, attn_dropout)
        self.feed_forward = FeedForward(hidden_units, dropout)

    def forward(self, x: Tensor, positions: Tensor, max_length: int) -> Tensor:
        """Map (N, D) to (N, D)."""
        return self.feed_forward(self.lru(x, positions, max_length))


class LRURec(Retriever):
    """LRURec; ``num_heads`` and ``max_len`` of the specification are not used."""

    def __init__(self, spec: RetrieverSpec) -> None:
        super().__init__(spec)
        self.embedding = nn.Embedding(spec.num_items + 1, spec.hidden_units)
        self.dropout = Dropout(spec.dropout)
        self.layer_norm = nn.LayerNorm(spec.hidden_units)
        self.blocks = nn.ModuleList(
            LRUBlock(spec.hidden_units, spec.dropout, spec.attn_dropout)
            for _ in range(spec.num_blocks)
        )
        self.output_bias = nn.Parameter(torch.zeros(spec.num_items + 1))
        truncated_normal_(self)

    def encode(self, sequences: JaggedBatch) -> Tensor:
        """Encode what precedes the next item; see ``Retriever.encode``."""
        x = self.layer_norm(self.dropout(self.embedding(sequences.item_ids)))
        for block in self.blocks:
            x = block(x, sequences.positions, sequences.max_length)
        return x if sequences.scored is None else x[sequences.scored]

    @property
    def item_embeddings(self) -> Tensor:
        """(V + 1, D) item embeddings."""
        return self.embedding.weight

    @property
    def item_bias(self) -> Tensor:
        """(V + 1,) item biases."""
        return self.output_bias
