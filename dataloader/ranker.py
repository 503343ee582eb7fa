"""Prompts for the ranker, made when a batch needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dataloader.candidates import Candidates
from dataloader.prompt import PromptBuilder
from datasets import SequenceDataset

Batch = dict[str, Any]


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


class TrainingPrompts(Dataset):
    """A prompt for every training interaction but each user's first.

    The candidates are the answer and sampled items that the user has not had before, shuffled.
    They depend on the seed and the example's number alone; numbers go on from epoch to epoch, so
    that every epoch samples anew.

    Args:
        data: the data set.
        prompts: builds the prompts.
        num_negatives: sampled candidates.
        max_history: most items of the history.
        micro_batch_size: prompts that pass through the model at once.
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
        max_history: int,
        micro_batch_size: int,
        eos_id: int,
        on_inputs: bool,
        seed: int,
    ) -> None:
        self.item_ids, self.num_items = data.item_ids, data.num_items
        self.prompts, self.num_negatives, self.max_history = prompts, num_negatives, max_history
        self.micro_batch_size, self.eos_id = micro_batch_size, eos_id
        self.on_inputs, self.seed = on_inputs, seed
        counts = np.maximum(data.history_ends("train") - data.offsets[:-1] - 1, 0)
        self.ends = np.cumsum(counts)  # examples of the users up to and including each
        self.first_answers = data.offsets[:-1] + 1

    def __len__(self) -> int:
        return int(self.ends[-1])

    def example(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """History (h,), candidates (c,) and the answer's place among them."""
        rng = np.random.default_rng([self.seed, number])
        number %= len(self)
        user = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[user - 1]) if user else 0
        start = int(self.first_answers[user]) - 1
        answer_at = int(self.first_answers[user]) + number - before
        history, answer = self.item_ids[start:answer_at], self.item_ids[answer_at]
        excluded = np.append(history, answer)
        negatives = sample_negatives(rng, self.num_items, excluded, self.num_negatives)
        candidates = rng.permutation(np.append(negatives, answer))
        place = int(np.flatnonzero(candidates == answer)[0])
        return history[-self.max_history :], candidates, place

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """Micro-batches of one optimizer step, longest prompts first to waste little padding."""
        sequences = []
        for number in numbers:
            history, candidates, place = self.example(number)
            prompt = self.prompts.encode(history, candidates)
            sequences.append(np.append(prompt, [self.prompts.label_ids[place], self.eos_id]))
        sequences.sort(key=len, reverse=True)
        groups = [
            sequences[i : i + self.micro_batch_size]
            for i in range(0, len(sequences), self.micro_batch_size)
        ]
        targets = [sum(len(x) - 1 if self.on_inputs else 2 for x in group) for group in groups]
        return [
            pad_left(group, self.eos_id) | {"weight": n / sum(targets)}
            for group, n in zip(groups, targets)
        ]


class EvaluationPrompts(Dataset):
    """A prompt with the retriever's candidates for every user whose answer is among them.

    The candidates keep the retriever's order. Users come in order of their prompts' length, so
    that batches waste little padding.

    Args:
        data: the data set.
        split: ``val`` or ``test``.
        candidates: of all users in this split.
        prompts: builds the prompts.
        max_history: most items of the history.
        pad_id: fills shorter rows.
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
    ) -> None:
        self.prompts, self.pad_id = prompts, pad_id
        self.data, self.ends = data, data.history_ends(split)
        self.candidates, self.max_history = candidates, max_history
        users = candidates.retrieved
        lengths = np.array([len(self._prompt(user)) for user in users], dtype=np.int64)
        self.users = users[np.argsort(lengths, kind="stable")]

    def _prompt(self, user: int) -> np.ndarray:
        start, end = int(self.data.offsets[user]), int(self.ends[user])
        history = self.data.item_ids[max(start, end - self.max_history) : end]
        return self.prompts.encode(history, self.candidates.items[user])

    def __len__(self) -> int:
        return len(self.users)

    def __getitems__(self, places: list[int]) -> Batch:
        """One batch: ``input_ids`` and ``attention_mask`` (B, L), ``users`` (B,) int64."""
        users = self.users[places]
        batch = pad_left([self._prompt(user) for user in users], self.pad_id)
        return batch | {"users": torch.from_numpy(users)}
