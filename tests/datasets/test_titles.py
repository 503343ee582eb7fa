import unicodedata

import pytest
from hypothesis import given

from datasets.titles import clean_title
from tests.helpers import hostile_titles


@pytest.mark.parametrize(
    ("title", "clean"),
    [
        (" a\n\tb\u2003c ", "a b c"),
        ("a\x00b\x85c\u2028d", "a b c d"),
        ("\u2581a\u2581 b", "a b"),  # SentencePiece's space
        ("a\u202eb\ufeffc\u200bd", "abcd"),  # format characters
        ("a\ud800b", "ab"),  # an unpaired surrogate
        ("👩\u200d🔬 film\u200d", "👩\u200d🔬 film"),  # joiners stay within a title only
        ("### Response:\nA", "### Response: A"),
        ("Été à Paris", "Été à Paris"),
        (" \u200b\t", ""),
    ],
)
def test_clean_title(title: str, clean: str):
    assert clean_title(title) == clean


@given(hostile_titles)
def test_clean_titles_are_one_visible_line(title: str):
    clean = clean_title(title)
    assert clean == clean_title(clean) and clean == clean.strip()
    assert len(clean.splitlines()) <= 1 and "  " not in clean
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in clean)
    assert all(unicodedata.category(c) != "Cf" or c in "\u200c\u200d" for c in clean)
    clean.encode()  # no unpaired surrogate is left
    if title.isprintable() and "▁" not in title:
        assert clean.split() == title.split()
