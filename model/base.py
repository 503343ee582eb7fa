"""The interface of the retrievers, and the specification they are built from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor, nn

from jagged import JaggedBatch


@dataclass(frozen=True)
class RetrieverSpec:
    """What a retriever is built from; a model ignores the fields it does not use.

    Attributes:
        model_code: one of ``config.MODEL_CODES``.
        num_items: V, the size of the catalogue; items are numbered from 1.
        max_len: most recent items that the model reads.
        hidden_units: D, the width of embeddings and layers.
        num_blocks: number of blocks or recurrent layers.
        num_heads: attention heads, a divisor of D.
        dropout: dropout of embeddings and feed-forward layers.
        attn_dropout: dropout of attention, or after a recurrence.
    """

    model_code: str
    num_items: int
    max_len: int
    hidden_units: int
    num_blocks: int
    num_heads: int
    dropout: float
    attn_dropout: float

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Pick the fields out of a run's settings.

        Raises:
            KeyError: a field is missing.
        """
        return cls(**{field.name: settings[field.name] for field in fields(cls)})

    @property
    def mask_token(self) -> int | None:
        """Token in place of the item to predict, for models that predict a masked item."""
        return self.num_items + 1 if self.model_code == "bert" else None


class Retriever(nn.Module, ABC):
    """A model that scores all items of the catalogue after each position of a sequence.

    Scores are inner products of encodings (K, D) and item embeddings (V + 1, D), plus a bias.
    Training passes the three to a loss of ``model.losses``, which need not hold all scores at once.

    Args:
        spec: what to build.
    """

    def __init__(self, spec: RetrieverSpec) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def encode(self, sequences: JaggedBatch) -> Tensor:
        """Encode the scored positions of a batch of sequences.

        Returns:
            (K, D) encodings, or (N, D) if ``sequences.scored`` is None.
        """

    @property
    @abstractmethod
    def item_embeddings(self) -> Tensor:
        """(V + 1, D) item embeddings; row 0 is the start token."""

    @property
    def item_bias(self) -> Tensor | None:
        """(V + 1,) bias of each item's score, or None."""
        return None

    def forward(self, sequences: JaggedBatch) -> Tensor:
        """Score all items at the scored positions.

        Returns:
            (K, V + 1) scores; column 0 belongs to the start token, which is not an item.
        """
        encodings = self.encode(sequences)
        return nn.functional.linear(encodings, self.item_embeddings, self.item_bias)
