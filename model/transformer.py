"""SASRec and BERT4Rec: transformers over item sequences, causal and bidirectional.

W.-C. Kang and J. McAuley, Self-Attentive Sequential Recommendation, ICDM 2018
(https://arxiv.org/abs/1808.09781); F. Sun et al., BERT4Rec: Sequential Recommendation with
Bidirectional Encoder Representations from Transformer, CIKM 2019
(https://arxiv.org/abs/1904.06690).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jagged import JaggedBatch, padded_rows, positions_from_end
from model.base import Retriever, RetrieverSpec
from model.layers import Dropout, TransformerBlock, truncated_normal_


class TransformerRec(Retriever):
    """Transformer with position embeddings counted from the end and a tied output layer."""

    causal: bool

    def __init__(self, spec: RetrieverSpec) -> None:
        super().__init__(spec)
        num_embeddings = spec.num_items + (1 if spec.mask_token is None else 2)
        self.embedding = nn.Embedding(num_embeddings, spec.hidden_units)
        self.position_embedding = nn.Embedding(spec.max_len, spec.hidden_units)
        self.layer_norm = nn.LayerNorm(spec.hidden_units)
        self.dropout = Dropout(spec.dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                spec.hidden_units,
                spec.num_heads,
                spec.dropout,
                spec.attn_dropout,
                causal=self.causal,
            )
            for _ in range(spec.num_blocks)
        )
        self.output_bias = nn.Parameter(torch.zeros(spec.num_items + 1))
        truncated_normal_(self)

    def encode(self, sequences: JaggedBatch) -> Tensor:
        """Encode the scored positions; see ``Retriever.encode``."""
        item_ids, positions, max_length, scored = sequences
        groups = padded_rows(positions, max_length, with_mask=not self.causal)
        from_end = positions_from_end(item_ids, positions, self.spec.max_len)
        x = self.embedding(item_ids) + self.position_embedding(from_end)
        x = self.dropout(self.layer_norm(x))
        for block in self.blocks:
            x = block(x, groups)
        return x if scored is None else x[scored]

    @property
    def item_embeddings(self) -> Tensor:
        """(V + 1, D) item embeddings, without the mask token's."""
        return self.embedding.weight[: self.spec.num_items + 1]

    @property
    def item_bias(self) -> Tensor:
        """(V + 1,) item biases."""
        return self.output_bias


class SASRec(TransformerRec):
    """SASRec: each position attends to the earlier ones and predicts the next item."""

    causal = True


class BERT4Rec(TransformerRec):
    """BERT4Rec: each position attends to all others and predicts the item that is masked there."""

    causal = False
