"""Finding users by identifiers and items by approximate titles."""

from dataclasses import replace

import pytest

from datasets import SequenceDataset
from errors import UserError
from recipes.lookup import find_items, find_user
from tests.helpers import make_data

TITLES = ["", "Toy Story (1995)", "Halo 3", "Halo: Reach", "The Legend of Zelda"]


@pytest.fixture()
def data() -> SequenceDataset:
    return replace(make_data([3, 4, 5], num_items=4), titles=TITLES)


def test_exact_titles_are_certain(data: SequenceDataset):
    matches = find_items(data, ["halo 3", "Halo Reach"])
    assert [match.item for match in matches] == [2, 3]
    assert all(match.is_certain for match in matches)


def test_similar_titles_are_found_but_not_certain(data: SequenceDataset):
    (match,) = find_items(data, ["legend zelda"])
    assert match.title == "The Legend of Zelda" and not match.is_certain


def test_nothing_similar(data: SequenceDataset):
    with pytest.raises(UserError, match="no title in test resembles 'xyzzy'"):
        find_items(data, ["halo 3", "xyzzy"])


def test_users(data: SequenceDataset):
    assert find_user(data, "2") == 2
    with pytest.raises(UserError, match=r"--user 22: no such user in test; similar: 2"):
        find_user(data, "22")
