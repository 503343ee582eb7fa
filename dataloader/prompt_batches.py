"""Batches of ranking prompts, assembled on demand."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dataloader.candidates import Candidates
from dataloader.prompt import RESPONSE_TOKENS, PromptBuilder
from datasets.base import SequenceDataset

Batch = dict[str, Any]
IGNORE_INDEX = -100  # target of positions that cross-entropy ignores


class BatchLimits(NamedTuple):
    """Limits on the size of micro-batches.

    Attributes:
        max_rows: maximum number of sequences in a micro-batch.
        max_tokens: maximum number of tokens in a micro-batch, padding included, or None; a longer
            sequence forms a micro-batch of its own.
        fixed_tokens: fixed cost of a micro-batch, expressed in tokens: one more micro-batch pays
            off if it saves at least this much padding.
        packed: whether prompts reach the model without their padding.
    """

    max_rows: int
    max_tokens: int | None = None
    fixed_tokens: int = 128
    packed: bool = False


def pad_left(sequences: list[np.ndarray], pad_id: int) -> Batch:
    """Pad sequences on the left, so that all of them end at the last position.

    Args:
        sequences: token ids of each sequence.
        pad_id: token id of the padding.

    Returns:
        ``input_ids`` and ``attention_mask``, (B, L) int64.
    """
    lengths = np.array([len(x) for x in sequences])
    mask = np.arange(lengths.max()) >= (lengths.max() - lengths)[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate(sequences)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }


def sample_negatives(
    rng: np.random.Generator, num_items: int, excluded: np.ndarray, size: int
) -> np.ndarray:
    """Sample distinct items from 1 to ``num_items`` uniformly, except the ``excluded`` ones.

    Returns:
        (size,) item ids, or fewer if fewer items are left.
    """
    allowed = np.ones(num_items + 1, dtype=bool)
    allowed[0] = allowed[excluded] = False
    pool = np.flatnonzero(allowed)
    return rng.choice(pool, min(size, len(pool)), replace=False)


def micro_batches(
    lengths: np.ndarray, limits: BatchLimits, *, packed: bool = False
) -> list[np.ndarray]:
    """Group sequences into micro-batches at the lowest cost.

    A micro-batch of r sequences, padded to l tokens, costs r l + f, where f is ``fixed_tokens``.
    Let the lengths be sorted, l[0] >= l[1] >= ..., and let cost[n] be the lowest cost of the first
    n sequences::

        cost[0] = 0
        cost[n] = min over s < n of  cost[s] + (n - s) l[s] + f

    where the sequences s to n - 1 form the last micro-batch, which must respect the limits.

    It suffices to consider such contiguous micro-batches. Take any grouping, sort its micro-batches
    by their longest sequence, and fill micro-batches of the same sizes with the sorted sequences.
    All sequences longer than the k-th micro-batch's longest were in earlier micro-batches, so the
    longest sequence that the k-th now gets is no longer: no cost increases, and the limits hold.

    Packed sequences cost only their own tokens, so the cheapest grouping has the fewest
    micro-batches.

    Args:
        lengths: (n,) number of tokens in each sequence.
        limits: limits on the micro-batches.
        packed: whether the sequences are packed instead of padded.

    Returns:
        Indices of the sequences in each micro-batch, longest sequences first.
    """
    max_rows, max_tokens, fixed_tokens, _ = limits
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    total = np.append(0, np.cumsum(ordered))
    costs = np.zeros(len(order) + 1, np.int64)
    best = np.zeros(len(order) + 1, np.int64)  # the s of each n, the largest if there are several
    for end in range(1, len(order) + 1):
        starts = np.arange(end - 1, max(end - max_rows, 0) - 1, -1)
        rows = end - starts
        tokens = total[end] - total[starts] if packed else ordered[starts] * rows
        if max_tokens is not None:
            starts, tokens = (x[(tokens <= max_tokens) | (rows == 1)] for x in (starts, tokens))
        options = costs[starts] + tokens + fixed_tokens
        choice = options.argmin()
        costs[end], best[end] = options[choice], starts[choice]
    groups, end = [], len(order)
    while end:
        groups.append(order[best[end] : end])
        end = int(best[end])
    return groups[::-1]


def training_batches(
    sequences: list[np.ndarray],
    num_targets: np.ndarray,
    users: np.ndarray,
    *,
    pad_id: int,
    limits: BatchLimits,
) -> list[Batch]:
    """Assemble the micro-batches of one optimizer step.

    Args:
        sequences: token ids of each prompt with its response.
        num_targets: (n,) number of tokens at the end of each sequence that are trained on.
        users: (n,) user of each sequence.
        pad_id: token id of the padding.
        limits: limits on the micro-batches.

    Returns:
        Micro-batches, longest sequences first, with ``input_ids`` and ``attention_mask`` (B, L);
        ``targets`` (B, R), the last R tokens of each row, ``IGNORE_INDEX`` where a token is not
        trained on; ``num_targets``, how many are; and ``users``, a list of B.
    """
    lengths = np.array([len(x) for x in sequences])
    batches = []
    for group in micro_batches(lengths, limits, packed=limits.packed):
        batch = pad_left([sequences[i] for i in group], pad_id)
        size = int(num_targets[group].max())
        untrained = np.arange(size) < size - num_targets[group, None]
        batch["targets"] = batch["input_ids"][:, -size:].masked_fill(
            torch.from_numpy(untrained), IGNORE_INDEX
        )
        batch["num_targets"] = int(num_targets[group].sum())
        batch["users"] = users[group].tolist()
        batches.append(batch)
    return batches


class TrainingPrompts(Dataset):
    """Training prompts: one for each training interaction except each user's first.

    The interaction is the target, the user's earlier ones are the history. The candidates, in
    random order, are the target, its hard negatives, if given, and items sampled from those that
    the user has not interacted with before. All random draws depend only on the seed and the
    number of the example. Numbers continue from epoch to epoch, so that each epoch has new
    negatives.

    Args:
        data: the data set.
        prompts: builder of the prompts.
        num_negatives: number of candidates in addition to the target.
        hard_negatives: (examples, k) items that each prompt must contain, padded with 0; or None.
        max_history: maximum number of items in the history.
        limits: limits on the micro-batches.
        eos_id: id of the token that ends the response, also used as padding.
        on_inputs: whether the loss covers the prompt as well as the response.
        seed: seed of the negatives and of the candidates' order.
    """

    def __init__(
        self,
        data: SequenceDataset,
        prompts: PromptBuilder,
        *,
        num_negatives: int,
        hard_negatives: np.ndarray | None = None,
        max_history: int,
        limits: BatchLimits,
        eos_id: int,
        on_inputs: bool,
        seed: int,
    ) -> None:
        self.item_ids, self.num_items = data.item_ids, data.num_items
        self.prompts, self.num_negatives, self.max_history = prompts, num_negatives, max_history
        self.hard_negatives = hard_negatives
        self.limits, self.eos_id, self.on_inputs, self.seed = limits, eos_id, on_inputs, seed
        self.starts, self.ends = data.training_prefixes()
        self.offsets = data.offsets

    def __len__(self) -> int:
        return len(self.ends)

    def example(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the history (h,), the candidates (c,) and the index of the target among them."""
        rng = np.random.default_rng([self.seed, number])
        number %= len(self)
        history = self.item_ids[self.starts[number] : self.ends[number]]
        target = self.item_ids[self.ends[number]]
        chosen = np.array([target])
        if self.hard_negatives is not None:
            hard = self.hard_negatives[number]
            chosen = np.append(hard[hard > 0], target)
        excluded = np.append(history, chosen)
        size = self.num_negatives + 1 - len(chosen)
        negatives = sample_negatives(rng, self.num_items, excluded, size)
        candidates = rng.permutation(np.append(negatives, chosen))
        index = int(np.flatnonzero(candidates == target)[0])
        return history[-self.max_history :], candidates, index

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """Return the micro-batches of one optimizer step, see ``training_batches``."""
        sequences = []
        for number in numbers:
            history, candidates, index = self.example(number)
            prompt = self.prompts.encode(history, candidates)
            sequences.append(np.append(prompt, [self.prompts.letter_ids[index], self.eos_id]))
        lengths = np.array([len(x) for x in sequences])
        starts = self.starts[np.asarray(numbers) % len(self)]
        return training_batches(
            sequences,
            lengths - 1 if self.on_inputs else np.full_like(lengths, RESPONSE_TOKENS),
            np.searchsorted(self.offsets, starts, side="right") - 1,
            pad_id=self.eos_id,
            limits=self.limits,
        )


