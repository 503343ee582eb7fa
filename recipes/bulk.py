"""Recommendations for a table of users, written in parts. This module does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from tqdm import tqdm

from datasets import SequenceDataset
from errors import InputError, UserError
from storage import atomic_path, read_json, reading, write_json
from trainer.fingerprint import fingerprint
from trainer.run_folder import CONFIG

if TYPE_CHECKING:  # it imports torch
    from recipes.recommend import Recommender

MANIFEST = "recommendations.json"
RUN_FILES = (CONFIG, "fusion.json", "test_metrics.json")  # what identifies the run
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
        # Item 0 is no item, and its name is empty.
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


def recommend_to_all(
    recommender: Recommender,
    run_dir: Path,
    people: People,
    output: Path,
    *,
    k: int,
    part_users: int,
    resume: bool,
) -> dict[str, Any]:
    """Write recommendations for all people to the folder ``output``, in Parquet files.

    A part is complete or absent, and holds the same rows however often the work was interrupted.

    Args:
        recommender: the models.
        run_dir: folder of their run.
        people: whom to recommend to.
        output: the folder, which this process has reserved.
        k: items per person.
        part_users: people per part.
        resume: whether to keep the parts that are there.

    Returns:
        The content of ``recommendations.json``.

    Raises:
        UserError: ``resume``, and the parts are those of another run, input or setting.
    """
    manifest = output / MANIFEST
    record = {"fingerprint": _fingerprint(run_dir, people.path, k, part_users), "finished": False}
    if resume and manifest.exists():
        if read_json(manifest).get("fingerprint") != record["fingerprint"]:
            raise UserError(
                f"{output} has recommendations of another run, input, --k or --part_users"
            )
    else:
        for path in (manifest, *output.glob("part-*.parquet")):
            path.unlink(missing_ok=True)
        write_json(manifest, record)
    count, index = 0, -1
    with tqdm(desc="recommend", unit="user", unit_scale=True, dynamic_ncols=True) as bar:
        for index, part in enumerate(_parts(people, part_users)):
            path = output / f"part-{index:05d}.parquet"
            if not path.exists():
                table = _table(recommender, part, k)
                with atomic_path(path) as temporary:
                    pq.write_table(table, temporary)
            count += len(part)
            bar.update(len(part))
    record |= {
        "finished": True, "run": str(run_dir), "k": k, "users": count, "parts": index + 1,
        "skipped": people.num_skipped,
    }  # fmt: skip
    write_json(manifest, record)
    return record


def _fingerprint(run_dir: Path, source: Path, k: int, part_users: int) -> str:
    files = [run_dir / name for name in RUN_FILES if (run_dir / name).exists()]
    with reading(source), source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    contents = (path.read_bytes() for path in files)
    return fingerprint({"k": k, "part_users": part_users}, digest, *contents)


def _parts(people: People, size: int) -> Iterator[list[Person]]:
    part: list[Person] = []
    for person in people:
        part.append(person)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _table(recommender: Recommender, part: Sequence[Person], k: int) -> pa.Table:
    """One row per person and item."""
    found = recommender.recommend([person.history for person in part], k)
    data, items = recommender.data, found.items.ravel().tolist()
    return pa.table(
        {
            "user": np.repeat([person.name for person in part], k),
            "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), len(part)),
            "item": [data.item_names[item] for item in items],
            "title": [data.titles[item] for item in items],
            "retrieved": found.retrieved.ravel().astype(np.int32),
            **{name: values.ravel().astype(np.float32) for name, values in found.scores.items()},
        }
    )
