"""Preprocessing: from raw interactions to numbered chronological sequences.

Follows section 4.0.1 of the LlamaRec paper and reproduces the statistics of its Table 2.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from datasets.base import Filters, RawData, SequenceDataset
from errors import ArgumentError, InputError

COUNTED_AT_ONCE = 1 << 24


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
        enough = (_counts(users, in_core) >= min_uc)[users]
        enough &= (_counts(items, in_core) >= min_sc)[items]
        if enough[in_core].all():
            return in_core
        in_core &= enough


def _counts(codes: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(max + 1,) occurrences of each code (n,) where ``counted`` (n,) is true."""
    counts = np.zeros(codes.max(initial=0) + 1, dtype=np.int64)
    for start in range(0, len(codes), COUNTED_AT_ONCE):  # bincount makes its input int64
        block = slice(start, start + COUNTED_AT_ONCE)
        counts += np.bincount(codes[block][counted[block]], minlength=len(counts))
    return counts


def build(code: str, raw: RawData, filters: Filters) -> SequenceDataset:
    """Filter raw interactions, number users and items, and sort each user's items by time.

    Raises:
        ArgumentError: ``min_rating`` is set, but the data has no ratings.
        InputError: no interactions remain.
    """
    table = _select_interactions(code, raw, filters)
    users, user_names = _number_names(table["user"])
    items, item_names = _number_names(table["item"])
    timestamps, title_of = table["timestamp"].to_numpy(), raw.titles
    del table, raw  # gigabytes in a large data set
    order = _sorted(users, timestamps, items)
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
        order = _sorted(users, timestamps)
    order = order[kept[order]]
    # Renumber without gaps, in the same order.
    user_counts = np.bincount(users[order], minlength=len(user_names))
    items = items[order]
    in_core = np.bincount(items, minlength=len(item_names)) > 0
    item_ids = np.cumsum(in_core, dtype=np.int32)[items]
    offsets = np.concatenate([[0], np.cumsum(user_counts[user_counts > 0])]).astype(np.int64)
    kept_items = item_names.filter(pa.array(in_core)).to_pylist()
    titles = ["", *(title_of[name] for name in kept_items)]
    return SequenceDataset(
        code=code,
        item_ids=item_ids,
        offsets=offsets,
        titles=titles,
        user_names=user_names.filter(pa.array(user_counts > 0)).to_pylist(),
        item_names=["", *kept_items],
        fingerprint=_fingerprint(item_ids, offsets, titles),
        num_tied_targets=_num_tied_targets(timestamps[order], offsets),
    )


def _repeated(
    users: np.ndarray, items: np.ndarray, timestamps: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """(n,) bool, true for each interaction that equals the one before it in ``order``."""
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for values in (users, items, timestamps):
        ordered = values[order]
        same &= ordered[1:] == ordered[:-1]
    repeated = np.zeros(len(order), dtype=bool)
    repeated[order[1:]] = same
    return repeated


def _num_tied_targets(timestamps: np.ndarray, offsets: np.ndarray) -> int:
    """Count the users whose last two interactions have the same timestamp."""
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


def _number_names(names: pd.Series) -> tuple[np.ndarray, pa.Array]:
    """Number the distinct names: by value if all are whole numbers, otherwise by text.

    The numbering decides the order of simultaneous interactions, so it must not depend on the
    order of rows or on hash seeds.

    Returns:
        (n,) int32 code of each name and (num_distinct,) name by code.
    """
    if not isinstance(names.dtype, pd.CategoricalDtype):
        names = pd.Series(pd.Categorical(names))
    codes = names.cat.codes.to_numpy()
    occurs = np.zeros(len(names.cat.categories), dtype=bool)
    occurs[codes] = True
    distinct = pa.array(names.cat.categories, pa.large_string()).filter(pa.array(occurs))
    lengths = pc.utf8_length(distinct)
    # Without leading zeros, whole numbers of equal length sort by value as text does.
    leading_zero = pc.and_(pc.starts_with(distinct, "0"), pc.greater(lengths, 1))
    numeric = pc.and_not(pc.ascii_is_decimal(distinct), leading_zero)
    by = {"length": lengths} if pc.all(numeric).as_py() else {}
    order = _sorted(*by.values(), distinct)
    new_codes = np.empty(len(occurs), np.int32)
    new_codes[np.flatnonzero(occurs)[order]] = np.arange(len(order), dtype=np.int32)
    return new_codes[codes], distinct.take(pa.array(order))


def _sorted(*keys: np.ndarray | pa.Array) -> np.ndarray:
    """(n,) indices that sort rows by the first key, then the others; equal rows keep their order.

    Text is sorted by code points, as in Python. Unlike numpy's ``lexsort``, this sorts once.
    """
    table = pa.table({str(index): key for index, key in enumerate(keys)})
    return pc.sort_indices(
        table, sort_keys=[(name, "ascending") for name in table.column_names]
    ).to_numpy()


def _fingerprint(item_ids: np.ndarray, offsets: np.ndarray, titles: list[str]) -> str:
    digest = hashlib.sha256(item_ids.data)
    digest.update(offsets.data)
    digest.update(json.dumps(titles).encode())
    return digest.hexdigest()
