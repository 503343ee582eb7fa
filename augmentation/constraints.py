"""Constrained decoding: only new items of the catalogue can be sampled.

Let C be the token sequences of the items at the start of a text, and D those after another item. A
text has the form c d_1 ... d_n EOS with c in C and each d_i in D, and lists no item twice. The
tokens allowed next are edges of prefix trees of C and D. In a tree, a node stands for the first
tokens of the current item. From node v, token t leads to

- its own child along t: the current item continues;
- the child of D's root along t, if v is a complete item: the next item begins;
- the end, if v is a complete item and t is EOS.

This is deterministic if and only if no complete item has a child along a token that also begins an
item of D. Then a text has only one parse, and the current node alone determines the tokens allowed
next. Otherwise a text can be ambiguous: with C = D = {5, 55} and a token per digit, "5 5" could be
item 55 or item 5 twice. Such tokenizers are refused. With common tokenizers, the first token of a
number contains the space before it, and no other token does.

Some items are barred for a text: those in its user's history, and those that it already lists. An
edge is closed if all items below it are barred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from errors import InputError

ROOT = 0


class Catalogue:
    """Prefix trees over the tokens of the items.

    Args:
        first_items: token ids (length,) of each item at the start of a text; item 0 stands for
            padding and is skipped.
        later_items: token ids of each item after another one.
        eos_id: end-of-sequence token.

    Attributes:
        children: child by token, for each node; the tree of the first items begins at ``ROOT``.
        later_root: root of the tree of the later items.
        items: item by the node at which it is complete.
        sizes: number of items at or below each node.
        tokens: (C,) int64, all tokens that texts can have in ascending order, EOS among them.

    Raises:
        InputError: the tokens do not show where an item ends.
    """

    def __init__(
        self, first_items: Sequence[np.ndarray], later_items: Sequence[np.ndarray], eos_id: int
    ) -> None:
        self.eos_id = eos_id
        self.children: list[dict[int, int]] = []
        self.sizes: list[int] = []
        self.items: dict[int, int] = {}
        self._paths: list[list[int]] = [[] for _ in first_items]
        self._add_tree(first_items)
        self.later_root = ROOT
        if later_items is not first_items:
            self.later_root = len(self.children)
            self._add_tree(later_items)
        begins = self.children[self.later_root].keys()
        if any(begins & self.children[node].keys() for node in self.items):
            raise InputError("the tokenizer's tokens do not show where an item's number ends")
        self.tokens = np.array(sorted({eos_id}.union(*self.children)), dtype=np.int64)

    def _add_tree(self, items: Sequence[np.ndarray]) -> None:
        root = self._add_node()
        for item, tokens in enumerate(items[1:], start=1):
            node = root
            self._count(node, item)
            for token in tokens.tolist():
                child = self.children[node].get(token)
                if child is None:
                    child = self.children[node][token] = self._add_node()
                node = child
                self._count(node, item)
            self.items[node] = item

    def _add_node(self) -> int:
        self.children.append({})
        self.sizes.append(0)
        return len(self.sizes) - 1

    def _count(self, node: int, item: int) -> None:
        self.sizes[node] += 1
        self._paths[item].append(node)

    def path(self, item: int) -> list[int]:
        """The nodes on the paths to an item, in both trees."""
        return self._paths[item]


class ItemText:
    """A list of items while its text is written.

    Args:
        catalogue: the trees.
        barred: items that the text cannot list, in addition to those that it already lists.

    Attributes:
        tokens: the text so far, without EOS.
        ended: whether EOS was written.
    """

    def __init__(self, catalogue: Catalogue, barred: Iterable[int]) -> None:
        self.catalogue = catalogue
        self.tokens: list[int] = []
        self.ended = False
        self._node = ROOT
        self._completed = 0  # the item that would end here, if any
        self._barred: set[int] = set()
        self._barred_below: Counter[int] = Counter()  # barred items at or below each node
        for item in barred:
            self._bar(item)

    def allowed(self) -> list[int]:
        """Tokens that can follow; EOS alone if there is nothing left to list."""
        tokens = self._open_edges(self._node)
        if self._completed:
            tokens += [*self._open_edges(self.catalogue.later_root), self.catalogue.eos_id]
        return tokens or [self.catalogue.eos_id]

    def append(self, token: int) -> None:
        """Write one of the allowed tokens."""
        if token == self.catalogue.eos_id:
            self.ended = True
            return
        self.tokens.append(token)
        child = self.catalogue.children[self._node].get(token)
        if child is None:
            child = self.catalogue.children[self.catalogue.later_root][token]
        elif self._completed:  # it turns out to be part of a longer number
            self._bar(self._completed, -1)
        self._node = child
        self._completed = self.catalogue.items.get(child, 0)
        if self._completed in self._barred:
            self._completed = 0
        if self._completed:
            self._bar(self._completed)

    def _open_edges(self, node: int) -> list[int]:
        sizes, barred = self.catalogue.sizes, self._barred_below
        edges = self.catalogue.children[node].items()
        return [token for token, child in edges if barred[child] < sizes[child]]

    def _bar(self, item: int, sign: int = 1) -> None:
        if (item in self._barred) == (sign > 0):
            return
        self._barred ^= {item}
        for node in self.catalogue.path(item):
            self._barred_below[node] += sign
