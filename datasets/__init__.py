"""Data sets by code, from raw files to numbered chronological sequences.

This folder is the project's own; it is not Hugging Face's library of the same name, which the
project neither needs nor minds.
"""

from __future__ import annotations

from pathlib import Path

from config import UserError
from datasets import amazon, custom, movielens
from datasets.base import Filters, RawSource, SequenceDataset, build_cached

__all__ = ["SequenceDataset", "load_dataset"]


def load_dataset(
    code: str,
    *,
    data_root: str,
    cache_root: str,
    filters: Filters,
    interactions: str | None = None,
    items: str | None = None,
) -> SequenceDataset:
    """Load a data set, downloading and preprocessing it where that has not been done.

    Args:
        code: one of ``config.DATASET_CODES``.
        data_root: folder of raw files; a data set's lie in ``<data_root>/<code>``.
        cache_root: folder of preprocessed data.
        filters: which interactions stay.
        interactions: file of a custom data set.
        items: file of titles of a custom data set.

    Raises:
        UserError: raw files are missing, cannot be fetched or cannot be used.
    """
    folder = Path(data_root, code)
    sources: dict[str, RawSource] = {
        "ml-100k": movielens.latest_small(folder),
        "ml-100k-classic": movielens.classic(folder),
        "beauty": amazon.beauty(folder),
        "games": amazon.games(folder),
    }
    if code == "custom":
        if not interactions or not items:
            raise UserError("a custom data set needs --interactions and --items")
        source = custom.source(Path(interactions), Path(items))
    elif code in sources:
        source = sources[code]
    else:
        raise UserError(f"unknown data set '{code}'")
    return build_cached(source, filters, Path(cache_root))
