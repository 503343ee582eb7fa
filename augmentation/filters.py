"""From written text to interactions: what is no item, what the user has, what is implausible."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from tqdm import tqdm

from augmentation.generation import Written
from augmentation.merge import Interactions
from augmentation.prompts import training_history
from dataloader.retriever import Histories
from dataloader.sampler import evaluation_loader
from datasets import SequenceDataset
from model.retriever import load_retriever
from trainer.retriever import answer_ranks, score_histories

BATCH_SIZE = 256
REASONS = ("cut", "malformed", "unknown", "had", "repeated", "implausible")
_SEPARATORS = re.compile(r"[\s,;]+")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")


def parse_items(written: Written, num_items: int) -> tuple[list[int], Counter[str]]:
    """The items of the catalogue in a text of any kind, and how much else it held, by reason.

    ``cut`` is the last word of a text that the model did not end, as it may be half a number;
    ``malformed`` is no whole number as it is written here; ``unknown`` is a number that no item
    has.
    """
    words = [word for word in _SEPARATORS.split(written.text) if word]
    dropped: Counter[str] = Counter()
    if words and not written.ended:
        words.pop()
        dropped["cut"] += 1
    items = []
    for word in words:
        if not _NUMBER.fullmatch(word):
            dropped["malformed"] += 1
        elif int(word) > num_items:
            dropped["unknown"] += 1
        else:
            items.append(int(word))
    return items, dropped


def first_filter(
    written: dict[int, Written], data: SequenceDataset
) -> tuple[Interactions, Counter[str]]:
    """Items of the catalogue that the user has not had in training, each once.

    Held-out items are not looked at: an item written for a user who has it in validation or test
    stays.
    """
    users: list[int] = []
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for user in sorted(written):
        items, reasons = parse_items(written[user], data.num_items)
        dropped += reasons
        had = set(training_history(data, user).tolist())
        seen: set[int] = set()
        for item in items:
            if item in had:
                dropped["had"] += 1
            elif item in seen:
                dropped["repeated"] += 1
            else:
                seen.add(item)
                users.append(user)
                kept.append(item)
    return Interactions(np.array(users, np.int32), np.array(kept, np.int32)), dropped


class Judgement(NamedTuple):
    """A retriever's ranks in the catalogue without the user's training items, from 1.

    Attributes:
        ranks: (n,) of the interactions.
        val_ranks: (num_users,) of the validation answers.
    """

    ranks: np.ndarray
    val_ranks: np.ndarray


@torch.inference_mode()
def judge(
    retriever_dir: Path, data: SequenceDataset, interactions: Interactions, device: torch.device
) -> Judgement:
    """Let a trained retriever rank the interactions after each user's training items.

    Raises:
        UserError: the folder holds no retriever of this data.
    """
    retriever = load_retriever(retriever_dir, data.num_items)
    model = retriever.model.to(device)
    histories = Histories(data, "val", retriever.max_len, retriever.mask_token)
    starts = np.searchsorted(interactions.users, np.arange(data.num_users + 1))
    ranks = np.empty(len(interactions.users), dtype=np.int64)
    answers, val_ranks = data.answers("val"), np.empty(data.num_users, dtype=np.int64)
    first = 0
    for batch in tqdm(evaluation_loader(histories, BATCH_SIZE, 0), desc="judge", unit="batch"):
        batch = send_to_device(batch, device)
        scores = score_histories(model, batch, mask_history=True)
        last = first + len(scores)
        for user, row in enumerate(scores, first):
            written = slice(starts[user], starts[user + 1])
            asked = torch.from_numpy(np.append(interactions.items[written], answers[user]))
            asked = asked.to(device, torch.int64)
            found = answer_ranks(row.expand(len(asked), -1), asked).cpu().numpy()
            ranks[written], val_ranks[user] = found[:-1], found[-1]
        first = last
    return Judgement(ranks, val_ranks)


def plausible_rank(val_ranks: np.ndarray, share: float) -> int:
    """The lowest rank that lets this share of the validation answers through."""
    return int(np.quantile(val_ranks, share, method="inverted_cdf"))
