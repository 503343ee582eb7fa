"""From generated texts to interactions: parsing, filtering, and plausibility by a retriever."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from augmentation.generation import GeneratedText
from augmentation.merge import Interactions
from augmentation.prompts import training_history
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories
from datasets import SequenceDataset
from evaluation.retrieval import rank_interactions
from model.registry import load_retriever

BATCH_SIZE = 256
# Why a word is dropped, in the order of the filters; "had": the user's history contains the item.
REASONS = ("cut", "malformed", "unknown", "had", "repeated", "implausible")
_SEPARATORS = re.compile(r"[\s,;]+")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")


def parse_items(
    generated: GeneratedText, num_items: int, prefix: str = ""
) -> tuple[list[int], Counter[str]]:
    """Parse any text as a list of item numbers.

    Args:
        generated: the text.
        num_items: number of items in the catalogue.
        prefix: what precedes each number.

    Returns:
        The items of the catalogue in the order of the text, repeats included, and the number of
        dropped words by reason: ``cut``, the last word of a text that the model did not end, which
        may be part of a number; ``malformed``, anything but the prefix and a whole number without
        leading zeros; ``unknown``, a number above ``num_items``.
    """
    words = [word for word in _SEPARATORS.split(generated.text) if word]
    dropped: Counter[str] = Counter()
    if words and not generated.ended:
        words.pop()
        dropped["cut"] += 1
    items = []
    for word in words:
        number = word.removeprefix(prefix)
        if not word.startswith(prefix) or not _NUMBER.fullmatch(number):
            dropped["malformed"] += 1
        elif int(number) > num_items:
            dropped["unknown"] += 1
        else:
            items.append(int(number))
    return items, dropped


def extract_interactions(
    texts: dict[int, GeneratedText], data: SequenceDataset, prefix: str = ""
) -> tuple[Interactions, Counter[str]]:
    """Extract each user's interactions with items that are not in the training history.

    Held-out items are never read: a generated item that is the user's validation or test item is
    kept, since the filter must not reveal which items are held out.

    Args:
        texts: generated texts by user.
        data: the data set.
        prefix: see ``parse_items``.

    Returns:
        The interactions, and the number of dropped words by reason: those of ``parse_items``;
        ``had``, in the user's training history; and ``repeated``, earlier in the same text.
    """
    users: list[int] = []
    new_items: list[int] = []
    dropped: Counter[str] = Counter()
    for user in sorted(texts):
        items, reasons = parse_items(texts[user], data.num_items, prefix)
        dropped += reasons
        history = set(training_history(data, user).tolist())
        seen: set[int] = set()
        for item in items:
            if item in history:
                dropped["had"] += 1
            elif item in seen:
                dropped["repeated"] += 1
            else:
                seen.add(item)
                users.append(user)
                new_items.append(item)
    return Interactions(np.array(users, np.int32), np.array(new_items, np.int32)), dropped


def judge(
    retriever_dir: Path, data: SequenceDataset, interactions: Interactions, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the item of each interaction with a trained retriever, given the training history.

    Ranks are 1-based, among all items outside the user's training history.

    Args:
        retriever_dir: run folder of the retriever.
        data: the data set that the retriever was trained on.
        interactions: the interactions to rank.
        device: where the retriever runs.

    Returns:
        Ranks (n,) int64 of the interactions and (num_users,) int64 of the validation targets.

    Raises:
        InputError: the retriever cannot be loaded.
    """
    retriever = load_retriever(retriever_dir, data.num_items).to(device)
    spec = retriever.spec
    histories = Histories(data, "val", spec.max_len, spec.mask_token)
    loader = evaluation_loader(histories, BATCH_SIZE, 0)
    return rank_interactions(retriever, loader, *interactions, "judge")


def plausible_rank(target_ranks: np.ndarray, share: float) -> int:
    """The smallest rank within which this share of the validation targets is ranked."""
    return int(np.quantile(target_ranks, share, method="inverted_cdf"))
