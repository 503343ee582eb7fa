"""Data sets by code, from raw files to numbered chronological sequences.

This package is unrelated to the Hugging Face library of the same name, which is not used here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datasets import amazon, custom, movielens
from datasets.base import Filters, RawSource, SequenceDataset
from datasets.cache import build_cached
from errors import ArgumentError

__all__ = ["SequenceDataset", "load_dataset"]

_SOURCES: dict[str, Callable[[Path], RawSource]] = {
    "ml-100k": movielens.latest_small,
    "ml-100k-classic": movielens.classic,
    "beauty": amazon.beauty,
    "games": amazon.games,
}


def load_dataset(
    code: str,
    *,
    data_root: str,
    cache_root: str,
    filters: Filters,
    interactions: str | None = None,
    items: str | None = None,
) -> SequenceDataset:
    """Load a data set; download and preprocess it the first time.

    Args:
        code: ``ml-100k``, ``ml-100k-classic``, ``beauty``, ``games`` or ``custom``.
        data_root: folder of raw files; those of a data set are in ``<data_root>/<code>``.
        cache_root: folder of preprocessed data.
        filters: which interactions to keep.
        interactions: interactions file of a custom data set.
        items: titles file of a custom data set.

    Raises:
        ArgumentError: ``code`` is unknown, a custom data set's files are not given, or
            ``min_rating`` is set for data without ratings.
        InputError: the filters leave no interactions.
        UserError: raw files are missing, cannot be downloaded or cannot be used.
    """
    return build_cached(
        _find_source(code, Path(data_root), interactions, items), filters, Path(cache_root)
    )


def _find_source(
    code: str, data_root: Path, interactions: str | None, items: str | None
) -> RawSource:
    if code == "custom":
        if not interactions or not items:
            raise ArgumentError("code", code, "needs a file of interactions and a file of items")
        return custom.source(Path(interactions), Path(items))
    if code not in _SOURCES:
        raise ArgumentError("code", code, f"use one of {', '.join([*_SOURCES, 'custom'])}")
    return _SOURCES[code](data_root / code)
