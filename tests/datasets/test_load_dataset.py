from pathlib import Path

import pytest

from errors import ArgumentError
from tests.helpers import load


def test_unknown_code(tmp_path: Path):
    with pytest.raises(ArgumentError, match=r"use one of ml-100k, .*, custom") as caught:
        load("netflix", tmp_path, tmp_path)
    assert (caught.value.argument, caught.value.value) == ("code", "netflix")


def test_custom_needs_both_files(tmp_path: Path):
    with pytest.raises(ArgumentError, match="a file of interactions and a file of items"):
        load("custom", tmp_path, tmp_path, interactions="log.csv")
    assert list(tmp_path.iterdir()) == []
