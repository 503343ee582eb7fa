"""The prefix tree of the titles, and distributions over items on it.

In the order of their tokens, titles that begin with the same prefix are neighbors, so a node of the
tree is a range of sorted items. Only *forks* matter, the prefixes that titles continue in more than
one way. Each way is a *branch*: a token, and the range of the items that continue with it::

    sorted items     Metroid   Zelda A   Zelda B
    fork ""          [Metroid] [     Zelda     ]      two branches
    fork "Zelda"                  [A]      [B]        two branches

A distribution p over items gives the probability of a branch at its fork,

    p(branch | fork) = p(items of the branch) / p(items of the fork)

and p(title) is the product over the branches on the path to it. A language model has probabilities
of the same tokens, so the two can be combined token by token (``model.guided_titles``). Decoding
on such a tree is due to N. De Cao et al., Autoregressive Entity Retrieval, ICLR 2021
(https://arxiv.org/abs/2010.00904).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jagged import flat_ranges

MIN_MASS = 1e-15  # differences of cumulative sums near 1 are exact to about 1e-16


class TitleTrie:
    """Forks and branches of the titles of a catalogue; see the module's docstring.

    Args:
        lines: token ids of each item's title; ``lines[0]`` is skipped. Lines may be equal, but none
            may be the beginning of a longer one; a line break at their ends ensures this.

    Attributes:
        items: (V,) items, sorted by their lines.
        tokens: (U,) the distinct tokens of branches, ascending.
        offsets: (F + 1,) fork f has the branches ``offsets[f]`` to ``offsets[f + 1] - 1``.
        forks: (K,) fork of each branch.
        branch_tokens: (K,) index into ``tokens`` of each branch.
        starts, ends: (K,) range of each branch in ``items``.
    """

    def __init__(self, lines: Sequence[np.ndarray]) -> None:
        order = sorted(range(1, len(lines)), key=lambda item: lines[item].tolist())
        self.items = np.array(order)
        self._positions = np.argsort(self.items)  # position of item i at index i - 1
        rows = _branches([lines[item] for item in order])
        self.forks, depths, tokens, self.starts, self.ends = rows.T
        self.tokens, self.branch_tokens = np.unique(tokens, return_inverse=True)
        self.offsets = np.flatnonzero(np.diff(self.forks, prepend=-1, append=len(self.forks)))
        # Branches by the items in their range; forks were numbered from the root downwards.
        positions, _ = flat_ranges(self.starts, self.ends - self.starts)
        branches = np.repeat(np.arange(len(rows)), self.ends - self.starts)
        self._path_branches = branches[np.argsort(positions, kind="stable")]
        self._path_depths = depths[self._path_branches]
        counts = np.bincount(positions, minlength=len(order))
        self._path_offsets = np.concatenate([[0], np.cumsum(counts)])

    def path(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Branches (n,) on the path to an item, and the index (n,) of each token in its line."""
        first, last = self._path_offsets[self._positions[item - 1] :][:2]
        return self._path_branches[first:last], self._path_depths[first:last]

    def cumulative(self, probabilities: np.ndarray) -> np.ndarray:
        """Cumulative sums over the sorted items, from which ``masses`` reads the sum of any range.

        Args:
            probabilities: (n, V + 1) probabilities of all items; column 0 is ignored.

        Returns:
            (n, V + 1) float64, the first column 0.
        """
        sums = np.zeros(probabilities.shape)
        np.cumsum(probabilities[:, self.items], axis=1, out=sums[:, 1:])
        return sums

    def masses(self, cumulative: np.ndarray, rows: np.ndarray, branches: np.ndarray) -> np.ndarray:
        """(n,) probability of the items of ``branches`` (n,) in ``rows`` (n,) of ``cumulative``."""
        sums = cumulative[rows, self.ends[branches]] - cumulative[rows, self.starts[branches]]
        return np.maximum(sums, MIN_MASS)

    def log_share(self, cumulative: np.ndarray, item: int) -> float:
        """Log of an item's share in the probability of all items with its title.

        Args:
            cumulative: (V + 1,) a row of ``cumulative``.
            item: the item.
        """
        position, (branches, _) = self._positions[item - 1], self.path(item)
        start, end = 0, len(self.items)
        if len(branches):
            start, end = self.starts[branches[-1]], self.ends[branches[-1]]
        if end - start == 1:
            return 0.0
        own = cumulative[position + 1] - cumulative[position]
        own, whole = np.maximum([own, cumulative[end] - cumulative[start]], MIN_MASS)
        return float(np.log(own / whole))


def _branches(lines: Sequence[np.ndarray]) -> np.ndarray:
    """(K, 5) fork, index of the token in the line, token, start and end of each branch.

    Args:
        lines: sorted lines.
    """
    parts = [np.empty((0, 5), np.int64)]
    num_forks = 0
    nodes = [(0, len(lines), 0)]  # start, end and depth of nodes to visit
    while nodes:
        start, end, depth = nodes.pop()
        if end - start < 2 or len(lines[start]) == depth:
            continue  # a single title
        tokens = np.array([line[depth] for line in lines[start:end]])
        starts = start + np.flatnonzero(np.diff(tokens, prepend=-1))
        ends = np.append(starts[1:], end)
        if len(starts) > 1:
            constants = np.full((len(starts), 2), [num_forks, depth])
            parts.append(np.column_stack([constants, tokens[starts - start], starts, ends]))
            num_forks += 1
        nodes += zip(starts.tolist(), ends.tolist(), [depth + 1] * len(starts))
    return np.concatenate(parts)