class EvaluationPrompts(Dataset):
    """Evaluation prompts: each user's history and the retriever's candidates.

    The first prompt of a user has the candidates in the retriever's order, further ones in random
    orders. Users are sorted by the length of their first prompt, so that batches have little
    padding.

    Args:
        data: the data set.
        split: ``val`` or ``test``.
        candidates: candidates of all users in this split.
        prompts: builder of the prompts.
        max_history: maximum number of items in the history.
        users: (n,) the users; by default those whose target is among their candidates.
        pad_id: token id of the padding.
        permutations: number of prompts per user.
        seed: seed of the random orders.

    Attributes:
        users: (n,) the users, sorted by the length of their first prompt.
    """

    def __init__(
        self,
        data: SequenceDataset,
        split: str,
        candidates: Candidates,
        prompts: PromptBuilder,
        *,
        max_history: int,
        users: np.ndarray | None = None,
        pad_id: int,
        permutations: int = 1,
        seed: int = 0,
    ) -> None:
        self.prompts, self.pad_id = prompts, pad_id
        self.permutations, self.seed = permutations, seed
        self.data, self.ends = data, data.history_ends(split)
        self.candidates, self.max_history = candidates, max_history
        users = candidates.retrieved if users is None else users
        order = np.arange(candidates.items.shape[1])
        lengths = np.array([len(self._prompt(user, order)) for user in users], dtype=np.int64)
        self.users = users[np.argsort(lengths, kind="stable")]

    def _prompt(self, user: int, order: np.ndarray) -> np.ndarray:
        start, end = int(self.data.offsets[user]), int(self.ends[user])
        history = self.data.item_ids[max(start, end - self.max_history) : end]
        return self.prompts.encode(history, self.candidates.items[user][order])

    def _order(self, user: int, permutation: int) -> np.ndarray:
        """Return the (C,) candidates' indices in the order of their letters."""
        size = self.candidates.items.shape[1]
        if permutation == 0:
            return np.arange(size)
        return np.random.default_rng([self.seed, user, permutation]).permutation(size)

    def __len__(self) -> int:
        return len(self.users) * self.permutations

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return one batch of prompts.

        Returns:
            ``input_ids`` and ``attention_mask`` (B, L), ``users`` (B,) and ``orders`` (B, C), the
            index of the candidate at each letter, all int64.
        """
        users = [int(self.users[index // self.permutations]) for index in indices]
        orders = [
            self._order(user, index % self.permutations) for user, index in zip(users, indices)
        ]
        prompts = [self._prompt(user, order) for user, order in zip(users, orders)]
        return pad_left(prompts, self.pad_id) | {
            "users": torch.tensor(users),
            "orders": torch.from_numpy(np.stack(orders)),
        }
