"""NARM: neural attentive recommendation machine.

J. Li et al., Neural Attentive Session-based Recommendation, CIKM 2017
(https://arxiv.org/abs/1711.04725). Sequences come jagged, see ``dataloader/retriever.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from model.layers import Dropout, truncated_normal_
from model.losses import Output

CHUNK_PAIRS = 1 << 13


class NARM(nn.Module):
    """A GRU whose last state (global encoder) and attention over its states (local encoder)
    score items by a bilinear form.

    Every position of a sequence is a session of its own: its global encoding is the state there,
    its local encoding attends to the states up to there (equations 5 to 8 of the paper).

    Args:
        num_items: V.
        hidden_dim: width D of embeddings and states.
        num_blocks: layers of the GRU.
        dropout: of the embeddings.
        attn_dropout: of the encodings before the bilinear form.
    """

    def __init__(
        self,
        num_items: int,
        hidden_dim: int = 64,
        num_blocks: int = 1,
        dropout: float = 0.5,
        attn_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.embedding = nn.Embedding(num_items + 1, hidden_dim)
        self.dropout = Dropout(dropout)
        self.gru = nn.GRU(hidden_dim, hidden_dim, num_blocks)
        self.query = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.key = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.energy = nn.Linear(hidden_dim, 1, bias=False)
        self.encoding_dropout = Dropout(attn_dropout)
        self.bilinear = nn.Linear(2 * hidden_dim, hidden_dim, bias=False)
        truncated_normal_(self)
        self.gru.reset_parameters()  # states of so small weights would stay near zero

    def _states(self, x: Tensor, positions: Tensor) -> Tensor:
        """(N, D) embeddings to (N, D) states of the GRU, without padding."""
        row = (positions == 0).cumsum(0) - 1
        lengths = torch.bincount(row)
        rank = torch.empty_like(lengths)  # place of each row among the rows, longest first
        rank[lengths.argsort(descending=True, stable=True)] = torch.arange(
            len(lengths), device=row.device
        )
        order = (positions * len(lengths) + rank[row]).argsort()
        packed = PackedSequence(x[order], torch.bincount(positions).cpu())
        states = torch.empty_like(x)
        return states.index_copy(0, order, self.gru(packed)[0].data)

    def _attend(self, states: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """(K, D) sums of the states up to each kept position, weighted by their energies.

        Pairs of positions are taken in chunks and computed anew for the gradient: those of 16
        sequences of 200 items would fill a gigabyte.
        """
        counts = positions[keep] + 1  # states that a position attends to
        sizes = torch.bincount(counts.cumsum(0) // CHUNK_PAIRS).tolist()
        parts = zip(
            self.query(states[keep]).split(sizes),
            (keep - positions[keep]).split(sizes),
            counts.split(sizes),
        )
        key = self.key(states)
        sums = [
            checkpoint(
                self._attend_chunk,
                query,
                key,
                states,
                *ranges,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for query, *ranges in parts
            if len(query)
        ]
        return torch.cat(sums)

    def _attend_chunk(
        self, query: Tensor, key: Tensor, states: Tensor, starts: Tensor, counts: Tensor
    ) -> Tensor:
        """(C, D) such sums for queries (C, D) of the ``counts`` states that begin at ``starts``."""
        group = torch.repeat_interleave(counts)  # (P,) which query a pair belongs to
        place = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]
        source = starts[group] + place
        energy = self.energy(torch.sigmoid(query[group] + key[source]))  # (P, 1)
        sums = states.new_zeros(len(counts), states.shape[-1])
        return sums.index_add(0, group, energy * states[source])

    def forward(
        self,
        item_ids: Tensor,
        positions: Tensor,
        longest: int,
        keep: Tensor | None = None,
        output: Output = nn.functional.linear,
    ) -> Tensor:
        """Scores of all items as the next one.

        Args:
            item_ids: (N,) items of all sequences, 0 for the start token.
            positions: (N,) index of each position within its sequence.
            longest: length of the longest sequence, of no use here.
            keep: (K,) positions to score, all if None.
            output: what to make of the encodings (K, D), the item embeddings (V + 1, D) and the
                biases; by default the scores, in training one of ``model.losses``.

        Returns:
            (K, V + 1) scores, of which column 0 belongs to the start token and is no item; or what
            else ``output`` returns.
        """
        states = self._states(self.dropout(self.embedding(item_ids)), positions)
        if keep is None:
            keep = torch.arange(len(positions), device=positions.device)
        encoding = torch.cat([states[keep], self._attend(states, positions, keep)], dim=-1)
        encoding = self.bilinear(self.encoding_dropout(encoding))  # (K, D)
        return output(encoding, self.embedding.weight, None)
