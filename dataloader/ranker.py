"""Prompts for the ranker, made when a batch needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dataloader.candidates import Candidates
from dataloader.prompt import RESPONSE_TOKENS, PromptBuilder
from datasets import SequenceDataset

Batch = dict[str, Any]
IGNORED = -100  # cross-entropy's mark of what is no target


def pad_left(sequences: list[np.ndarray], pad_id: int) -> Batch:
    """Sequences of token ids as ``input_ids`` and ``attention_mask``, (B, L) int64 each.

    Padding stands on the left, so that the last position of every row is its sequence's last.
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
    """Up to ``size`` distinct items from 1 to ``num_items``, none of the excluded ones."""
    allowed = np.ones(num_items + 1, dtype=bool)
    allowed[0] = allowed[excluded] = False
    pool = np.flatnonzero(allowed)
    return rng.choice(pool, min(size, len(pool)), replace=False)


# Tokens that a micro-batch of its own may save: below that its fixed cost is more than padding.
GROUP_TOKENS = 128


def micro_batches(lengths: np.ndarray, max_rows: int, max_tokens: int | None) -> list[np.ndarray]:
    """Group sequences into padded micro-batches with the least padding.

    Sequences of neighbouring lengths go together, in the order of their lengths; where to cut is
    found by dynamic programming over all cuts.

    Args:
        lengths: (n,) of the sequences in tokens.
        max_rows: most sequences in a micro-batch.
        max_tokens: most tokens in a micro-batch, padding included, if not None; a single sequence
            may be longer.

    Returns:
        Places of the sequences, longest first, by micro-batch.
    """
    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    costs, cuts = [0], [0]  # of the first n sequences; where their last micro-batch starts
    for end in range(1, len(order) + 1):
        best, cut = None, 0
        for start in range(end - 1, max(end - max_rows, 0) - 1, -1):
            tokens = int(ordered[start]) * (end - start)
            if max_tokens is not None and tokens > max_tokens and end - start > 1:
                break
            cost = costs[start] + tokens + GROUP_TOKENS
            if best is None or cost < best:
                best, cut = cost, start
        costs.append(best)
        cuts.append(cut)
    groups, end = [], len(order)
    while end:
        groups.append(order[cuts[end] : end])
        end = cuts[end]
    return groups[::-1]


def training_batches(
    sequences: list[np.ndarray],
    num_targets: np.ndarray,
    users: np.ndarray,
    *,
    pad_id: int,
    max_rows: int,
    max_tokens: int | None,
) -> list[Batch]:
    """Micro-batches of one optimizer step.

    Args:
        sequences: token ids of a prompt and its response each.
        num_targets: (n,) how many of a sequence's last tokens are trained on.
        users: (n,) whose they are.
        pad_id: fills shorter rows.
        max_rows: as of ``micro_batches``.
        max_tokens: as of ``micro_batches``.

    Returns:
        Longest sequences first, each micro-batch with ``input_ids`` and ``attention_mask`` (B, L),
        ``targets`` (B, R), its rows' last R tokens with -100 for those not trained on, its
        ``weight`` in the step's mean loss and a list of its ``users``.
    """
    lengths = np.array([len(x) for x in sequences])
    batches = []
    for group in micro_batches(lengths, max_rows, max_tokens):
        batch = pad_left([sequences[i] for i in group], pad_id)
        size = int(num_targets[group].max())
        untrained = np.arange(size) < size - num_targets[group, None]
        batch["targets"] = batch["input_ids"][:, -size:].masked_fill(
            torch.from_numpy(untrained), IGNORED
        )
        batch["weight"] = float(num_targets[group].sum() / num_targets.sum())
        batch["users"] = users[group].tolist()
        batches.append(batch)
    return batches


