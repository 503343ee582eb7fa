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
    users, user_names = _number_names(table["user"])
    items, item_names = _number_names(table["item"])
    timestamps = table["timestamp"].to_numpy()
    order = np.lexsort((items, timestamps, users))  # equal rows stay in the order of the file
    kept = ~_repeated(users, items, timestamps, order)
    if not kept.all():
        print(f"note: {code}: dropped {(~kept).sum():,} duplicate interactions", file=sys.stderr)
    kept[kept] = k_core(users[kept], items[kept], filters.min_uc, filters.min_sc)
    if not kept.any():
        raise InputError(
            f"{code}: no interactions remain with at least {filters.min_uc} per user and "
            f"{filters.min_sc} per item"
        )
    if filters.ties == "file":
        order = np.lexsort((timestamps, users))
    order = order[kept[order]]
    # Renumber without gaps; the order of the names stays.
    user_counts = np.bincount(users[order], minlength=len(user_names))
    in_core = np.bincount(items[order], minlength=len(item_names)) > 0
    item_ids = np.cumsum(in_core, dtype=np.int32)[items[order]]
    offsets = np.concatenate([[0], np.cumsum(user_counts[user_counts > 0])]).astype(np.int64)
    titles = ["", *(raw.titles[name] for name in item_names[in_core])]
    return SequenceDataset(
        code=code,
        item_ids=item_ids,
        offsets=offsets,
        titles=titles,
        user_names=list(user_names[user_counts > 0]),
        item_names=["", *item_names[in_core]],
        fingerprint=_fingerprint(item_ids, offsets, titles),
        num_tied_targets=_num_tied_targets(timestamps[order], offsets),
    )


def _repeated(
    users: np.ndarray, items: np.ndarray, timestamps: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """(n,) bool, true for the interactions that equal the one before them in ``order``."""
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for values in (users, items, timestamps):
        ordered = values[order]
        same &= ordered[1:] == ordered[:-1]
    repeated = np.zeros(len(order), dtype=bool)
    repeated[order[1:]] = same
    return repeated


def _num_tied_targets(timestamps: np.ndarray, offsets: np.ndarray) -> int:
    """Count the users whose last two interactions have the same time."""
    last = offsets[1:][np.diff(offsets) > 1] - 1
    return int((timestamps[last] == timestamps[last - 1]).sum())


def _select_interactions(code: str, raw: RawData, filters: Filters) -> pd.DataFrame:
    """Drop low ratings and items without a title."""
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
    kept = ~is_low & table["item"].isin(raw.titles.keys())
    return table if kept.all() else table[kept]


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
