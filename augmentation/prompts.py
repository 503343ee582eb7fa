"""Prompts made of numbers alone, and the training examples whose answers are a user's own items.

    User 17 clicked: 12 55 98 ; recommend to user 17: 77 3

Users and items go by their numbers, from 1. As in ``dataloader.prompt``, each item is tokenised
once; the pieces meet only where a space follows another character.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer
from torch.utils.data import Dataset
from tqdm import tqdm

from dataloader.prompt import encode_pieces
from dataloader.ranker import Batch, pad_left, training_batches
from datasets import SequenceDataset

_BEGIN = "User {user} clicked:"
_ASK = " ; recommend to user {user}:"


class IdPrompts:
    """Builds prompts and answers from users' and items' numbers.

    Args:
        tokenizer: the LM's tokenizer.
        num_users: number of users.
        num_items: items in the catalogue, numbered from 1.
        eos_id: token that ends an answer.
        max_text_len: longest prompt with its answer in tokens; the oldest history goes first.
        max_answer_len: longest answer in tokens, its end included; its last items go first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        num_users: int,
        num_items: int,
        eos_id: int,
        max_text_len: int,
        max_answer_len: int,
    ) -> None:
        self.tokenizer, self.eos_id = tokenizer, eos_id
        self.max_text_len, self.max_answer_len = max_text_len, max_answer_len
        users = range(1, num_users + 1)
        begins = tokenizer.encode_batch([_BEGIN.format(user=user) for user in users])
        self._begins = [np.array(begin.ids, dtype=np.int64) for begin in begins]
        self._asks = encode_pieces(tokenizer, [_ASK.format(user=user) for user in users])
        self.items = encode_pieces(tokenizer, ["", *(f" {n}" for n in range(1, num_items + 1))])

    def encode(self, user: int, history: Sequence[int]) -> np.ndarray:
        """(length,) token ids of the prompt, without the history that does not fit.

        Args:
            user: the user, counted from 0.
            history: items, oldest first.
        """
        room = self.max_text_len - self.max_answer_len
        room -= len(self._begins[user]) + len(self._asks[user])
        pieces: list[np.ndarray] = []
        for item in reversed(history):
            room -= len(self.items[item])
            if room < 0 and pieces:
                break
            pieces.append(self.items[item])
        return np.concatenate([self._begins[user], *reversed(pieces), self._asks[user]])

    def answer(self, items: Sequence[int]) -> np.ndarray:
        """(length,) token ids of the items that fit, and the end of the sequence."""
        room = self.max_answer_len - 1
        pieces: list[np.ndarray] = []
        for item in items:
            room -= len(self.items[item])
            if room < 0 and pieces:
                break
            pieces.append(self.items[item])
        return np.concatenate([*pieces, [self.eos_id]])

    def text(self, user: int, history: Sequence[int]) -> str:
        """The whole prompt as text."""
        items = "".join(f" {item}" for item in history)
        return f"{_BEGIN.format(user=user + 1)}{items}{_ASK.format(user=user + 1)}"


def training_history(data: SequenceDataset, user: int) -> np.ndarray:
    """(h,) the user's training items in the order of time; nothing else is ever read."""
    return data.item_ids[data.offsets[user] : data.history_ends("train")[user]]


class TrainingExamples(Dataset):
    """Parts of users' training items as prompts, with further ones as answers.

    For each user an epoch has one *global* example, all items cut in two at a random place, and
    several *local* ones, a fixed number of items drawn at random and cut in two halves; all in the
    order of time. Examples depend on the seed and their number alone; numbers go on from epoch to
    epoch.

    Args:
        data: the data set; users with a single training item are left out.
        prompts: builds the prompts.
        local_examples: local examples of a user in an epoch.
        local_items: items of a local example.
        max_rows: most examples that pass through the model at once.
        max_tokens: most tokens that do, if not None.
        seed: seed of all that is random.
    """

    def __init__(
        self,
        data: SequenceDataset,
        prompts: IdPrompts,
        *,
        local_examples: int,
        local_items: int,
        max_rows: int,
        max_tokens: int | None,
        seed: int,
    ) -> None:
        self.data, self.prompts = data, prompts
        self.local_items, self.seed = local_items, seed
        self.max_rows, self.max_tokens = max_rows, max_tokens
        lengths = data.history_ends("train") - data.offsets[:-1]
        self.users = np.repeat(np.flatnonzero(lengths > 1), 1 + local_examples)
        self.is_global = np.arange(len(self.users)) % (1 + local_examples) == 0

    def __len__(self) -> int:
        return len(self.users)

    def example(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The user, history (h,) and answer (a,), neither empty."""
        rng = np.random.default_rng([self.seed, number])
        number %= len(self)
        user = int(self.users[number])
        items = training_history(self.data, user)
        if self.is_global[number]:
            cut = int(rng.integers(1, len(items)))
        else:
            size = min(self.local_items, len(items))
            items = items[np.sort(rng.choice(len(items), size, replace=False))]
            cut = (size + 1) // 2
        return user, items[:cut], items[cut:]

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """Micro-batches of one optimizer step, as of ``dataloader.ranker.training_batches``."""
        sequences, num_targets = [], []
        for number in numbers:
            user, history, answer = self.example(number)
            target = self.prompts.answer(answer)
            sequences.append(np.append(self.prompts.encode(user, history), target))
            num_targets.append(len(target))
        return training_batches(
            sequences,
            np.array(num_targets),
            self.users[np.asarray(numbers) % len(self)],
            pad_id=self.prompts.eos_id,
            max_rows=self.max_rows,
            max_tokens=self.max_tokens,
        )


class GenerationPrompts:
    """A prompt for every user, with the whole training history, in batches of like length.

    Args:
        data: the data set.
        prompts: builds the prompts.
        batch_size: users of a batch.
    """

    def __init__(self, data: SequenceDataset, prompts: IdPrompts, batch_size: int) -> None:
        self.pad_id = prompts.eos_id
        users = tqdm(range(data.num_users), desc="prompts", unit="user", dynamic_ncols=True)
        self.prompts = [prompts.encode(user, training_history(data, user)) for user in users]
        order = np.argsort([-len(prompt) for prompt in self.prompts], kind="stable")
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[np.ndarray, Batch]:
        """Users (B,) and their ``input_ids`` and ``attention_mask`` (B, L), longest batch first."""
        users = self.batches[number]
        return users, pad_left([self.prompts[user] for user in users], self.pad_id)
