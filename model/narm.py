"""NARM: neural attentive recommendation machine.

J. Li et al., Neural Attentive Session-based Recommendation, CIKM 2017
(https://arxiv.org/abs/1711.04725).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from jagged import JaggedBatch, time_major
from model.base import Retriever, RetrieverSpec
from model.layers import Dropout, truncated_normal_

# Width of a tile in positions. Large tiles span several sequences and waste work on pairs of
# different ones, which matters on a CPU.
TILE_POSITIONS = {"cpu": 16, "cuda": 128}


class AdditiveAttention(torch.autograd.Function):
    """Additive attention of each scored position to the positions up to it, within sequences.

    With queries q[t], keys k[j], states h[j] and weights v, the output and the gradients are

        g[t,j] = sigmoid(q[t] + k[j])                   (D,) gates
        e[t,j] = v . g[t,j] if j is visible from t, else 0
        c[t]   = sum over j of e[t,j] h[j]

        dh[j]  = sum over t of e[t,j] dc[t]
        de[t,j] = dc[t] . h[j] if j is visible from t, else 0
        dv     = sum over t, j of de[t,j] g[t,j]
        dq[t]  = v * sum over j of de[t,j] g[t,j] (1 - g[t,j]),  likewise dk[j] summed over t

    The gates of all pairs of positions in a batch would take gigabytes (16 sequences of 200 items,
    D = 64: 2.6 GB), so they are computed tile by tile, and again in the backward pass. A tile holds
    neighboring queries and all positions from the start of the first query's sequence to the last
    query. Pairs that are not visible to each other get zero energy, so the result is exact.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        states: Tensor,
        v: Tensor,
        scored: Tensor,
        starts: Tensor,
    ) -> Tensor:
        """Compute the sums c.

        Args:
            ctx: stores what the backward pass needs.
            query: (K, D) q at the scored positions.
            key: (N, D) k at all positions.
            states: (N, D) h at all positions.
            v: (D,) weights of the energies.
            scored: (K,) the scored positions, ascending.
            starts: (K,) where their sequences start.

        Returns:
            (K, D) sums.
        """
        sums = torch.empty_like(query)
        for rows, columns, visible in _tiles(scored, starts):
            gates = (query[rows, None] + key[columns]).sigmoid_()  # (rows, columns, D)
            torch.mm((gates @ v) * visible, states[columns], out=sums[rows])
        ctx.save_for_backward(query, key, states, v, scored, starts)
        return sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of queries, keys, states and v."""
        (grad_sums,) = grad_outputs
        query, key, states, v, scored, starts = ctx.saved_tensors
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        grad_states, grad_v = torch.zeros_like(states), torch.zeros_like(v)
        for rows, columns, visible in _tiles(scored, starts):
            gates = (query[rows, None] + key[columns]).sigmoid_()
            grad_states[columns].addmm_(((gates @ v) * visible).T, grad_sums[rows])
            grad_energies = (grad_sums[rows] @ states[columns].T) * visible  # (rows, columns)
            grad_v += grad_energies.flatten() @ gates.flatten(0, 1)
            # Gradient of the sigmoid's argument without the factor v, which is applied at the end.
            grad_inner = torch.addcmul(gates, gates, gates, value=-1)
            grad_inner *= grad_energies[:, :, None]
            torch.sum(grad_inner, 1, out=grad_query[rows])
            grad_key[columns] += grad_inner.sum(0)
        return grad_query * v, grad_key * v, grad_states, grad_v, None, None


class _Tile(NamedTuple):
    """Queries ``rows``, positions ``columns``, and which of their pairs are visible."""

    rows: slice
    columns: slice
    visible: Tensor


def _tiles(scored: Tensor, starts: Tensor) -> Iterator[_Tile]:
    """Cut the scored positions into tiles; arguments as in ``AdditiveAttention.forward``."""
    size = TILE_POSITIONS.get(scored.device.type, TILE_POSITIONS["cuda"])
    counts = torch.bincount(scored // size).tolist()
    first_columns, last_columns, end = starts.tolist(), scored.tolist(), 0
    for count in filter(None, counts):
        rows = slice(end, end + count)
        end = rows.stop
        columns = slice(first_columns[rows.start], last_columns[end - 1] + 1)
        position = torch.arange(columns.start, columns.stop, device=scored.device)
        visible = (position >= starts[rows, None]) & (position <= scored[rows, None])
        yield _Tile(rows, columns, visible)


class NARM(Retriever):
    """A GRU whose last state (global encoder) and attention over its states (local encoder) score
    items by a bilinear form.

    Every position counts as the end of a session: its global encoding is the state there, its local
    encoding attends to the states up to there (equations 5 to 8 of the paper). ``num_heads`` and
    ``max_len`` of the specification are not used.
    """

    def __init__(self, spec: RetrieverSpec) -> None:
        super().__init__(spec)
        hidden_units = spec.hidden_units
        self.embedding = nn.Embedding(spec.num_items + 1, hidden_units)
        self.dropout = Dropout(spec.dropout)
        self.gru = nn.GRU(hidden_units, hidden_units, spec.num_blocks)
        self.query = nn.Linear(hidden_units, hidden_units, bias=False)
        self.key = nn.Linear(hidden_units, hidden_units, bias=False)
        self.energy = nn.Linear(hidden_units, 1, bias=False)
        self.encoding_dropout = Dropout(spec.attn_dropout)
        self.bilinear = nn.Linear(2 * hidden_units, hidden_units, bias=False)
        truncated_normal_(self)
        self.gru.reset_parameters()  # with such small weights, the states would stay near zero

    def encode(self, sequences: JaggedBatch) -> Tensor:
        """Encode the session up to each scored position; see ``Retriever.encode``."""
        item_ids, positions, _, scored = sequences
        states = self._states(self.dropout(self.embedding(item_ids)), positions)
        if scored is None:
            scored = torch.arange(len(positions), device=positions.device)
        encodings = torch.cat([states[scored], self._attend(states, positions, scored)], dim=-1)
        return self.bilinear(self.encoding_dropout(encodings))

    def _states(self, x: Tensor, positions: Tensor) -> Tensor:
        """Run the GRU over embeddings (N, D) without padding; returns states (N, D)."""
        order, counts = time_major(positions)
        packed = PackedSequence(x[order], counts.cpu())
        states = torch.empty_like(x)
        return states.index_copy(0, order, self.gru(packed)[0].data)

    def _attend(self, states: Tensor, positions: Tensor, scored: Tensor) -> Tensor:
        """(K, D) sums of the states up to each scored position, weighted by their energies."""
        query, key = self.query(states[scored]), self.key(states)
        starts = scored - positions[scored]
        return AdditiveAttention.apply(query, key, states, self.energy.weight[0], scored, starts)

    @property
    def item_embeddings(self) -> Tensor:
        """(V + 1, D) item embeddings."""
        return self.embedding.weight
