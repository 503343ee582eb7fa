"""Functions shared by the tests of ``augmentation``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np
from tokenizers import Tokenizer

from augmentation.merge import Interactions
from augmentation.prompts import IdPrompts, PublishedPrompts
from datasets import SequenceDataset

EOS = 1  # of the tiny Llama


def make_prompts(
    tokenizer: Tokenizer,
    data: SequenceDataset,
    *,
    max_text_len: int = 512,
    max_response_len: int = 100,
    builder: type[IdPrompts] = IdPrompts,
) -> IdPrompts:
    """Make the prompt builder of a data set."""
    return builder(
        tokenizer,
        num_users=data.num_users,
        num_items=data.num_items,
        eos_id=EOS,
        max_text_len=max_text_len,
        max_response_len=max_response_len,
    )


make_published_prompts = partial(make_prompts, builder=PublishedPrompts)


def shift_held_out(data: SequenceDataset, splits: Iterable[str]) -> SequenceDataset:
    """Give each user the held-out items of another user."""
    items = data.item_ids.copy()
    for split in splits:
        items[data.history_ends(split)] = np.roll(data.targets(split), 1)
    return replace(data, item_ids=items)


def random_interactions(data: SequenceDataset, size: int, seed: int) -> Interactions:
    """Draw interactions of random users with random items."""
    rng = np.random.default_rng(seed)
    users = np.sort(rng.integers(0, data.num_users, size)).astype(np.int32)
    return Interactions(users, rng.integers(1, data.num_items + 1, size).astype(np.int32))