class TrainingPrompts(Dataset):
    """A prompt for every training interaction but each user's first.

    The candidates are the answer and items that the user has not had before, shuffled: hard
    negatives first, if there are any, then sampled ones. They depend on the seed and the example's
    number alone; numbers go on from epoch to epoch, so that every epoch samples anew.

    Args:
        data: the data set.
        prompts: builds the prompts.
        num_negatives: candidates beside the answer.
        hard_negatives: (examples, k) items by example, 0 for none, of which each prompt has all.
        max_history: most items of the history.
        max_rows: most prompts that pass through the model at once.
        max_tokens: most tokens that do, if not None.
        eos_id: token that ends the response.
        on_inputs: whether the loss covers the whole prompt.
        seed: seed of the sampling.
    """

    def __init__(
        self,
        data: SequenceDataset,
        prompts: PromptBuilder,
        *,
        num_negatives: int,
        hard_negatives: np.ndarray | None = None,
        max_history: int,
        max_rows: int,
        max_tokens: int | None = None,
        eos_id: int,
        on_inputs: bool,
        seed: int,
    ) -> None:
        self.item_ids, self.num_items = data.item_ids, data.num_items
        self.prompts, self.num_negatives, self.max_history = prompts, num_negatives, max_history
        self.hard_negatives = hard_negatives
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.eos_id, self.on_inputs, self.seed = eos_id, on_inputs, seed
        self.starts, self.ends = data.training_prefixes()
        self.users = np.searchsorted(data.offsets, self.starts, side="right") - 1

    def __len__(self) -> int:
        return len(self.ends)

    def example(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """History (h,), candidates (c,) and the answer's place among them."""
        rng = np.random.default_rng([self.seed, number])
        number %= len(self)
        history = self.item_ids[self.starts[number] : self.ends[number]]
        answer = self.item_ids[self.ends[number]]
        taken = np.array([answer])
        if self.hard_negatives is not None:
            hard = self.hard_negatives[number]
            taken = np.append(hard[hard > 0], answer)
        excluded = np.append(history, taken)
        size = self.num_negatives + 1 - len(taken)
        negatives = sample_negatives(rng, self.num_items, excluded, size)
        candidates = rng.permutation(np.append(negatives, taken))
        place = int(np.flatnonzero(candidates == answer)[0])
        return history[-self.max_history :], candidates, place

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """Micro-batches of one optimizer step, as of ``training_batches``."""
        sequences = []
        for number in numbers:
            history, candidates, place = self.example(number)
            prompt = self.prompts.encode(history, candidates)
            sequences.append(np.append(prompt, [self.prompts.label_ids[place], self.eos_id]))
        lengths = np.array([len(x) for x in sequences])
        return training_batches(
            sequences,
            lengths - 1 if self.on_inputs else np.full_like(lengths, RESPONSE_TOKENS),
            self.users[np.asarray(numbers) % len(self)],
            pad_id=self.eos_id,
            max_rows=self.max_rows,
            max_tokens=self.max_tokens,
        )


class EvaluationPrompts(Dataset):
    """A prompt with the retriever's candidates for every user whose answer is among them.

    The candidates keep the retriever's order; further prompts of the same user have them in
    random orders. Users come in order of their prompts' length, so that batches waste little
    padding.

    Args:
        data: the data set.
        split: ``val`` or ``test``.
        candidates: of all users in this split.
        prompts: builds the prompts.
        max_history: most items of the history.
        pad_id: fills shorter rows.
        permutations: prompts for each user.
        seed: seed of the random orders.
    """

    def __init__(
        self,
        data: SequenceDataset,
        split: str,
        candidates: Candidates,
        prompts: PromptBuilder,
        *,
        max_history: int,
        pad_id: int,
        permutations: int = 1,
        seed: int = 0,
    ) -> None:
        self.prompts, self.pad_id = prompts, pad_id
        self.permutations, self.seed = permutations, seed
        self.data, self.ends = data, data.history_ends(split)
        self.candidates, self.max_history = candidates, max_history
        users = candidates.retrieved
        order = np.arange(candidates.items.shape[1])
        lengths = np.array([len(self._prompt(user, order)) for user in users], dtype=np.int64)
        self.users = users[np.argsort(lengths, kind="stable")]

    def _prompt(self, user: int, order: np.ndarray) -> np.ndarray:
        start, end = int(self.data.offsets[user]), int(self.ends[user])
        history = self.data.item_ids[max(start, end - self.max_history) : end]
        return self.prompts.encode(history, self.candidates.items[user][order])

    def _order(self, user: int, permutation: int) -> np.ndarray:
        """(C,) which candidate stands at each label."""
        size = self.candidates.items.shape[1]
        if permutation == 0:
            return np.arange(size)
        return np.random.default_rng([self.seed, user, permutation]).permutation(size)

    def __len__(self) -> int:
        return len(self.users) * self.permutations

    def __getitems__(self, places: list[int]) -> Batch:
        """One batch: ``input_ids`` and ``attention_mask`` (B, L); ``users`` (B,) and ``orders``
        (B, C), which candidate stands at each label, all int64.
        """
        users = [int(self.users[place // self.permutations]) for place in places]
        orders = [self._order(u, place % self.permutations) for u, place in zip(users, places)]
        batch = pad_left([self._prompt(*pair) for pair in zip(users, orders)], self.pad_id)
        return batch | {
            "users": torch.tensor(users),
            "orders": torch.from_numpy(np.stack(orders)),
        }
