"""The users of a table, with their histories. This module does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from datasets import SequenceDataset
from errors import InputError
from storage import reading

ROWS = 65_536  # read at once


class Person(NamedTuple):
    """Somebody to recommend items to.

    Attributes:
        name: identifier.
        history: (n,) items, oldest first.
    """

    name: str
    history: np.ndarray


class People:
    """The users of a table, in its order; those without a known item are counted and left out.

    A table with a column ``user`` lists users of the data set. One with ``user``, ``item`` and
    ``timestamp`` has the interactions of anybody, all rows of a user next to each other.

    Args:
        path: CSV, TSV or Parquet file.
        data: the data set.

    Attributes:
        has_interactions: whether the table has interactions.
        num_skipped, first_skipped: how many users were left out so far, and the first one.
    """

    def __init__(self, path: Path, data: SequenceDataset) -> None:
        self.path, self.data = path, data
        self.num_skipped, self.first_skipped = 0, ""
        with reading(path):
            columns, _ = self._open()
        wanted = ("user", "item", "timestamp") if "item" in columns else ("user",)
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise InputError(
                f"{path} lacks the column {missing[0]}: it needs user, for users of the data set, "
                "or user, item and timestamp"
            )
        self.has_interactions = "item" in columns

    def _open(self) -> tuple[list[str], Iterable[pa.RecordBatch]]:
        """Names of the columns, and the rows in batches."""
        if self.path.suffix == ".parquet":
            file = pq.ParquetFile(self.path)
            return file.schema_arrow.names, file.iter_batches(ROWS)
        options = pa.csv.ParseOptions(delimiter="\t" if self.path.suffix == ".tsv" else ",")
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
        """Lists of ``size`` people, the last one perhaps shorter."""
        part: list[Person] = []
        for person in self:
            part.append(person)
            if len(part) == size:
                yield part
                part = []
        if part:
            yield part

    def _rows(self, *names: str) -> Iterator[tuple[str, ...]]:
        """Some columns of all rows, as text."""
        with reading(self.path):
            for batch in self._open()[1]:
                yield from zip(
                    *(batch.column(name).cast(pa.string()).to_pylist() for name in names)
                )

    def _users(self) -> Iterator[Person]:
        index_of = {name: index for index, name in enumerate(self.data.user_names)}
        offsets, nobody = self.data.offsets, np.empty(0, np.int32)
        for (name,) in self._rows("user"):
            user = index_of.get(name)
            if user is None:
                yield Person(name, nobody)
            else:
                yield Person(name, self.data.item_ids[offsets[user] : offsets[user + 1]])

    def _interactions(self) -> Iterator[Person]:
        # Index 0 is padding; its empty name must not match an empty cell.
        index_of = {name: index for index, name in enumerate(self.data.item_names) if index}
        all_rows = self._rows("user", "item", "timestamp")
        for name, rows in groupby(all_rows, key=lambda row: row[0]):
            known = [
                (self._time(time), index_of[item]) for _, item, time in rows if item in index_of
            ]
            known.sort(key=lambda row: row[0])
            yield Person(name, np.array([item for _, item in known], dtype=np.int32))

    def _time(self, text: str) -> float:
        try:
            return float(text)
        except (TypeError, ValueError):
            raise InputError(f"{self.path}: timestamp {text!r} is not a number") from None
