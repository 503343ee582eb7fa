"""Probabilities of all items after a history, which the ranker's language model corrects.

They are a retriever's, or the items' shares of the training interactions. A retriever is
overconfident about interactions that it was trained on. Its encodings of training prefixes
therefore come from retrievers that were trained on other users (``recipes.out_of_fold``). This
module does not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ItemScores(NamedTuple):
    """The output layer of a retriever.

    Attributes:
        embeddings: (V + 1, D) item embeddings.
        bias: (V + 1,) item biases.
    """

    embeddings: np.ndarray
    bias: np.ndarray


class ItemPrior(ABC):
    """Probabilities of all items after sequences of interactions.

    A sequence is identified by a key: the user, or the index of the interaction that follows it.

    Args:
        mask_history: whether the items of a sequence are excluded.
    """

    def __init__(self, *, mask_history: bool) -> None:
        self.mask_history = mask_history

    @abstractmethod
    def scores(self, keys: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
        """Unnormalized log-probabilities (r, V + 1); see ``probabilities``."""

    def probabilities(
        self, keys: np.ndarray, histories: Sequence[np.ndarray], targets: np.ndarray | None = None
    ) -> np.ndarray:
        """Probabilities of all items.

        Args:
            keys: (r,) keys of the sequences.
            histories: items of each sequence.
            targets: (r,) in training, the item that follows each sequence, which is kept even if
                the sequence contains it; or None.

        Returns:
            (r, V + 1) float64; column 0 and excluded items are 0.
        """
        scores = self.scores(keys, targets)
        if self.mask_history:
            owners = np.repeat(np.arange(len(keys)), [len(items) for items in histories])
            excluded = np.concatenate(histories)
            if targets is not None:
                kept = excluded != targets[owners]
                owners, excluded = owners[kept], excluded[kept]
            scores[owners, excluded] = -np.inf
        scores[:, 0] = -np.inf
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return scores / scores.sum(axis=1, keepdims=True)


class PopularityPrior(ItemPrior):
    """The items' share of the training interactions, whatever the sequence.

    An item with n interactions has a probability proportional to n + 1. In training, the target
    itself does not count, since it will not in evaluation.

    Args:
        counts: (V + 1,) training interactions per item.
        mask_history: see ``ItemPrior``.
    """

    def __init__(self, counts: np.ndarray, *, mask_history: bool) -> None:
        super().__init__(mask_history=mask_history)
        self.counts = counts

    def scores(self, keys: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
        """See ``ItemPrior``."""
        scores = np.tile(np.log1p(self.counts), (len(keys), 1))
        if targets is not None:
            scores[np.arange(len(keys)), targets] = np.log(self.counts[targets])
        return scores


class RetrieverPrior(ItemPrior):
    """A retriever's probabilities.

    Args:
        keys: (n,) ascending keys.
        encodings: (n, D) encodings of the sequences.
        layers: output layers of the retrievers.
        layer_of: (n,) index of the layer that belongs to each encoding.
        mask_history: see ``ItemPrior``.
    """

    def __init__(
        self,
        keys: np.ndarray,
        encodings: np.ndarray,
        layers: Sequence[ItemScores],
        layer_of: np.ndarray,
        *,
        mask_history: bool,
    ) -> None:
        super().__init__(mask_history=mask_history)
        self.keys, self.encodings = keys, encodings
        self.layers, self.layer_of = layers, layer_of

    def scores(self, keys: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
        """See ``ItemPrior``."""
        rows = np.searchsorted(self.keys, keys)
        scores = np.empty((len(rows), len(self.layers[0].bias)))
        for index, layer in enumerate(self.layers):
            own = np.flatnonzero(self.layer_of[rows] == index)
            if len(own):
                scores[own] = self.encodings[rows[own]] @ layer.embeddings.T + layer.bias
        return scores
