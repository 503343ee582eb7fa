"""Finding users by identifiers and items by approximate titles."""

from dataclasses import replace

import numpy as np
import pytest

from datasets import SequenceDataset
from errors import UserError
from recipes.lookup import find_items, find_user
from tests.helpers import make_data

TITLES = [
    "", "Toy Story (1995)", "Toy Story 2 (1999)", "Halo 3", "Halo: Reach", "The Legend of Zelda",
    "Father of the Bride (1991)", "It (2017)", "Homeward Bound: The Incredible Journey (1993)",
    "The Incredibles (2004)", "Halo 2", "The Fellowship of the Ring " + "(Extended Edition) " * 5,
]  # fmt: skip
ITEMS = {title: item for item, title in enumerate(TITLES)}


@pytest.fixture()
def data() -> SequenceDataset:
    data = replace(make_data([3, 4, 5], num_items=len(TITLES) - 1), titles=TITLES)
    return replace(data, item_ids=np.full_like(data.item_ids, ITEMS["Halo: Reach"]))


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("halo 3", "Halo 3"),
        ("Halo Reach!", "Halo: Reach"),
        ("toy story", "Toy Story (1995)"),
        ("toy story 1995", "Toy Story (1995)"),
        ("toy story 2", "Toy Story 2 (1999)"),
        ("it", "It (2017)"),
    ],
)
def test_certain(data: SequenceDataset, query: str, title: str):
    (match,) = find_items(data, [query])
    assert (match.title, match.item) == (title, ITEMS[title]) and match.is_certain


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("The Incredible", "The Incredibles (2004)"),
        ("legend zelda", "The Legend of Zelda"),  # all words
        ("bride of the father", "Father of the Bride (1991)"),
        ("halo", "Halo: Reach"),  # the most popular of three
        ("felowship of the rng", TITLES[-1]),  # a part
    ],
)
def test_uncertain(data: SequenceDataset, query: str, title: str):
    (match,) = find_items(data, [query])
    assert match.title == title and not match.is_certain


@pytest.mark.parametrize("query", ["xyzzy", "qwerty of the asdf", "it came from the sea", "???"])
def test_nothing_similar(data: SequenceDataset, query: str):
    with pytest.raises(UserError) as caught:
        find_items(data, ["halo 3", query])
    message = str(caught.value)
    assert message.startswith(f"no title in test resembles {query!r}; the nearest: ")
    assert len(message) < 250


def test_users(data: SequenceDataset):
    assert find_user(data, "2") == 2
    with pytest.raises(UserError, match=r"--user 22: no such user in test; similar: 2"):
        find_user(data, "22")
