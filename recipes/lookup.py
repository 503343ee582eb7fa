"""Finding users by their identifiers and items by what somebody calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rapidfuzz import fuzz, process, utils

from datasets import SequenceDataset
from errors import UserError

CERTAIN = 96.0  # of 100; matches below are pointed out; 95 is a title with further words
ACCEPTED = 75.0
SHOWN = 3


class Match(NamedTuple):
    """An item that was looked up.

    Attributes:
        query: what was looked up.
        item: the item with the most similar title.
        title: its title.
        score: similarity, 0 to 100.
    """

    query: str
    item: int
    title: str
    score: float

    @property
    def is_certain(self) -> bool:
        """Whether the title is what was looked up, but for case and punctuation."""
        return self.score >= CERTAIN


def find_user(data: SequenceDataset, name: str) -> int:
    """Index of a user.

    Raises:
        UserError: there is no such user.
    """
    try:
        return data.user_names.index(name)
    except ValueError:
        nearest = process.extract(name, data.user_names, scorer=fuzz.ratio, limit=SHOWN)
        shown = ", ".join(user for user, *_ in nearest)
        raise UserError(f"--user {name}: no such user in {data.code}; similar: {shown}") from None


def find_items(data: SequenceDataset, queries: Sequence[str]) -> list[Match]:
    """Items with the most similar titles.

    Raises:
        UserError: no title resembles a query.
    """
    return [_find_item(data, query) for query in queries]


def _words(text: str) -> str:
    """The words of a text in lower case, without punctuation."""
    return " ".join(utils.default_process(text).split())


def _find_item(data: SequenceDataset, query: str) -> Match:
    titles = data.titles[1:]
    found = process.extract(query, titles, scorer=fuzz.WRatio, processor=_words, limit=SHOWN)
    if not found or found[0][1] < ACCEPTED:
        nearest = "; ".join(title for title, *_ in found)
        raise UserError(
            f"no title in {data.code} resembles {query!r}"
            + (f"; the nearest: {nearest}" if found else "")
        )
    title, score, index = found[0]
    return Match(query, index + 1, title, score)
