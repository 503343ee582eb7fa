"""Prompts made of user and item numbers, and the examples to tune the language model on.

    User 17 clicked: 12 55 98 ; recommend to user 17: 77 3

Users and items are numbered from 1. The response lists further items of the user. As in
``dataloader.prompt``, each item is tokenized only once; prompts are concatenated from token ids,
and pieces meet only where a space follows another character. ``PublishedPrompts`` has the wording
of LLM4IDRec's code instead (https://github.com/newlei/LLM4IDRec).
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
_PUBLISHED = (
    "Given the user(u{user})'s clicked list items:{items}, predict what is the list items to "
    "recommend to the user(u{user}). Please only answer the item IDs."
)


class IdPrompts:
    """Builds prompts and responses from user and item numbers.

    Args:
        tokenizer: the language model's tokenizer.
        num_users: number of users.
        num_items: number of items in the catalogue.
        eos_id: end-of-sequence token, which ends a response.
        max_text_len: maximum number of tokens in a prompt and its response; if it is exceeded, the
            oldest items of the history are left out.
        max_response_len: maximum number of tokens in a response, including its end; if it is
            exceeded, its last items are left out.

    Attributes:
        first_items: token ids (length,) of each item at the start of a response; item 0 stands for
            padding and has none.
        later_items: token ids (length,) of each item after another one.
        prefix: what precedes the number of an item.
    """

    prefix = ""

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
        self._encode_numbers(num_users, num_items)

    def _encode_numbers(self, num_users: int, num_items: int) -> None:
        """Tokenize the pieces of prompts and responses."""
        tokenizer, users = self.tokenizer, range(1, num_users + 1)
        encodings = tokenizer.encode_batch([_HISTORY.format(user=user) for user in users])
        self._heads = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        self._requests = encode_pieces(tokenizer, [_REQUEST.format(user=user) for user in users])
        self.items = encode_pieces(tokenizer, ["", *(f" {n}" for n in range(1, num_items + 1))])
        self.first_items = self.later_items = self.items

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

    def encode_example(
        self, user: int, history: Sequence[int] | np.ndarray, items: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Token ids (length,) int64 of prompt and response, and the number of response tokens."""
        response = self.encode_response(items)
        return np.append(self.encode(user, history), response), len(response)

    def _fitting(self, items: Iterable[int], room: int) -> list[np.ndarray]:
        """Token ids of the first items that fit in ``room`` tokens, but of at least one item."""
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


