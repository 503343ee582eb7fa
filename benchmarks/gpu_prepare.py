"""Collect what ``benchmarks/gpu_suite.sh`` needs on a machine without a network.

The folder then holds the wheels of bitsandbytes and liger-kernel, Llama 2's tokenizer, the
preprocessed ML-100k and Games in the format of their raw files, and 64 users as a data set of their
own. The weights of the large model are random and are made on the machine itself.

Example:
    python -m benchmarks.gpu_prepare gpu_kit --tokenizer path/to/llama-2
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import add_data_flags, load_data, make_parser, run
from datasets import SequenceDataset
from errors import UserError

WHEELS = ("bitsandbytes>=0.49,<1", "liger-kernel>=0.5,<1")
PLATFORMS = ("manylinux_2_24_x86_64", "manylinux_2_28_x86_64")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
NUM_USERS = 64  # of the small data set
LIMIT_MIB = 60


def interactions(data: SequenceDataset, num_users: int) -> Iterator[tuple[str, str, str, int]]:
    """User, item, rating and time of the first users' interactions, in the format of raw files."""
    for user in range(num_users):
        items = data.item_ids[data.offsets[user] : data.offsets[user + 1]]
        for time, item in enumerate(items):
            yield data.user_names[user], data.item_names[item], "5.0", time


def write_csv(path: Path, rows: Iterator[tuple] | list[tuple]) -> None:
    """Write rows, in a folder that is made if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_movielens(data: SequenceDataset, folder: Path) -> None:
    """Write a data set as the raw files of ML-100k."""
    header = ("userId", "movieId", "rating", "timestamp")
    write_csv(folder / "ratings.csv", [header, *interactions(data, data.num_users)])
    movies = [(name, title, "") for name, title in zip(data.item_names[1:], data.titles[1:])]
    write_csv(folder / "movies.csv", [("movieId", "title", "genres"), *movies])


def write_games(data: SequenceDataset, folder: Path) -> None:
    """Write a data set as the raw files of Games."""
    write_csv(folder / "ratings_Video_Games.csv", interactions(data, data.num_users))
    with gzip.open(folder / "meta_Video_Games.json.gz", "wt", encoding="utf-8") as file:
        for name, title in zip(data.item_names[1:], data.titles[1:]):
            file.write(json.dumps({"asin": name, "title": title}) + "\n")


def write_small(data: SequenceDataset, folder: Path) -> None:
    """Write the first users as custom data."""
    header = ("user", "item", "rating", "timestamp")
    rows = interactions(data, min(NUM_USERS, data.num_users))
    write_csv(folder / "interactions.csv", [header, *rows])
    items = list(zip(data.item_names[1:], data.titles[1:]))
    write_csv(folder / "items.csv", [("item", "title"), *items])


def fetch_wheels(folder: Path) -> None:
    """Download the wheels for Linux on x86-64.

    Raises:
        UserError: pip fails.
    """
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        *platforms, "--dest", str(folder), *WHEELS,
    ]  # fmt: skip
    if subprocess.run(command).returncode:
        raise UserError("the wheels cannot be downloaded, see above")


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the folder, and print its size."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    add_data_flags(parser)
    flags = parser.parse_args(argv)
    kit: Path = flags.folder
    if kit.exists():
        raise UserError(f"{kit} exists: delete it or name another folder")
    for name in TOKENIZER_FILES:
        if not (flags.tokenizer / name).is_file():
            raise UserError(f"--tokenizer {flags.tokenizer}: no {name} there")
    movies = load_data("ml-100k", flags)
    write_movielens(movies, kit / "data" / "ml-100k")
    write_small(movies, kit / "data" / "small")
    write_games(load_data("games", flags), kit / "data" / "games")
    (kit / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        shutil.copyfile(flags.tokenizer / name, kit / "tokenizer" / name)
    (kit / "tokenizer" / "config.json").write_text("{}")  # the scripts look for one
    fetch_wheels(kit / "wheels")
    size = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file()) / 2**20
    print(f"{kit}: {size:.1f} MiB")
    if size > LIMIT_MIB:
        raise UserError(f"{kit} has more than {LIMIT_MIB} MiB")


if __name__ == "__main__":
    run(main)
