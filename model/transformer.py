"""SASRec and BERT4Rec: a transformer over item sequences, causal or bidirectional.

W.-C. Kang and J. McAuley, Self-Attentive Sequential Recommendation, ICDM 2018
(https://arxiv.org/abs/1808.09781); F. Sun et al., BERT4Rec, CIKM 2019
(https://arxiv.org/abs/1904.06690). Sequences come jagged, see ``dataloader/retriever.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.layers import (
    Dropout,
    TransformerBlock,
    jagged_rows,
    positions_from_end,
    truncated_normal_,
)
from model.losses import Output


class TransformerRec(nn.Module):
    """Transformer over a catalogue of V items; learned positions from the end, tied output.

    Args:
        num_items: V.
        hidden_dim: width D.
        num_blocks: number of blocks.
        num_heads: attention heads.
        dropout: dropout of embeddings and sublayers.
        attn_dropout: dropout of the attention weights.
        max_len: longest sequence.
        causal: SASRec if true; BERT4Rec, with an embedding more for the mask token, if false.
    """

    def __init__(
        self,
        num_items: int,
        hidden_dim: int = 64,
        num_blocks: int = 2,
        num_heads: int = 2,
        dropout: float = 0.5,
        attn_dropout: float = 0.5,
        max_len: int = 50,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.num_items, self.causal = num_items, causal
        self.embedding = nn.Embedding(num_items + (1 if causal else 2), hidden_dim)
        self.position_embedding = nn.Embedding(max_len, hidden_dim)
        self.layer_norm = nn.LayerNorm(hidden_dim)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_dim, num_heads, dropout, attn_dropout, causal=causal)
            for _ in range(num_blocks)
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
        """Scores of all items: the next one (SASRec) or the masked one (BERT4Rec).

        Args:
            item_ids: (N,) items of all sequences, 0 for the start token, V + 1 for the mask.
            positions: (N,) index of each position within its sequence.
            longest: length of the longest sequence.
            keep: (K,) positions to score, all if None.
            output: what to make of the encodings (K, D), the item embeddings (V + 1, D) and the
                biases; by default the scores, in training one of ``model.losses``.

        Returns:
            (K, V + 1) scores, of which column 0 belongs to the start token and is no item; or what
            else ``output`` returns.
        """
        groups = jagged_rows(positions, longest, filled=not self.causal)
        places = positions_from_end(item_ids, positions, self.position_embedding.num_embeddings)
        x = self.embedding(item_ids) + self.position_embedding(places)
        x = self.dropout(self.layer_norm(x))
        for block in self.blocks:
            x = block(x, groups)
        if keep is not None:
            x = x[keep]
        weight = self.embedding.weight[: self.num_items + 1]
        return output(x, weight, self.output_bias)
