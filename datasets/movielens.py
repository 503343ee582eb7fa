"""MovieLens: ml-latest-small (the paper's "ML-100k") and MovieLens 100K of 1998.

F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, TiiS 2015. The data
is licensed for research; see the README in the archive.
"""

from __future__ import annotations

import re
from pathlib import Path

from datasets.base import RawData, RawSource
from datasets.tables import read_columns, read_interactions
from datasets.titles import clean_title
from downloads import fetch_archive, fetch_wheel

LATEST_SMALL_URL = "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"
LATEST_SMALL_FILES = {
    "ratings.csv": "aa289ca83157595d0df6aea1be6a4ded676ddc4385472e8313a8ed9805352646",
    "movies.csv": "5a5f32dd9bb3797b8e728a1b98958789d2b13f294a69fdfbc5727f8a9611aa07",
}
# RecBole's wheel contains MovieLens 100K of 1998 as an example.
CLASSIC_WHEEL = "recbole==1.2.1"
CLASSIC_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
CLASSIC_FOLDER = "recbole/dataset_example/ml-100k"

_YEAR = re.compile(r"\s*\((\d{4}[^()]*)\)\s*$")
_ARTICLE = re.compile(r"^(.*), (The|A|An)$", re.IGNORECASE)


def latest_small(folder: Path) -> RawSource:
    """MovieLens ml-latest-small with its raw files in ``folder``."""
    ratings_path, movies_path = folder / "ratings.csv", folder / "movies.csv"

    def read() -> RawData:
        table = read_interactions(
            ratings_path,
            {"user": ["userId"], "item": ["movieId"], "timestamp": [], "rating": []},
        )
        movies = read_columns(movies_path, {"item": ["movieId"], "title": []})
        return RawData(table, _movie_titles(dict(zip(movies["item"], movies["title"]))))

    return RawSource(
        code="ml-100k",
        files=(ratings_path, movies_path),
        fetch=lambda: fetch_archive(
            LATEST_SMALL_URL, folder, LATEST_SMALL_FILES, inside="ml-latest-small"
        ),
        read=read,
        statistics=(610, 3650, 90274),
    )


def classic(folder: Path) -> RawSource:
    """MovieLens 100K of 1998 with its raw files in ``folder``."""
    ratings_path, movies_path = folder / "ml-100k.inter", folder / "ml-100k.item"

    def read() -> RawData:
        table = read_interactions(
            ratings_path,
            {"user": ["user_id"], "item": ["item_id"], "timestamp": [], "rating": []},
            separator="\t",
        )
        movies = read_columns(
            movies_path,
            {"item": ["item_id"], "title": ["movie_title"], "year": ["release_year"]},
            separator="\t",
        )
        raw_titles = {
            item: f"{title} ({year})"
            for item, title, year in movies.itertuples(index=False)
            if title.strip()
        }
        return RawData(table, _movie_titles(raw_titles))

    return RawSource(
        code="ml-100k-classic",
        files=(ratings_path, movies_path),
        fetch=lambda: fetch_wheel(
            CLASSIC_WHEEL,
            CLASSIC_SHA256,
            {f"{CLASSIC_FOLDER}/{path.name}": path for path in (ratings_path, movies_path)},
        ),
        read=read,
    )


def movie_title(raw_title: str) -> str:
    """Clean a MovieLens title.

    Alternative titles in parentheses are removed and a trailing article moves to the front:
    ``Seven (a.k.a. Se7en) (1995)`` becomes ``Seven (1995)`` and ``Usual Suspects, The (1995)``
    becomes ``The Usual Suspects (1995)``.
    """
    year = _YEAR.search(raw_title)
    name = raw_title[: year.start()] if year else raw_title
    name = clean_title(re.sub(r"\(.*?\)", " ", name)) or clean_title(name)
    name = _ARTICLE.sub(r"\2 \1", name)
    return f"{name} ({year[1]})" if year and name else name


def _movie_titles(raw_titles: dict[str, str]) -> dict[str, str]:
    titles = {item: movie_title(raw_title) for item, raw_title in raw_titles.items()}
    return {item: title for item, title in titles.items() if title}
