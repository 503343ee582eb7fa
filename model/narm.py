"""NARM: neural attentive recommendation machine.

J. Li et al., Neural Attentive Session-based Recommendation, CIKM 2017
(https://arxiv.org/abs/1711.04725). Sequences come jagged, see ``dataloader/retriever.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from model.layers import Dropout, time_major, truncated_normal_
from model.losses import Output

# Neighbouring queries that are computed together: few where a pair of another sequence costs time.
TILE_POSITIONS = {"cpu": 16, "cuda": 128}


class AdditiveAttention(torch.autograd.Function):
    """c[t] = sum of e[t, j] h[j], e[t, j] = v . sigmoid(q[t] + k[j]), within jagged sequences.

    Neighbouring queries form a tile with all states between the first one's sequence's start and
    the last one; the energies of pairs that are not meant are zeroed. What is inside the sigmoid,
    D numbers a pair, is computed anew for the gradient: that of 16 sequences of 200 items would
    fill a gigabyte.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        states: Tensor,
        v: Tensor,
        keep: Tensor,
        starts: Tensor,
    ) -> Tensor:
        """Sums (K, D) for queries (K, D) over keys and states (N, D).

        Args:
            ctx: takes what the gradient needs.
            query: q at the kept positions.
            key: k at all positions.
            states: h at all positions.
            v: (D,) weights of the energies.
            keep: (K,) the kept positions, ascending.
            starts: (K,) where their sequences start.
        """
        sums = torch.empty_like(query)
        for rows, columns, meant in _tiles(keep, starts):
            gates = (query[rows, None] + key[columns]).sigmoid_()  # (rows, columns, D)
            torch.mm((gates @ v) * meant, states[columns], out=sums[rows])
        ctx.save_for_backward(query, key, states, v, keep, starts)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys, states and v."""
        query, key, states, v, keep, starts = ctx.saved_tensors
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        grad_states, grad_v = torch.zeros_like(states), torch.zeros_like(v)
        for rows, columns, meant in _tiles(keep, starts):
            gates = (query[rows, None] + key[columns]).sigmoid_()
            grad_states[columns].addmm_(((gates @ v) * meant).T, grad_sums[rows])
            grad_energies = (grad_sums[rows] @ states[columns].T) * meant  # (rows, columns)
            grad_v += grad_energies.flatten() @ gates.flatten(0, 1)
            # Of what is inside the sigmoid, but for the factor v, which the sums take out.
            grad_inner = torch.addcmul(gates, gates, gates, value=-1)
            grad_inner *= grad_energies[:, :, None]
            torch.sum(grad_inner, 1, out=grad_query[rows])
            grad_key[columns] += grad_inner.sum(0)
        return grad_query * v, grad_key * v, grad_states, grad_v, None, None


def _tiles(keep: Tensor, starts: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows (queries) and columns (positions) of each tile, and which of its pairs are meant."""
    size = TILE_POSITIONS.get(keep.device.type, TILE_POSITIONS["cuda"])
    counts = torch.bincount(keep // size).tolist()
    firsts, lasts, end = starts.tolist(), keep.tolist(), 0
    for count in filter(None, counts):
        rows = slice(end, end + count)
        end = rows.stop
        columns = slice(firsts[rows.start], lasts[end - 1] + 1)
        place = torch.arange(columns.start, columns.stop, device=keep.device)
        yield rows, columns, (place >= starts[rows, None]) & (place <= keep[rows, None])


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
        order, counts = time_major(positions)
        packed = PackedSequence(x[order], counts.cpu())
        states = torch.empty_like(x)
        return states.index_copy(0, order, self.gru(packed)[0].data)

    def _attend(self, states: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        """(K, D) sums of the states up to each kept position, weighted by their energies."""
        query, key = self.query(states[keep]), self.key(states)
        starts = keep - positions[keep]
        return AdditiveAttention.apply(query, key, states, self.energy.weight[0], keep, starts)

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
