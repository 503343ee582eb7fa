"""Recommendations for a table of users, written in parts. This module does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from config import CommonConfig
from errors import UserError, advice
from progress import ProgressBar
from recipes.people import People, Person
from recipes.runs import load_data
from storage import atomic_path, read_json, reading, write_json
from trainer.fingerprint import fingerprint
from trainer.run_folder import CONFIG

if TYPE_CHECKING:  # it imports torch
    from recipes.recommend import Recommender

MANIFEST = "_recommendations.json"  # readers of a folder of Parquet files skip names with _
RUN_FILES = (CONFIG, "fusion.json", "test_metrics.json")  # what identifies the run


class Job(NamedTuple):
    """A table of recommendations to write, in plain values that another process can receive.

    Attributes:
        run_dir: folder of the run.
        data_config: settings that select its data set.
        device: ``cpu``, ``cuda`` or None for CUDA if available.
        base_model: overrides the run's language model.
        source: the table of users.
        output: the folder to write, reserved by the process that started the job.
        k: items per user.
        part_users: users per file.
        approximate: whether candidates come from an approximate index.
    """

    run_dir: Path
    data_config: CommonConfig
    device: str | None
    base_model: str | None
    source: Path
    output: Path
    k: int
    part_users: int
    approximate: bool = False

    def part_path(self, index: int) -> Path:
        """File of a part."""
        return self.output / f"part-{index:05d}.parquet"

    def fingerprint(self) -> str:
        """Hash of what determines the rows of each file."""
        files = [self.run_dir / name for name in RUN_FILES if (self.run_dir / name).exists()]
        with reading(self.source), self.source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        contents = (path.read_bytes() for path in files)
        settings = {"k": self.k, "part_users": self.part_users}
        if self.approximate:
            settings["approximate"] = True
        return fingerprint(settings, digest, *contents)


class PartWriter:
    """Writes parts of a table in any order; in ascending order, the users are read only once.

    Args:
        job: the table.
        people: its users, who are read from the start; None to open the table again.
    """

    def __init__(self, job: Job, people: People | None = None) -> None:
        # torch takes seconds to import, so this comes after all checks.
        from recipes.recommend import Recommender

        self.job = job
        self.people = people or People(job.source, load_data(job.data_config))
        self.recommender = Recommender(
            job.run_dir,
            self.people.data,
            job.device,
            job.base_model,
            approximate=job.approximate,
        )
        self._parts: Iterator[list[Person]] = iter(())
        self._next = 0

    def write(self, index: int) -> int:
        """Write a part unless its file exists, and return its number of users."""
        part = self._read(index)
        path = self.job.part_path(index)
        if part and not path.exists():
            table = _table(self.recommender, part, self.job.k)
            with atomic_path(path) as temporary:
                pq.write_table(table, temporary)
        return len(part)

    def _read(self, index: int) -> list[Person]:
        """The users of a part; none if there are fewer parts."""
        if not 0 < self._next <= index:
            self._parts, self._next = self.people.parts(self.job.part_users), 0
        part: list[Person] = []
        for _ in range(self._next, index + 1):
            part = next(self._parts, [])
        self._next = index + 1
        return part


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


Engine = Callable[[Job, People, Sequence[int]], Iterator[int]]


def in_this_process(job: Job, people: People, sizes: Sequence[int]) -> Iterator[int]:
    """Write the parts one after the other, and yield the number of users of each."""
    writer = PartWriter(job, people)
    for index in range(len(sizes)):
        yield writer.write(index)


def recommend_to_all(job: Job, people: People, engine: Engine, *, resume: bool) -> dict[str, Any]:
    """Write recommendations for all users of a table, in Parquet files.

    A part is complete or absent, and holds the same rows however often the work was interrupted.

    Args:
        job: the table.
        people: its users.
        engine: writes the missing parts, given the number of users of each part, and yields this
            number for every part.
        resume: whether to keep existing parts.

    Returns:
        The content of the manifest.

    Raises:
        UserError: ``resume`` is set, but the parts are from another run, input or setting; a row of
            the table is invalid, in which case nothing is changed; or a file cannot be read or
            written.
    """
    # An invalid last row must not cost hours of scoring, so the whole table is read first.
    sizes = [len(part) for part in people.parts(job.part_users)]
    skipped = people.num_skipped
    manifest = job.output / MANIFEST
    record = {"fingerprint": job.fingerprint(), "finished": False}
    if resume and manifest.exists():
        with advice("replace the recommendations with --overwrite"):
            earlier = read_json(manifest)
        if earlier.get("fingerprint") != record["fingerprint"]:
            raise UserError(
                f"{job.output} has recommendations of another run, input, --k, --retrieval or "
                "--part_users; replace them with --overwrite"
            )
    else:
        for path in (manifest, *job.output.glob("part-*.parquet")):
            path.unlink(missing_ok=True)
        write_json(manifest, record)
    with ProgressBar(desc="recommend", unit="user", unit_scale=True, total=sum(sizes)) as bar:
        for count in engine(job, people, sizes):
            bar.update(count)
    record |= {
        "finished": True, "run": str(job.run_dir), "k": job.k, "users": sum(sizes),
        "parts": len(sizes), "skipped": skipped,
    }  # fmt: skip
    write_json(manifest, record)
    return record
