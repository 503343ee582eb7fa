"""Seconds and memory of preprocessing by the number of interactions.

Each row reads a synthetic CSV file of interactions and builds the data set, in a process of its
own. Users have ten interactions on average; popularity falls with rank, as in real catalogues.
``csv_mib`` is the size of the file, ``cpu_seconds`` is the time without that of other programs, and
``peak_mib`` the peak memory of the process beyond what it used before. The slopes over the number
of interactions, on logarithmic scales, follow on stderr.

Example:
    python -m benchmarks.preprocessing --largest 10000000
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.common import Row, make_parser, print_slopes, report, run
from benchmarks.memory import in_own_process, peak_mib, rss_mib
from datasets import custom
from datasets.base import Filters
from datasets.preprocessing import build

SIZES = (10**5, 10**6, 10**7, 10**8)
ITEMS = 100_000
ROWS_PER_WRITE = 10**6


def write_tables(folder: Path, num_interactions: int) -> tuple[Path, Path]:
    """Write interactions in random order, and a title for each item."""
    rng = np.random.default_rng(0)
    log, items = folder / "log.csv", folder / "items.csv"
    numbers = np.arange(ITEMS)
    pd.DataFrame({"item": numbers, "title": [f"The title of item {i}" for i in numbers]}).to_csv(
        items, index=False
    )
    for start in range(0, num_interactions, ROWS_PER_WRITE):
        rows = min(ROWS_PER_WRITE, num_interactions - start)
        table = pd.DataFrame(
            {
                "user": rng.integers(num_interactions // 10, size=rows),
                "item": np.minimum(rng.zipf(1.3, rows) - 1, ITEMS - 1),
                "timestamp": rng.integers(10**9, 2 * 10**9, size=rows),
            }
        )
        table.to_csv(log, index=False, header=start == 0, mode="a")
    return log, items


def measure(log: Path, items: Path) -> dict[str, float]:
    """Read and build once; to be called in a process of its own."""
    before, start, cpu_start = rss_mib(), time.perf_counter(), time.process_time()
    data = build("synthetic", custom.source(log, items).read(), Filters())
    return {
        "kept": len(data.item_ids),
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
        "peak_mib": round(peak_mib() - before, 1),
    }


def measure_all(largest: int) -> Iterator[Row]:
    """Measure every size up to ``largest``."""
    for size in SIZES:
        if size <= largest:
            with tempfile.TemporaryDirectory() as folder:
                log, items = write_tables(Path(folder), size)
                row = {"interactions": size, "csv_mib": round(log.stat().st_size / 2**20, 1)}
                yield row | in_own_process(measure, log, items)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--largest", type=int, default=10**7, help="most interactions (default: 10000000)"
    )
    flags = parser.parse_args(argv)
    rows = report("preprocessing", "cpu", measure_all(flags.largest))
    print_slopes(rows, "interactions", ("seconds", "cpu_seconds", "peak_mib"))


if __name__ == "__main__":
    run(main)
