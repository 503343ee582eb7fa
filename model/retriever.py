"""Retriever models by code."""

from __future__ import annotations

from torch import nn

from model.lru import LRURec
from model.narm import NARM
from model.transformer import TransformerRec


def build_retriever(
    code: str,
    *,
    num_items: int,
    max_len: int,
    hidden_dim: int,
    num_blocks: int,
    num_heads: int,
    dropout: float,
    attn_dropout: float,
) -> nn.Module:
    """Build the retriever with this code; a model takes the settings it has a use for.

    Args:
        code: one of ``config.MODEL_CODES``.
        num_items: items in the catalogue, numbered from 1.
        max_len: longest sequence.
        hidden_dim: embedding size.
        num_blocks: number of blocks or layers.
        num_heads: attention heads.
        dropout: dropout of embeddings and feed-forward layers.
        attn_dropout: dropout in or after attention or recurrence.
    """
    sizes = (num_items, hidden_dim, num_blocks)
    if code == "lru":
        return LRURec(*sizes, dropout, attn_dropout)
    if code == "narm":
        return NARM(*sizes, dropout, attn_dropout)
    return TransformerRec(
        *sizes, num_heads, dropout, attn_dropout, max_len, causal={"sas": True, "bert": False}[code]
    )
