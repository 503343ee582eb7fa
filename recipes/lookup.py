"""Finding users by their identifiers and items by approximate titles."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz import fuzz, process, utils

from datasets import SequenceDataset
from errors import UserError

CERTAIN = 100.0  # matches below are pointed out
ALL_WORDS = 95.0  # score of a title with all words of the query
PART = 0.9  # discount if only a part of a title resembles the query
ACCEPTED = 75.0  # matches below are refused
SHOWN = 3
SHOWN_WIDTH = 60
YEAR = re.compile(r"\s*\(\d{4}\)$")


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
        """Whether the title is what was looked up, but for case, punctuation and its year."""
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
    """Items with the titles most similar to the queries; of equally similar ones, the most popular.

    Raises:
        UserError: no title resembles a query.
    """
    popularity = np.bincount(data.item_ids, minlength=data.num_items + 1)
    matches = []
    for query in queries:
        scores = _similarities(query, data.titles)
        scores[0] = -1.0  # padding
        best = np.lexsort((-popularity, -scores))[:SHOWN].tolist()
        if scores[best[0]] < ACCEPTED:
            nearest = "; ".join(
                textwrap.shorten(data.titles[item], SHOWN_WIDTH, placeholder="...")
                for item in best
                if item
            )
            raise UserError(f"no title in {data.code} resembles {query!r}; the nearest: {nearest}")
        matches.append(Match(query, best[0], data.titles[best[0]], float(scores[best[0]])))
    return matches


def _similarities(query: str, titles: Sequence[str]) -> np.ndarray:
    """(num_titles,) similarities of titles to a query, from 0 to 100.

    A title's similarity is the highest of three: that of the whole title, that of its most similar
    part at a discount, and ``ALL_WORDS`` if it has all words of the query. A year at the end counts
    only if the query has one too.
    """
    if not re.search(r"\d{4}\)?$", query):
        titles = [YEAR.sub("", title) for title in titles]
    text, texts = _words(query), [_words(title) for title in titles]
    whole = process.cdist([text], texts, scorer=fuzz.ratio)[0]
    part = process.cdist([text], texts, scorer=fuzz.partial_ratio)[0]
    is_longer = np.array([len(title) >= len(text) for title in texts])
    words = set(text.split())
    has_all = np.array([words <= set(title.split()) for title in texts]) & bool(words)
    return np.maximum.reduce([whole, PART * part * is_longer, ALL_WORDS * has_all])


def _words(text: str) -> str:
    """The words of a text in lower case, without punctuation."""
    return " ".join(utils.default_process(text).split())
