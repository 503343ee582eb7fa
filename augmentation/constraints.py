"""Constrained decoding: only items of the catalogue can be sampled.

Let C be the token sequences of all items. A text has the form c_1 c_2 ... c_n EOS with n >= 1 and
each c_i in C. The states of the automaton that accepts these texts are the nodes of a prefix tree
of C, where a node stands for the first tokens of the current item. After token t, node v leads to

- its own child along t: the current item continues;
- the root's child along t, if v is a complete item: the next item begins;
- the end, if v is a complete item and t is EOS.

The automaton is deterministic if and only if no complete item has a child along a token that also
begins an item. Then a text has one parse only, and the tokens allowed next are the outgoing edges
of a single node. Otherwise a text can be ambiguous: with C = {5, 55} and a token per digit, "5 5"
could be item 55 or item 5 twice. Such tokenizers are refused. With the usual ones the first token
of a number contains the space before it, and no other does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from errors import InputError


class Catalogue:
    """Automaton over the tokens of one or more items and the end of the sequence.

    Args:
        items: token ids (length,) by item; ``items[0]`` stands for padding and is skipped.
        eos_id: end-of-sequence token.

    Raises:
        InputError: the tokens do not show where an item ends.
    """

    START = 0
    END = -1

    def __init__(self, items: Sequence[np.ndarray], eos_id: int) -> None:
        self.eos_id = eos_id
        transitions, complete = _prefix_tree(items[1:])
        first_tokens = transitions[self.START]
        for node in complete:
            if first_tokens.keys() & transitions[node].keys():
                raise InputError("the tokenizer's tokens do not show where an item's number ends")
            transitions[node] = transitions[node] | first_tokens | {eos_id: self.END}
        self._transitions = transitions
        self._allowed = [np.fromiter(edges, np.int64, len(edges)) for edges in transitions]

    def allowed(self, state: int) -> np.ndarray:
        """Tokens (n,) int64 that can follow; after the end, EOS fills the row."""
        return self._allowed[state] if state != self.END else np.array([self.eos_id])

    def step(self, state: int, token: int) -> int:
        """The state after one of the allowed tokens."""
        return self._transitions[state][token] if state != self.END else self.END


def _prefix_tree(sequences: Sequence[np.ndarray]) -> tuple[list[dict[int, int]], set[int]]:
    """Children by token of each node, the root being node 0, and the nodes where sequences end."""
    children: list[dict[int, int]] = [{}]
    complete = set()
    for tokens in sequences:
        node = 0
        for token in tokens.tolist():
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
            node = children[node][token]
        complete.add(node)
    return children, complete


class CatalogueProcessor(LogitsProcessor):
    """Masks every token that the catalogue does not allow next. Use one for each batch.

    Args:
        catalogue: the automaton.
        prompt_length: tokens of the padded prompts.
    """

    def __init__(self, catalogue: Catalogue, prompt_length: int) -> None:
        self.catalogue, self.prompt_length = catalogue, prompt_length
        self.states: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with minus infinity for tokens not allowed after ``input_ids`` (B, L).

        Calls must follow each other token by token: only the last one is read.
        """
        if input_ids.shape[1] == self.prompt_length:
            self.states = [Catalogue.START] * len(input_ids)
        else:
            last_tokens = input_ids[:, -1].tolist()
            self.states = [self.catalogue.step(*pair) for pair in zip(self.states, last_tokens)]
        allowed = [self.catalogue.allowed(state) for state in self.states]
        rows = np.repeat(np.arange(len(allowed)), [len(tokens) for tokens in allowed])
        columns = np.concatenate(allowed)
        indices = tuple(torch.from_numpy(x).to(scores.device) for x in (rows, columns))
        masked = torch.full_like(scores, -torch.inf)
        masked[indices] = scores[indices]
        return masked