class PublishedPrompts(IdPrompts):
    """Prompts and responses worded, tokenized and cut as in LLM4IDRec's code.

    Given the user(u17)'s clicked list items:i12,i55,i98, predict ... to the user(u17). ...

    The response is ``i77,i3``. Whatever exceeds ``max_text_len`` is cut on the right, even within a
    number: the end of the response and, if the history is long, the end of the prompt too.
    Generated tokens do not count towards the limit. The arguments are those of ``IdPrompts``.
    """

    prefix = "i"

    def _encode_numbers(self, num_users: int, num_items: int) -> None:
        """Tokenize the items; each prompt is tokenized as a whole."""
        names = [f"i{n}" for n in range(1, num_items + 1)]
        self.first_items = [np.zeros(0, np.int64), *map(self._encode_response_text, names)]
        pieces = ["", *(f",{name}" for name in names)]
        self.later_items = encode_pieces(self.tokenizer, pieces, "i1")

    def encode(self, user: int, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids (length,) int64 of the prompt, including prepended special tokens."""
        ids = self.tokenizer.encode(self.text(user, history)).ids
        return np.array(ids[: self.max_text_len], dtype=np.int64)

    def encode_response(self, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids (length,) int64 of all items and the end-of-sequence token."""
        return np.append(self._encode_response_text(_listed(items)), self.eos_id)

    def encode_example(
        self, user: int, history: Sequence[int] | np.ndarray, items: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Token ids (length,) int64 of prompt and response, and the number of response tokens.

        The number is at least 1, even if the whole response is cut.
        """
        prompt = self.encode(user, history)
        tokens = np.append(prompt, self.encode_response(items))[: self.max_text_len]
        return tokens, max(len(tokens) - len(prompt), 1)

    def text(self, user: int, history: Sequence[int] | np.ndarray) -> str:
        """The prompt as text, with the entire history."""
        return _PUBLISHED.format(user=user + 1, items=_listed(history))

    def _encode_response_text(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _listed(items: Sequence[int] | np.ndarray) -> str:
    return ",".join(f"i{item}" for item in items)


def training_history(data: SequenceDataset, user: int) -> np.ndarray:
    """The user's training items (h,) in chronological order.

    Prompts are built from these alone: held-out items never reach the language model.
    """
    return data.item_ids[data.offsets[user] : data.history_ends("train")[user]]


class TrainingExamples(Dataset):
    """Prompts with some of a user's training items, and responses with further ones.

    In each epoch a user has *global* examples, the entire training history split at a random
    position, and *local* examples, a random subset of the history split in half. An example depends
    only on the seed and its number. Numbers continue from epoch to epoch, so each epoch draws new
    examples.

    Args:
        data: the data set; users with ``min_targets`` training items or fewer are skipped.
        prompts: the prompt builder.
        global_examples: global examples per user and epoch.
        local_examples: local examples per user and epoch.
        local_items: maximum number of items in a local example.
        min_targets: minimum number of items in the response of a global example.
        in_order: keep the items in chronological order; they are shuffled otherwise.
        on_inputs: whether the loss covers the prompt as well as the response.
        limits: limits on the micro-batches.
        seed: random seed.
    """

    def __init__(
        self,
        data: SequenceDataset,
        prompts: IdPrompts,
        *,
        global_examples: int = 1,
        local_examples: int,
        local_items: int,
        min_targets: int = 1,
        in_order: bool = True,
        on_inputs: bool = False,
        limits: BatchLimits,
        seed: int,
    ) -> None:
        self.data, self.prompts = data, prompts
        self.local_items, self.min_targets = local_items, min_targets
        self.in_order, self.on_inputs = in_order, on_inputs
        self.limits, self.seed = limits, seed
        lengths = data.history_ends("train") - data.offsets[:-1]
        per_user = global_examples + local_examples
        self.users = np.repeat(np.flatnonzero(lengths > min_targets), per_user)
        self.is_global = np.arange(len(self.users)) % per_user < global_examples

    def __len__(self) -> int:
        return len(self.users)

    def example(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The user, the history (h,) and the items of the response (r,); h and r are at least 1."""
        rng = np.random.default_rng([self.seed, number])
        index = number % len(self)
        user = int(self.users[index])
        items = training_history(self.data, user)
        if not self.in_order:
            items = rng.permutation(items)
        if self.is_global[index]:
            cut = int(rng.integers(1, len(items) - self.min_targets + 1))
        else:
            size = min(self.local_items, len(items))
            items = items[np.sort(rng.choice(len(items), size, replace=False))]
            cut = (size + 1) // 2
        return user, items[:cut], items[cut:]

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """Micro-batches of a step; see ``dataloader.prompt_batches.training_batches``."""
        sequences, num_targets = [], []
        for number in numbers:
            tokens, response_len = self.prompts.encode_example(*self.example(number))
            sequences.append(tokens)
            num_targets.append(len(tokens) - 1 if self.on_inputs else response_len)
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
        batch_size: maximum number of users in a batch.
        max_tokens: maximum number of tokens in a batch, with padding and responses, or None; a user
            who needs more forms a batch alone.

    Attributes:
        histories: training items (h,) of each user.
        prompts: token ids (length,) of each user's prompt.
        batches: users (B,) of each batch, the longest prompts first.
    """

    def __init__(
        self,
        data: SequenceDataset,
        prompts: IdPrompts,
        batch_size: int,
        max_tokens: int | None = None,
    ) -> None:
        self.pad_id = prompts.eos_id
        self.histories = [training_history(data, user) for user in range(data.num_users)]
        histories = ProgressBar(self.histories, desc="prompts", unit="user")
        self.prompts = [prompts.encode(user, history) for user, history in enumerate(histories)]
        order = np.argsort([-len(prompt) for prompt in self.prompts], kind="stable")
        self.batches: list[np.ndarray] = []
        while len(order):
            size = batch_size
            if max_tokens is not None:
                longest = len(self.prompts[order[0]]) + prompts.max_response_len
                size = max(1, min(size, max_tokens // longest))
            self.batches.append(order[:size])
            order = order[size:]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[np.ndarray, Batch]:
        """Users (B,) of a batch, and their ``input_ids`` and ``attention_mask``, (B, L) each."""
        users = self.batches[index]
        return users, pad_left([self.prompts[user] for user in users], self.pad_id)
