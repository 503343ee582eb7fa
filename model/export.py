"""A retriever as a program that runs with torch alone."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model.base import Retriever
from model.padded import encode_last


class HistoryScores(nn.Module):
    """Scores of all items after padded histories.

    Args:
        retriever: the model.
        mask_history: whether to exclude the items of each history.
    """

    def __init__(self, retriever: Retriever, *, mask_history: bool) -> None:
        super().__init__()
        self.retriever, self.mask_history = retriever, mask_history

    def forward(self, histories: Tensor) -> Tensor:
        """Score all items.

        Args:
            histories: (B, L) int64 item numbers, oldest first, padded with 0 on the left, at least
                one item per row.

        Returns:
            (B, V + 1) scores, minus infinity for column 0 and excluded items.
        """
        inputs, mask_token = histories, self.retriever.spec.mask_token
        if mask_token is not None:  # in place of the item to predict
            mask = torch.full_like(histories[:, :1], mask_token)
            inputs = torch.cat([histories[:, 1:], mask], dim=1)
        encodings = encode_last(self.retriever, inputs)
        scores = nn.functional.linear(
            encodings, self.retriever.item_embeddings, self.retriever.item_bias
        )
        seen = histories if self.mask_history else histories[:, :0]
        excluded = nn.functional.pad(seen, (1, 0))  # with column 0
        return scores.scatter(1, excluded, -torch.inf)


def export_retriever(retriever: Retriever, *, mask_history: bool) -> ExportedProgram:
    """Trace a retriever for any number of histories, padded to ``max_len`` items.

    Args:
        retriever: the model, in eval mode on the CPU.
        mask_history: whether to exclude the items of each history.

    Returns:
        A program with the input and output of ``HistoryScores.forward``.
    """
    example = torch.ones(2, retriever.spec.max_len, dtype=torch.int64)
    with torch.no_grad(), warnings.catch_warnings():
        # Tracing NARM's GRU makes torch reassign its flattened weights; the values stay the same.
        warnings.filterwarnings("ignore", message=".*were assigned during export")
        return torch.export.export(
            HistoryScores(retriever, mask_history=mask_history).eval(),
            (example,),
            dynamic_shapes=({0: Dim("histories", min=1)},),
        )
