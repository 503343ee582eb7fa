"""Preprocessing: from raw interactions to numbered chronological sequences.

Follows section 4.0.1 of the LlamaRec paper and reproduces the statistics of its Table 2.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pandas as pd

from datasets.base import Filters, RawData, SequenceDataset
from errors import ArgumentError, InputError


def k_core(users: np.ndarray, items: np.ndarray, min_uc: int, min_sc: int) -> np.ndarray:
    """Find the largest set of interactions with enough interactions per user and per item.

    Args:
        users: (n,) user codes from 0.
        items: (n,) item codes from 0.
        min_uc: minimum number of interactions per user.
        min_sc: minimum number of interactions per item.

    Returns:
        (n,) bool, true for the interactions in the set.
    """
    in_core = np.ones(len(users), dtype=bool)
    while True:  # each removal can push other users and items below the minimum
        user_counts = np.bincount(users[in_core], minlength=users.max(initial=0) + 1)
        item_counts = np.bincount(items[in_core], minlength=items.max(initial=0) + 1)
        enough = (user_counts[users] >= min_uc) & (item_counts[items] >= min_sc)
        if enough[in_core].all():
            return in_core
        in_core &= enough


def build(code: str, raw: RawData, filters: Filters) -> SequenceDataset:
    """Filter raw interactions, number users and items, and sort each user's by time.

    Raises:
        ArgumentError: ``min_rating`` is set, but the data has no ratings.
        InputError: no interactions remain.
    """
    table = _select_interactions(code, raw, filters)
    user_codes, user_names = _number_names(table["user"])
    item_codes, item_names = _number_names(table["item"])
    in_core = k_core(user_codes, item_codes, filters.min_uc, filters.min_sc)
    if not in_core.any():
        raise InputError(
            f"{code}: no interactions remain with at least {filters.min_uc} per user and "
            f"{filters.min_sc} per item"
        )
    # Renumber without gaps; the order of the names stays.
    remaining_users, users = np.unique(user_codes[in_core], return_inverse=True)
    remaining_items, items = np.unique(item_codes[in_core], return_inverse=True)
    timestamps = table["timestamp"].to_numpy()[in_core]
    ties = items if filters.ties == "item" else np.arange(len(items))
    order = np.lexsort((ties, timestamps, users))
    item_ids = (items[order] + 1).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))]).astype(np.int64)
    item_names = item_names[remaining_items]
    titles = ["", *(raw.titles[name] for name in item_names)]
    return SequenceDataset(
        code=code,
        item_ids=item_ids,
        offsets=offsets,
        titles=titles,
        user_names=list(user_names[remaining_users]),
        item_names=["", *item_names],
        fingerprint=_fingerprint(item_ids, offsets, titles),
        num_tied_targets=_num_tied_targets(timestamps[order], offsets),
    )


def _num_tied_targets(timestamps: np.ndarray, offsets: np.ndarray) -> int:
    """Count the users whose last two interactions have the same time."""
    last = offsets[1:][np.diff(offsets) > 1] - 1
    return int((timestamps[last] == timestamps[last - 1]).sum())


def _select_interactions(code: str, raw: RawData, filters: Filters) -> pd.DataFrame:
    """Drop low ratings, items without a title and duplicates."""
    table = raw.interactions
    if filters.min_rating and np.isinf(table["rating"]).all():
        raise ArgumentError("min_rating", f"{filters.min_rating:g}", f"{code} has no ratings")
    is_low = table["rating"] < filters.min_rating
    if is_low.any() and not filters.min_rating:  # otherwise it was asked for
        print(
            f"note: {code}: dropped {is_low.sum():,} of {len(table):,} interactions with a "
            "negative rating",
            file=sys.stderr,
        )
    table = table[~is_low & table["item"].isin(raw.titles.keys())]
    is_duplicate = table.duplicated(["user", "item", "timestamp"])
    if is_duplicate.any():
        print(
            f"note: {code}: dropped {is_duplicate.sum():,} duplicate interactions", file=sys.stderr
        )
        table = table[~is_duplicate]
    return table


def _number_names(names: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct names: by value if all are whole numbers, otherwise by text.

    The numbering decides the order of simultaneous interactions, so it must not depend on the
    order of rows or on hash seeds.

    Returns:
        (n,) code of each name and (num_distinct,) name by code.
    """
    codes, factorized = pd.factorize(names)
    distinct = np.asarray(factorized, dtype=object)
    numeric = all(n.isascii() and n.isdigit() and (n[0] != "0" or n == "0") for n in distinct)
    # Without leading zeros, whole numbers of equal length sort by value as text does.
    keys = [(len(name), name) if numeric else name for name in distinct]
    order = np.array(sorted(range(len(distinct)), key=keys.__getitem__), dtype=np.int64)
    new_codes = np.empty_like(order)
    new_codes[order] = np.arange(len(order))
    return new_codes[codes], distinct[order]


def _fingerprint(item_ids: np.ndarray, offsets: np.ndarray, titles: list[str]) -> str:
    digest = hashlib.sha256(item_ids.tobytes() + offsets.tobytes())
    digest.update(json.dumps(titles).encode())
    return digest.hexdigest()
