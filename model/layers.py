"""Layers shared by the retriever models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
