"""From raw interactions to numbered chronological sequences: title filter, k-core, split, cache.

Preprocessing follows section 4.0.1 of the LlamaRec paper and gives the statistics of its Table 2.
"""

from __future__ import annotations

import hashlib
import json
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from config import UserError
from storage import atomic_path, read_arrays, reading, reason

CACHE_FORMAT = 3  # raise when preprocessing or the cache's arrays change

_JOINERS = "\u200c\u200d"


class Filters(NamedTuple):
    """Which interactions stay."""

    min_rating: float = 0.0
    min_uc: int = 5
    min_sc: int = 5


class RawData(NamedTuple):
    """Raw interactions and titles of one data set.

    Attributes:
        interactions: columns ``user`` and ``item`` (str), ``timestamp`` and ``rating`` (numbers; a
            rating is infinite where there is none).
        titles: title by item; items without a title are absent.
    """

    interactions: pd.DataFrame
    titles: dict[str, str]


@dataclass(frozen=True)
class RawSource:
    """Where a data set comes from.

    Attributes:
        code: the data set's code.
        files: the raw files that shape the result.
        fetch: puts missing raw files in place.
        read: reads the raw files.
        statistics: (users, items, interactions) that the paper reports under the default filters.
    """

    code: str
    files: tuple[Path, ...]
    fetch: Callable[[], None]
    read: Callable[[], RawData]
    statistics: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class SequenceDataset:
    """Users' chronological item sequences, held flat, with the leave-one-out split.

    User u (counted from 0) has ``item_ids[offsets[u]:offsets[u + 1]]``; the last item is the test
    answer, the one before it the validation answer, the rest is for training. Items are numbered
    from 1, 0 is padding.

    Attributes:
        code: the data set's code.
        item_ids: (num_interactions,) int32.
        offsets: (num_users + 1,) int64.
        titles: titles[i] is item i's title, titles[0] is empty.
        user_names: the users' own identifiers, in order.
        item_names: the items' own identifiers; item_names[0] is empty.
        fingerprint: hash of sequences and titles, to tell whether a file belongs to this data.
    """

    code: str
    item_ids: np.ndarray
    offsets: np.ndarray
    titles: list[str]
    user_names: list[str]
    item_names: list[str]
    fingerprint: str

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """Number of items, the highest item id."""
        return len(self.titles) - 1

    def answers(self, split: str) -> np.ndarray:
        """(num_users,) held-out item of every user, split ``val`` or ``test``."""
        return self.item_ids[self.history_ends(split)]

    def history_ends(self, split: str) -> np.ndarray:
        """(num_users,) flat index where a user's history ends: at the held-out item of ``split``.

        For ``train`` that is where the training sequence ends, as for ``val``.
        """
        return self.offsets[1:] - {"train": 2, "val": 2, "test": 1}[split]

    def training_prefixes(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) flat start and (n,) flat end of every non-empty prefix of a training sequence that
        another training interaction follows, at the end's index.
        """
        starts, ends = self.offsets[:-1], self.history_ends("train")
        counts = np.maximum(ends - starts - 1, 0)
        first = np.cumsum(counts) - counts  # number of each user's first prefix
        places = np.arange(counts.sum()) - np.repeat(first, counts)
        starts = np.repeat(starts, counts)
        return starts, starts + 1 + places

    def num_repeated(self) -> int:
        """Users whose test answer is among their earlier items as well."""
        answers = np.repeat(self.answers("test"), np.diff(self.offsets))
        same = self.item_ids == answers
        return int((np.add.reduceat(same, self.offsets[:-1], dtype=np.int64) > 1).sum())

    def training_counts(self) -> np.ndarray:
        """(num_items + 1,) how often each item occurs in the training part, 0 for padding."""
        steps = np.zeros(len(self.item_ids) + 1, dtype=np.int64)
        np.add.at(steps, self.offsets[:-1], 1)
        np.add.at(steps, self.history_ends("train"), -1)
        training = steps.cumsum()[:-1] > 0
        return np.bincount(self.item_ids[training], minlength=self.num_items + 1)

    def summary(self) -> str:
        """The statistics of the paper's Table 2, in one line."""
        mean = len(self.item_ids) / self.num_users
        return (
            f"{self.code}: {self.num_users:,} users, {self.num_items:,} items, "
            f"{len(self.item_ids):,} interactions, mean length {mean:.2f}"
        )


def clean_title(title: str) -> str:
    """A title on one line of characters that can be seen, so that it cannot forge a prompt's lines.

    Line breaks, control characters and white space become single spaces, also SentencePiece's sign
    for a space, which its tokenizers would merge with the spaces around. Format characters (marks
    that turn the direction of text, characters without width) and halves of surrogate pairs go;
    the joiners that emoji and some scripts need stay within a title.

    What is empty then is no title: an item without one is left out of MovieLens and Amazon data,
    and in custom data it is a mistake.
    """
    if not title.isprintable():
        title = "".join(map(_printable, title))
    return " ".join(title.replace("\u2581", " ").split()).strip(_JOINERS + " ")


