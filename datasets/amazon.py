"""Amazon reviews: Beauty (2014 metadata) and Video Games (2018 metadata, which has more titles).

J. McAuley et al., Image-based Recommendations on Styles and Substitutes, SIGIR 2015.
"""

from __future__ import annotations

from pathlib import Path

from datasets.base import RawData, RawSource
from datasets.download import fetch_file
from datasets.tables import amazon_titles, interactions

_SNAP = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_UCSD = "https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/metaFiles2"


def _source(
    code: str, folder: Path, urls: dict[str, str], statistics: tuple[int, int, int]
) -> RawSource:
    ratings, meta = (folder / name for name in urls)

    def fetch() -> None:
        for name, url in urls.items():
            fetch_file(url, folder / name)

    def read() -> RawData:
        table = interactions(
            ratings, {"user": [], "item": [], "rating": [], "timestamp": []}, header=False
        )
        return RawData(table, amazon_titles(meta))

    return RawSource(code, (ratings, meta), fetch, read, statistics)


def beauty(folder: Path) -> RawSource:
    """Amazon Beauty."""
    urls = {
        "ratings_Beauty.csv": f"{_SNAP}/ratings_Beauty.csv",
        "meta_Beauty.json.gz": f"{_SNAP}/meta_Beauty.json.gz",
    }
    return _source("beauty", folder, urls, (22332, 12086, 198215))


def games(folder: Path) -> RawSource:
    """Amazon Video Games."""
    urls = {
        "ratings_Video_Games.csv": f"{_SNAP}/ratings_Video_Games.csv",
        "meta_Video_Games.json.gz": f"{_UCSD}/meta_Video_Games.json.gz",
    }
    return _source("games", folder, urls, (15264, 7676, 147861))
