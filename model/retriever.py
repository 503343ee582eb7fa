"""Retriever models by code."""

from __future__ import annotations

from torch import nn

from model.lru import LRURec

MODELS: dict[str, type[nn.Module]] = {"lru": LRURec}


def build_retriever(
    code: str,
    *,
    num_items: int,
    hidden_dim: int,
    num_blocks: int,
    dropout: float,
    attn_dropout: float,
) -> nn.Module:
    """Build the retriever with this code.

    Args:
        code: one of ``config.MODEL_CODES``.
        num_items: items in the catalogue, numbered from 1.
        hidden_dim: embedding size.
        num_blocks: number of blocks.
        dropout: dropout of embeddings and feed-forward layers.
        attn_dropout: dropout after attention or recurrence.
    """
    return MODELS[code](num_items, hidden_dim, num_blocks, dropout, attn_dropout)
