"""Custom data: CSV, TSV or Parquet files, or RecBole's atomic files."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from datasets.base import RawData, RawSource
from datasets.tables import find_separator, read_columns, read_interactions
from datasets.titles import clean_title
from errors import UserError

# Accepted column names besides the keys, in order of preference.
INTERACTION_COLUMNS = {
    "user": ["user_id", "userId", "uid"],
    "item": ["item_id", "itemId", "movieId", "asin", "iid"],
    "timestamp": ["time", "date", "unixReviewTime"],
    "rating": ["overall", "score"],
}
ITEM_COLUMNS = {
    "item": INTERACTION_COLUMNS["item"],
    "title": ["name", "movie_title", "item_title", "item_name", "product_name"],
}

# Missing values as other programs write them, in lower case.
MISSING = ("nan", "none", "null", "n/a", "<na>")


def source(interactions_path: Path, items_path: Path) -> RawSource:
    """A custom data set.

    Args:
        interactions_path: file with user, item, timestamp and optionally rating.
        items_path: file with item and title.

    Raises:
        UserError: a file name has an unknown extension.
    """
    interactions_separator = find_separator(interactions_path)
    items_separator = find_separator(items_path)

    def read() -> RawData:
        table = read_interactions(
            interactions_path, INTERACTION_COLUMNS, separator=interactions_separator
        )
        items = read_columns(items_path, ITEM_COLUMNS, separator=items_separator)
        note_repeated(items_path, items)
        note_missing(items_path, items)
        titles = {item: clean_title(title) for item, title in zip(items["item"], items["title"])}
        titles = {item: title for item, title in titles.items() if title}
        untitled = table["item"][~table["item"].isin(titles.keys())].unique()
        if len(untitled):
            raise UserError(
                f"{items_path} has no title for {len(untitled)} of the items in "
                f"{interactions_path}, the first is '{untitled[0]}': add the titles or remove "
                "the interactions"
            )
        return RawData(table, titles)

    return RawSource(None, (interactions_path, items_path), lambda: None, read)


def note_repeated(path: Path, items: pd.DataFrame) -> None:
    """Point out items that have several titles; the last one counts."""
    distinct = items.drop_duplicates(["item", "title"])
    repeated = distinct["item"][distinct["item"].duplicated()].unique()
    if len(repeated):
        print(
            f"note: {path}: {len(repeated):,} items have several titles, and the last is used; "
            f"the first such item is {repeated[0]}",
            file=sys.stderr,
        )


def note_missing(path: Path, items: pd.DataFrame) -> None:
    """Point out titles that look like missing values; they are used as titles nevertheless."""
    is_missing = items["title"].str.strip().str.lower().isin(MISSING)
    if is_missing.any():
        print(
            f"note: {path}: {is_missing.sum():,} items are titled "
            f"'{items['title'][is_missing].iloc[0].strip()}', which looks like a missing title; "
            f"the first such item is {items['item'][is_missing].iloc[0]}",
            file=sys.stderr,
        )
