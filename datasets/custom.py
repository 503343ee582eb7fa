"""A user's own data: CSV, TSV or Parquet, or RecBole's atomic files."""

from __future__ import annotations

from pathlib import Path

from config import UserError
from datasets.base import RawData, RawSource, clean_title
from datasets.tables import interactions, read_columns

SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t", ".parquet": ""}
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


def _separator(path: Path) -> str:
    if path.suffix not in SEPARATORS:
        raise UserError(f"{path}: its name must end in {', '.join(SEPARATORS)}")
    return SEPARATORS[path.suffix]


def source(interactions_path: Path, items_path: Path) -> RawSource:
    """A custom data set: interactions (user, item, timestamp, maybe rating) and titles."""

    separators = [_separator(path) for path in (interactions_path, items_path)]

    def read() -> RawData:
        table = interactions(interactions_path, INTERACTION_COLUMNS, separator=separators[0])
        items = read_columns(items_path, ITEM_COLUMNS, separator=separators[1])
        titles = {item: clean_title(title) for item, title in zip(items["item"], items["title"])}
        titles = {item: title for item, title in titles.items() if title}
        untitled = table["item"][~table["item"].isin(titles.keys())].unique()
        if len(untitled):
            raise UserError(
                f"{items_path} has no title for {len(untitled)} of the items in "
                f"{interactions_path}, the first is '{untitled[0]}': add the titles or take the "
                "interactions out"
            )
        return RawData(table, titles)

    return RawSource("custom", (interactions_path, items_path), lambda: None, read)
