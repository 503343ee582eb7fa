"""Prompts made of user and item numbers, and the examples to tune the language model on.

    User 17 clicked: 12 55 98 ; recommend to user 17: 77 3

Users and items are numbered from 1. The response lists further items of the user. As in
``dataloader.prompt``, each item is tokenized only once; prompts are concatenated from token ids,
and pieces meet only where a space follows another character.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from dataloader.prompt import encode_pieces
from dataloader.prompt_batches import Batch, BatchLimits, pad_left, training_batches
from datasets import SequenceDataset
from progress import ProgressBar

_HISTORY = "User {user} clicked:"
_REQUEST = " ; recommend to user {user}:"


class IdPrompts:
    """Builds prompts and responses from user and item numbers.

    Args:
        tokenizer: the language model's tokenizer.
        num_users: number of users.
        num_items: number of items in the catalogue.
        eos_id: end-of-sequence token, which ends a response.
        max_text_len: maximum tokens of a prompt and its response; the oldest items of the history
            are left out.
        max_response_len: maximum tokens of a response, including its end; its last items are left
            out.

    Attributes:
        items: token ids (length,) by item; ``items[0]`` stands for padding and has none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        num_users: int,
        num_items: int,
        eos_id: int,
        max_text_len: int,
        max_response_len: int,
    ) -> None:
        self.tokenizer, self.eos_id = tokenizer, eos_id
        self.max_text_len, self.max_response_len = max_text_len, max_response_len
        users = range(1, num_users + 1)
        encodings = tokenizer.encode_batch([_HISTORY.format(user=user) for user in users])
        self._heads = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        self._requests = encode_pieces(tokenizer, [_REQUEST.format(user=user) for user in users])
        self.items = encode_pieces(tokenizer, ["", *(f" {n}" for n in range(1, num_items + 1))])

    def encode(self, user: int, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids of the prompt, with the most recent items that fit.

        Args:
            user: index of the user, from 0.
            history: items, oldest first.

        Returns:
            (length,) int64, including the special tokens that the tokenizer prepends.
        """
        head, request = self._heads[user], self._requests[user]
        room = self.max_text_len - self.max_response_len - len(head) - len(request)
        recent_first = self._fitting(reversed(history), room)
        return np.concatenate([head, *reversed(recent_first), request])

    def encode_response(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids (length,) int64 of the first items that fit and the end-of-sequence token."""
        return np.concatenate([*self._fitting(items, self.max_response_len - 1), [self.eos_id]])

    def _fitting(self, items: Iterable[int], room: int) -> list[np.ndarray]:
        """Token ids of the first items that fit in ``room`` tokens, and of one item at least."""
        pieces: list[np.ndarray] = []
        for item in items:
            room -= len(self.items[item])
            if room < 0 and pieces:
                break
            pieces.append(self.items[item])
        return pieces

    def text(self, user: int, history: Sequence[int] | np.ndarray) -> str:
        """The prompt as text, with the entire history."""
        items = "".join(f" {item}" for item in history)
        return f"{_HISTORY.format(user=user + 1)}{items}{_REQUEST.format(user=user + 1)}"


def training_history(data: SequenceDataset, user: int) -> np.ndarray:
    """The user's training items (h,) in chronological order.

    Prompts are built from these alone: held-out items never reach the language model.
    """
    return data.item_ids[data.offsets[user] : data.history_ends("train")[user]]


class TrainingExamples(Dataset):
    """Prompts with some of a user's training items and responses with later ones.

    In each epoch a user has one *global* example, the entire training history split at a random
    position, and several *local* examples, a random subset of the history split in half. Items stay
    in chronological order. An example depends only on the seed and its number; numbers continue
    from epoch to epoch, so that each epoch draws new examples.

    Args:
        data: the data set; users with a single training item are skipped.
        prompts: the prompt builder.
        local_examples: local examples per user and epoch.
        local_items: items of a local example.
        limits: how large the micro-batches get.
        seed: random seed.
    """

    def __init__(
        self,
        data: SequenceDataset,
        prompts: IdPrompts,
        *,
        local_examples: int,
        local_items: int,
        limits: BatchLimits,
        seed: int,
    ) -> None:
        self.data, self.prompts = data, prompts
        self.local_items, self.limits, self.seed = local_items, limits, seed
        lengths = data.history_ends("train") - data.offsets[:-1]
        self.users = np.repeat(np.flatnonzero(lengths > 1), 1 + local_examples)
        self.is_global = np.arange(len(self.users)) % (1 + local_examples) == 0

    def __len__(self) -> int:
        return len(self.users)

    def example(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The user, the history (h,) and the items of the response (r,); h and r are at least 1."""
        rng = np.random.default_rng([self.seed, number])
        index = number % len(self)
        user = int(self.users[index])
        items = training_history(self.data, user)
        if self.is_global[index]:
            cut = int(rng.integers(1, len(items)))
        else:
            size = min(self.local_items, len(items))
            items = items[np.sort(rng.choice(len(items), size, replace=False))]
            cut = (size + 1) // 2
        return user, items[:cut], items[cut:]

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """Micro-batches of one optimizer step; see ``dataloader.prompt_batches.training_batches``.

        The loss covers the response only.
        """
        sequences, num_targets = [], []
        for number in numbers:
            user, history, items = self.example(number)
            response = self.prompts.encode_response(items)
            sequences.append(np.append(self.prompts.encode(user, history), response))
            num_targets.append(len(response))
        return training_batches(
            sequences,
            np.array(num_targets),
            self.users[np.asarray(numbers) % len(self)],
            pad_id=self.prompts.eos_id,
            limits=self.limits,
        )


class GenerationPrompts:
    """One prompt per user with the training history, in batches of similar length.

    Args:
        data: the data set.
        prompts: the prompt builder.
        batch_size: users in a batch; the last batch may be smaller.

    Attributes:
        prompts: token ids (length,) by user.
        batches: users (B,) by batch, the longest prompts first.
    """

    def __init__(self, data: SequenceDataset, prompts: IdPrompts, batch_size: int) -> None:
        self.pad_id = prompts.eos_id
        users = ProgressBar(range(data.num_users), desc="prompts", unit="user")
        self.prompts = [prompts.encode(user, training_history(data, user)) for user in users]
        order = np.argsort([-len(prompt) for prompt in self.prompts], kind="stable")
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Batch]:
        """Users (B,) of a batch, and their ``input_ids`` and ``attention_mask``, (B, L) each."""
        users = self.batches[index]
        return users, pad_left([self.prompts[user] for user in users], self.pad_id)
