"""MovieLens: ml-latest-small (the paper's "ML-100k") and the 1998 MovieLens 100K.

F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and Context, TiiS 2015. For
research use; see the README in the archive.
"""

from __future__ import annotations

import re
from pathlib import Path

from datasets.base import RawData, RawSource, clean_title
from datasets.download import fetch_archive, fetch_wheel
from datasets.tables import interactions, read_columns

LATEST_SMALL_URL = "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"
LATEST_SMALL_FILES = {
    "ratings.csv": "aa289ca83157595d0df6aea1be6a4ded676ddc4385472e8313a8ed9805352646",
    "movies.csv": "5a5f32dd9bb3797b8e728a1b98958789d2b13f294a69fdfbc5727f8a9611aa07",
}
# RecBole packs the 1998 MovieLens 100K among its examples, which makes it installable.
CLASSIC_WHEEL = "recbole==1.2.1"
CLASSIC_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
CLASSIC_FOLDER = "recbole/dataset_example/ml-100k"

_YEAR = re.compile(r"\s*\((\d{4}[^()]*)\)\s*$")
_ARTICLE = re.compile(r"^(.*), (The|A|An)$", re.IGNORECASE)


def movie_title(title: str) -> str:
    """A readable title: ``Seven (a.k.a. Se7en) (1995)`` becomes ``Seven (1995)``, and
    ``Usual Suspects, The (1995)`` becomes ``The Usual Suspects (1995)``.
    """
    year = _YEAR.search(title)
    name = title[: year.start()] if year else title
    name = clean_title(re.sub(r"\(.*?\)", " ", name)) or clean_title(name)
    name = _ARTICLE.sub(r"\2 \1", name)
    return f"{name} ({year[1]})" if year and name else name


def _titles(names: dict[str, str]) -> dict[str, str]:
    titles = {item: movie_title(name) for item, name in names.items()}
    return {item: title for item, title in titles.items() if title}


def latest_small(folder: Path) -> RawSource:
    """MovieLens ml-latest-small: 610 users."""
    ratings, movies = folder / "ratings.csv", folder / "movies.csv"

    def read() -> RawData:
        table = interactions(
            ratings,
            {"user": ["userId"], "item": ["movieId"], "timestamp": [], "rating": []},
        )
        movie = read_columns(movies, {"item": ["movieId"], "title": []})
        return RawData(table, _titles(dict(zip(movie["item"], movie["title"]))))

    return RawSource(
        code="ml-100k",
        files=(ratings, movies),
        fetch=lambda: fetch_archive(
            LATEST_SMALL_URL, folder, LATEST_SMALL_FILES, inside="ml-latest-small"
        ),
        read=read,
        statistics=(610, 3650, 90274),
    )


def classic(folder: Path) -> RawSource:
    """MovieLens 100K of 1998: 943 users."""
    inter, item = folder / "ml-100k.inter", folder / "ml-100k.item"

    def read() -> RawData:
        table = interactions(
            inter,
            {"user": ["user_id"], "item": ["item_id"], "timestamp": [], "rating": []},
            separator="\t",
        )
        movie = read_columns(
            item,
            {"item": ["item_id"], "title": ["movie_title"], "year": ["release_year"]},
            separator="\t",
        )
        names = {i: f"{t} ({y})" for i, t, y in movie.itertuples(index=False) if t.strip()}
        return RawData(table, _titles(names))

    return RawSource(
        code="ml-100k-classic",
        files=(inter, item),
        fetch=lambda: fetch_wheel(
            CLASSIC_WHEEL,
            CLASSIC_SHA256,
            {f"{CLASSIC_FOLDER}/{path.name}": path for path in (inter, item)},
        ),
        read=read,
    )
