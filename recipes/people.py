"""The users of a table, with their histories. This module does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from datasets import SequenceDataset
from datasets.custom import INTERACTION_COLUMNS
from datasets.tables import are_dates, find_columns, find_separator, has_quotes, to_times
from errors import UserError
from storage import reading

ROWS = 65_536  # read at once
RECENT = 65_536  # number of names remembered, so that memory does not grow with the table


class Person(NamedTuple):
    """A user to recommend items to, of the data set or not.

    Attributes:
        name: identifier in the table.
        history: (n,) items, oldest first.
    """

    name: str
    history: np.ndarray


class People:
    """The users of a table, in its order; those without a known item are counted and left out.

    A table with only a column ``user`` lists users of the data set. One with ``user``, ``item`` and
    ``timestamp`` has the interactions of any users, all rows of a user next to each other: a user
    who appears again is refused if at most ``RECENT`` others lie between. Files and their columns
    are named as in custom data.

    Args:
        path: CSV, TSV, Parquet or ``.inter`` file.
        data: the data set.

    Attributes:
        has_interactions: whether the table has interactions.
        num_skipped, first_skipped: how many users were left out so far, and the first one.

    Raises:
        UserError: the table cannot be read or lacks a column, also while iterating.
    """

    def __init__(self, path: Path, data: SequenceDataset) -> None:
        self.path, self.data = path, data
        self.num_skipped, self.first_skipped = 0, ""
        self._separator = find_separator(path)
        with reading(path):
            header, _ = self._open()
        optional = ("item", "timestamp", "rating")
        self._columns = find_columns(path, header, INTERACTION_COLUMNS, optional)
        self.has_interactions = "item" in self._columns
        if self.has_interactions:
            find_columns(path, header, INTERACTION_COLUMNS, ("rating",))

    def _open(self) -> tuple[list[str], Iterable[pa.RecordBatch]]:
        """Names of the columns, and the rows in batches."""
        if not self._separator:
            file = pq.ParquetFile(self.path)
            return file.schema_arrow.names, file.iter_batches(ROWS)
        quote = '"' if has_quotes(self.path) else False
        options = pa.csv.ParseOptions(delimiter=self._separator, quote_char=quote)
        names = pa.csv.open_csv(self.path, parse_options=options).schema.names
        text = pa.csv.ConvertOptions(column_types={name: pa.string() for name in names})
        return names, pa.csv.open_csv(self.path, parse_options=options, convert_options=text)

    def __iter__(self) -> Iterator[Person]:
        self.num_skipped = 0
        people = self._interactions() if self.has_interactions else self._users()
        for person in people:
            if len(person.history):
                yield person
                continue
            self.first_skipped = self.first_skipped if self.num_skipped else person.name
            self.num_skipped += 1

    def parts(self, size: int) -> Iterator[list[Person]]:
        """Yield lists of ``size`` people; the last one may be shorter."""
        part: list[Person] = []
        for person in self:
            part.append(person)
            if len(part) == size:
                yield part
                part = []
        if part:
            yield part

    def _batches(self, *names: str) -> Iterator[list[pd.Series]]:
        """Some columns as text, in batches of rows whose index is their row in the file."""
        row = 2 if self._separator else 1
        with reading(self.path):
            for batch in self._open()[1]:
                texts = (batch.column(self._columns[name]).cast(pa.string()) for name in names)
                index = pd.RangeIndex(row, row + len(batch))
                yield [
                    pd.Series(text.fill_null("").to_pylist(), index, dtype=object, name=name)
                    for name, text in zip(names, texts)
                ]
                row += len(batch)

    def _users(self) -> Iterator[Person]:
        index_of = {name: index for index, name in enumerate(self.data.user_names)}
        offsets, nobody = self.data.offsets, np.empty(0, np.int32)
        for name in chain.from_iterable(users for (users,) in self._batches("user")):
            user = index_of.get(name)
            if user is None:
                yield Person(name, nobody)
            else:
                yield Person(name, self.data.item_ids[offsets[user] : offsets[user + 1]])

    def _interactions(self) -> Iterator[Person]:
        # Index 0 is padding; its empty name must not match an empty cell.
        index_of = {name: index for index, name in enumerate(self.data.item_names) if index}
        recent: dict[str, None] = {}  # oldest first
        for name, own in groupby(self._rows(), key=lambda row: row[1]):
            rows = list(own)
            if name in recent:
                raise UserError(
                    f"{self.path} row {rows[0][0]}: user '{name[:50]}' appears again after others: "
                    "sort the table so that all rows of a user are next to each other"
                )
            recent[name] = None
            if len(recent) > RECENT:
                del recent[next(iter(recent))]
            known = [(time, index_of[item]) for *_, item, time in rows if item in index_of]
            known.sort(key=lambda row: row[0])
            yield Person(name, np.array([item for _, item in known], dtype=np.int32))

    def _rows(self) -> Iterator[tuple[int, str, str, float]]:
        """Row in the file, user, item and time of each interaction."""
        dates = None
        for users, items, column in self._batches("user", "item", "timestamp"):
            if len(column):
                dates = are_dates(column) if dates is None else dates
                times = to_times(column, self.path, first_row=column.index[0], dates=dates)
                yield from zip(users.index, users, items, times)
