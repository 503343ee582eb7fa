"""Retriever models by code."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_model
from torch import nn

from config import UserError
from model.lru import LRURec
from model.narm import NARM
from model.transformer import TransformerRec
from storage import read_json, reason


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


class TrainedRetriever(NamedTuple):
    """A retriever from a run's folder.

    Attributes:
        model: in eval mode, on the CPU.
        max_len: longest sequence.
        mask_token: what stands at the place to predict, if not None.
    """

    model: nn.Module
    max_len: int
    mask_token: int | None


def load_retriever(folder: Path, num_items: int) -> TrainedRetriever:
    """Load the model of a finished run of ``train_retriever.py``.

    Raises:
        UserError: its files are missing or do not fit each other.
    """
    settings = read_json(folder / "config.json")
    try:
        model = build_retriever(
            settings["model_code"],
            num_items=num_items,
            max_len=settings["max_len"],
            hidden_dim=settings["hidden_units"],
            num_blocks=settings["num_blocks"],
            num_heads=settings["num_heads"],
            dropout=settings["dropout"],
            attn_dropout=settings["attn_dropout"],
        )
        load_model(model, str(folder / "model.safetensors"))
    except Exception as error:  # settings and weights may be anything
        raise UserError(
            f"{folder}: cannot load the retriever ({reason(error)}): train it again"
        ) from error
    mask_token = num_items + 1 if settings["model_code"] == "bert" else None
    return TrainedRetriever(model.eval(), settings["max_len"], mask_token)