def _printable(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cc":
        return " "
    return "" if category in ("Cf", "Cs") and character not in _JOINERS else character


def k_core(users: np.ndarray, items: np.ndarray, min_uc: int, min_sc: int) -> np.ndarray:
    """Mask of the interactions left once no user has fewer than ``min_uc`` and no item fewer
    than ``min_sc`` interactions.

    Args:
        users: (n,) user codes from 0.
        items: (n,) item codes from 0.
        min_uc: least interactions of a user.
        min_sc: least interactions of an item.
    """
    keep = np.ones(len(users), dtype=bool)
    while True:
        user_counts = np.bincount(users[keep], minlength=users.max(initial=0) + 1)
        item_counts = np.bincount(items[keep], minlength=items.max(initial=0) + 1)
        kept = keep & (user_counts[users] >= min_uc) & (item_counts[items] >= min_sc)
        if kept.sum() == keep.sum():
            return keep
        keep = kept


def _number(names: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Codes and names in a fixed order: by value where all names are whole numbers, else by text.

    The order decides ties between interactions of one moment, and must not depend on a hash.
    """
    codes, unique = pd.factorize(names)
    unique = np.asarray(unique, dtype=object)
    numeric = all(n.isascii() and n.isdigit() and (n[0] != "0" or n == "0") for n in unique)
    keys = [(len(n), n) if numeric else n for n in unique]
    order = np.array(sorted(range(len(unique)), key=keys.__getitem__), dtype=np.int64)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[codes], unique[order]


def build(code: str, raw: RawData, filters: Filters) -> SequenceDataset:
    """Filter, number and order raw interactions.

    Raises:
        UserError: no interaction is left.
    """
    table = raw.interactions
    if filters.min_rating and np.isinf(table["rating"]).all():
        raise UserError(f"--min_rating {filters.min_rating:g}: {code} has no column of ratings")
    table = table[(table["rating"] >= filters.min_rating) & table["item"].isin(raw.titles.keys())]
    repeated = table.duplicated(["user", "item", "timestamp"])
    if repeated.any():
        print(f"note: {repeated.sum():,} interactions of {code} are there twice", file=sys.stderr)
        table = table[~repeated]
    users, user_names = _number(table["user"])
    items, item_names = _number(table["item"])
    keep = k_core(users, items, filters.min_uc, filters.min_sc)
    if not keep.any():
        raise UserError(
            f"{code}: no user has {filters.min_uc} interactions with items that have "
            f"{filters.min_sc}: lower --min_uc, --min_sc or --min_rating, or bring more data"
        )
    user_index, users = np.unique(users[keep], return_inverse=True)
    item_index, items = np.unique(items[keep], return_inverse=True)
    timestamps = table["timestamp"].to_numpy()[keep]
    order = np.lexsort((items, timestamps, users))
    kept_items = item_names[item_index]
    item_ids = (items[order] + 1).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users))]).astype(np.int64)
    titles = ["", *(raw.titles[name] for name in kept_items)]
    digest = hashlib.sha256(item_ids.tobytes() + offsets.tobytes())
    digest.update(json.dumps(titles).encode())
    return SequenceDataset(
        code=code,
        item_ids=item_ids,
        offsets=offsets,
        titles=titles,
        user_names=list(user_names[user_index]),
        item_names=["", *kept_items],
        fingerprint=digest.hexdigest(),
    )


def _source_key(source: RawSource, filters: Filters) -> str:
    """Hash of everything that shapes the preprocessed data."""
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, source.code, *filters]).encode())
    for path in source.files:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read {path}: {reason(error)}") from error
    return digest.hexdigest()


def _write_cache(path: Path, key: str, dataset: SequenceDataset) -> None:
    text = {name: getattr(dataset, name) for name in ("titles", "user_names", "item_names")}
    text |= {"key": key, "fingerprint": dataset.fingerprint}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            item_ids=dataset.item_ids,
            offsets=dataset.offsets,
            text=np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
        )


def _read_cache(path: Path, key: str, code: str) -> SequenceDataset | None:
    """The cached data set, or None where the file is of other data.

    Raises:
        UserError: the file is damaged.
    """
    with reading(path, "rebuilt"):
        arrays = read_arrays(path)
        text = json.loads(arrays["text"].tobytes())
        if text.pop("key") != key:
            return None
        return SequenceDataset(
            code=code, item_ids=arrays["item_ids"], offsets=arrays["offsets"], **text
        )


def build_cached(source: RawSource, filters: Filters, cache_root: Path) -> SequenceDataset:
    """Build a data set, or take it from the cache if nothing that shaped it has changed."""
    source.fetch()
    key = _source_key(source, filters)
    path = cache_root / f"{source.code}.npz"
    dataset = note = None
    if path.exists():
        note = f"note: {path} was made from other files or flags: rebuilt"
        try:
            dataset = _read_cache(path, key, source.code)
        except UserError as error:
            note = f"note: {error}"
    if dataset is None:
        dataset = build(source.code, source.read(), filters)
        _write_cache(path, key, dataset)
        if note:
            print(note, file=sys.stderr)
    found = (dataset.num_users, dataset.num_items, len(dataset.item_ids))
    if filters == Filters() and source.statistics not in (None, found):
        expected = "{:,} users, {:,} items, {:,} interactions".format(*source.statistics)
        print(f"note: the paper's {source.code} has {expected}", file=sys.stderr)
    return dataset
