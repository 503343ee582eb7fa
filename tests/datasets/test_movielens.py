from pathlib import Path

import pytest

from datasets.movielens import movie_title
from tests.helpers import ROOT, downloaded, load


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("Usual Suspects, The (1995)", "The Usual Suspects (1995)"),
        ("City of Lost Children, The (Cité des enfants perdus, La) (1995)",
         "The City of Lost Children (1995)"),
        ("American President, The (1995) ", "The American President (1995)"),
        ("Babylon 5", "Babylon 5"),
        ("Good, the Bad and the Ugly, The (Buono, il brutto, Il) (1966)",
         "The Good, the Bad and the Ugly (1966)"),
        ("Fistful of Dollars, A (1964)", "A Fistful of Dollars (1964)"),
        ("(500) Days of Summer (2009)", "Days of Summer (2009)"),
        ("(2009)", ""),
        ("(M)", "(M)"),
        ("Death Note (2006–2007)", "Death Note (2006–2007)"),
    ],
)  # fmt: skip
def test_movie_title(raw: str, clean: str):
    assert movie_title(raw) == clean


def test_classic_from_the_package_index(tmp_path: Path):
    data = downloaded(lambda: load("ml-100k-classic", ROOT / "data", tmp_path))
    assert (data.num_users, data.num_items, len(data.item_ids)) == (943, 1349, 99287)
    assert data.titles[data.item_names.index("12")] == "The Usual Suspects (1995)"


def test_classic_files(tmp_path: Path):
    folder = tmp_path / "ml-100k-classic"
    folder.mkdir()
    rows = "".join(f"{user}\t{item}\t5\t{item}\n" for user in range(6) for item in range(6))
    (folder / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + rows
    )
    items = "".join(f'{item}\t"Film {item}", The\t199{item}\tDrama\n' for item in range(5))
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        + items + "5\t \t1995\tDrama\n"
    )  # fmt: skip
    data = load("ml-100k-classic", tmp_path, tmp_path / "cache")
    assert data.num_items == 5  # the last item has no title
    assert data.titles[1:3] == ['The "Film 0" (1990)', 'The "Film 1" (1991)']
