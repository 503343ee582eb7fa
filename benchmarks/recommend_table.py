"""Recommendations for tables of 10^4, 10^5 and 10^6 users: users per second and peak memory.

Each row runs ``recommend.py --input`` in a process of its own. The table has new users, whose
interactions are those of random users of the run's data set. ``seconds`` is the time from start to
end, start-up included, and ``peak_mib`` the peak memory of the whole process.

Example:
    python -m benchmarks.recommend_table --run experiments/lru/games
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import recommend
from benchmarks.common import (
    Row,
    add_device_flag,
    add_run_flags,
    load_run_data,
    make_parser,
    report,
    run,
)
from benchmarks.memory import in_own_process, peak_mib
from datasets import SequenceDataset
from jagged import flat_ranges

USERS = (10_000, 100_000, 1_000_000)
CHUNK = 10_000  # users drawn and written at once
FOLDERS = ("data_root", "cache_root", "llm_base_model")


def write_table(path: Path, data: SequenceDataset, num_users: int, seed: int = 0) -> None:
    """Write the interactions of new users to a Parquet file."""
    rng = np.random.default_rng(seed)
    names = np.array(data.item_names, object)
    fields = [("user", pa.string()), ("item", pa.string()), ("timestamp", pa.int64())]
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_users, CHUNK):
            users = rng.integers(data.num_users, size=min(CHUNK, num_users - first))
            lengths = data.offsets[users + 1] - data.offsets[users]
            rows, times = flat_ranges(data.offsets[users], lengths)
            numbers = np.repeat(np.arange(first, first + len(users)), lengths)
            columns = [numbers.astype(str).astype(object), names[data.item_ids[rows]], times]
            writer.write_table(pa.table(columns, schema=schema))


def measure(flags: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a call of ``recommend.py``."""
    start = time.perf_counter()
    recommend.main(flags)
    return time.perf_counter() - start, peak_mib()


def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure every row in its own process."""
    data = load_run_data(flags)
    given = [
        word for name in FOLDERS if (value := getattr(flags, name)) for word in (f"--{name}", value)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for num_users in flags.users:
            table, output = Path(folder, f"{num_users}.parquet"), Path(folder, str(num_users))
            write_table(table, data, num_users)
            words = ["--run", flags.run, "--input", str(table), "--output", str(output), *given]
            elapsed, peak = in_own_process(measure, [*words, "--device", flags.device])
            yield {
                "users": num_users,
                "seconds": round(elapsed, 1),
                "users_per_second": round(num_users / elapsed, 1),
                "peak_mib": round(peak),
            }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select."""
    parser = make_parser(__doc__)
    add_run_flags(parser, "a finished run of either stage")
    parser.add_argument(
        "--users",
        type=int,
        nargs="+",
        default=USERS,
        help="users per table (default: 10^4 to 10^6)",
    )
    parser.add_argument("--llm_base_model", help="as of recommend.py")
    add_device_flag(parser)
    flags = parser.parse_args(argv)
    report("recommend_table", flags.device, measure_all(flags), run=flags.run)


if __name__ == "__main__":
    run(main)
