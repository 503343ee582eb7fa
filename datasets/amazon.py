"""Amazon reviews: Beauty and Video Games.

J. McAuley et al., Image-based Recommendations on Styles and Substitutes, SIGIR 2015. Beauty uses
the metadata of 2014, Video Games that of 2018, which has more titles.
"""

from __future__ import annotations

import ast
import gzip
import html
import json
import zlib
from pathlib import Path

from datasets.base import RawData, RawSource
from datasets.tables import read_interactions
from datasets.titles import clean_title
from downloads import fetch_file
from errors import UserError
from storage import check_unpacked_size, describe

MAX_LINE_BYTES = 16 << 20  # some records have long descriptions

_SNAP = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_UCSD = "https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/metaFiles2"


def beauty(folder: Path) -> RawSource:
    """Amazon Beauty with its raw files in ``folder``."""
    urls = {
        "ratings_Beauty.csv": f"{_SNAP}/ratings_Beauty.csv",
        "meta_Beauty.json.gz": f"{_SNAP}/meta_Beauty.json.gz",
    }
    return _source("beauty", folder, urls, (22332, 12086, 198215))


def games(folder: Path) -> RawSource:
    """Amazon Video Games with its raw files in ``folder``."""
    urls = {
        "ratings_Video_Games.csv": f"{_SNAP}/ratings_Video_Games.csv",
        "meta_Video_Games.json.gz": f"{_UCSD}/meta_Video_Games.json.gz",
    }
    return _source("games", folder, urls, (15264, 7676, 147861))


def _source(
    code: str, folder: Path, urls: dict[str, str], statistics: tuple[int, int, int]
) -> RawSource:
    ratings, metadata = (folder / name for name in urls)

    def fetch() -> None:
        for name, url in urls.items():
            fetch_file(url, folder / name)

    def read() -> RawData:
        table = read_interactions(
            ratings, {"user": [], "item": [], "rating": [], "timestamp": []}, header=False
        )
        return RawData(table, read_titles(metadata))

    return RawSource(code, (ratings, metadata), fetch, read, statistics)


def read_titles(path: Path) -> dict[str, str]:
    """Read titles by item from gzipped metadata with one record per line.

    A record is a JSON object (2018) or a Python literal (2014). HTML entities in its title, as in
    "Command &amp; Conquer", are decoded.

    Raises:
        UserError: the file is missing, damaged or empty, or a line is not a record.
    """
    titles: dict[str, str] = {}
    row = size = 0
    try:
        with gzip.open(path, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                row += 1
                size += len(line)
                if len(line) == MAX_LINE_BYTES:
                    raise UserError(f"{path} row {row}: longer than {MAX_LINE_BYTES:,} bytes")
                check_unpacked_size(path, size)
                asin, title = _parse_record(line.decode())
                if title:
                    titles[asin] = title
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path} is not a complete gzip file ({describe(error)}): "
            "delete it to download it again"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} row {row} is not UTF-8 text") from error
    except Exception as error:  # damaged records raise many types
        raise UserError(f"{path} row {row}: not a record with asin and title") from error
    if not titles:
        raise UserError(f"{path} is empty")
    return titles


def _parse_record(line: str) -> tuple[str, str]:
    """Return an item's asin and title; both are empty if it has no title."""
    try:
        record = json.loads(line)
    except ValueError:
        record = ast.literal_eval(line)  # accepts literals only, never runs code
    title = clean_title(html.unescape(str(record.get("title") or "")))
    return str(record["asin"]).strip() if title else "", title
