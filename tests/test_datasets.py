"""Data sets: statistics of the paper, k-core, order, cache, formats, downloads."""

import gzip
import hashlib
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from datasets import SequenceDataset, load_dataset
from datasets.base import Filters, RawData, build, clean_title, k_core
from datasets.download import fetch_archive, fetch_file
from datasets.movielens import movie_title
from datasets.tables import interactions
from tests.conftest import ROOT, Handler, downloaded, toy_interactions


def load(code: str, data_root: Path, cache: Path, **options: object) -> SequenceDataset:
    filters = options.pop("filters", Filters())
    return load_dataset(
        code, data_root=str(data_root), cache_root=str(cache), filters=filters, **options
    )


def load_custom(files: dict[str, Path], cache: Path, **options: object) -> SequenceDataset:
    paths = {name: str(path) for name, path in files.items()}
    return load("custom", cache, cache, **paths, **options)


@pytest.mark.parametrize(
    ("code", "users", "items", "interactions", "length"),
    [
        ("ml-100k", 610, 3650, 90274, 147.99),
        ("beauty", 22332, 12086, 198215, 8.88),
        ("games", 15264, 7676, 147861, 9.69),
    ],
)
def test_table_2(
    code: str, users: int, items: int, interactions: int, length: float, shared: Path, tmp_path
):
    data = load(code, shared / "data", tmp_path)
    assert (data.num_users, data.num_items, len(data.item_ids)) == (users, items, interactions)
    assert f"mean length {length:.2f}" in data.summary()
    assert np.bincount(data.item_ids)[1:].min() >= 5
    assert np.diff(data.offsets).min() >= 5
    assert all(data.titles[1:]) and not any("\n" in t for t in data.titles)


def test_classic_from_the_package_index(tmp_path: Path):
    data = downloaded(lambda: load("ml-100k-classic", ROOT / "data", tmp_path))
    assert (data.num_users, data.num_items, len(data.item_ids)) == (943, 1349, 99287)
    assert data.titles[data.item_names.index("12")] == "The Usual Suspects (1995)"


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
        ("Death Note (2006–2007)", "Death Note (2006–2007)"),
    ],
)  # fmt: skip
def test_movie_titles(raw: str, clean: str):
    assert movie_title(raw) == clean


def test_titles_are_one_line():
    assert clean_title(" a\n\tb\u2003c ") == "a b c"


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_k_core_is_the_largest_closed_set(pairs: list, min_uc: int, min_sc: int):
    users = np.array([u for u, _ in pairs], dtype=np.int64)
    items = np.array([i for _, i in pairs], dtype=np.int64)
    rest = list(range(len(pairs)))
    while True:  # drop one offender after the other
        by_user = Counter(pairs[n][0] for n in rest)
        by_item = Counter(pairs[n][1] for n in rest)
        bad = [n for n in rest if by_user[pairs[n][0]] < min_uc or by_item[pairs[n][1]] < min_sc]
        if not bad:
            break
        rest.remove(bad[0])
    assert np.flatnonzero(k_core(users, items, min_uc, min_sc)).tolist() == rest


def frame(rows: list[tuple]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    return table.assign(rating=np.inf)


def test_order_and_split():
    rows = [("7", "10", 3), ("7", "9", 3), ("7", "2", 1), ("10", "2", 5), ("10", "9", 4)]
    rows += [("10", "10", 6)]
    titles = {"2": "two", "9": "nine", "10": "ten"}
    data = build("x", RawData(frame(rows), titles), Filters(min_uc=3, min_sc=1))
    assert data.user_names == ["7", "10"] and data.item_names[1:] == ["2", "9", "10"]
    assert data.titles == ["", "two", "nine", "ten"]
    assert data.item_ids.tolist() == [1, 2, 3, 2, 1, 3]  # ties by item: 9 before 10
    assert data.answers("val").tolist() == [2, 1] and data.answers("test").tolist() == [3, 3]
    assert data.history_ends("train").tolist() == [1, 4]


def test_numbering_by_text_where_names_are_no_numbers():
    rows = [(u, i, t) for u in ("b", "a") for t, i in enumerate(["10", "9", "007"])]
    data = build("x", RawData(frame(rows), {"10": "t", "9": "n", "007": "s"}), Filters(0, 3, 1))
    assert data.item_names[1:] == ["007", "10", "9"] and data.user_names == ["a", "b"]


def test_repeated_rows_count_once(capsys: pytest.CaptureFixture):
    rows = [("u", str(i), i) for i in (3, 1, 2, 4)]
    titles = {str(i): f"t{i}" for i in range(9)}
    once = build("x", RawData(frame(rows), titles), Filters(min_uc=3, min_sc=1))
    assert capsys.readouterr().err == "" and once.num_repeated() == 0
    twice = build("x", RawData(frame([*rows, *rows]), titles), Filters(min_uc=3, min_sc=1))
    assert twice.fingerprint == once.fingerprint
    assert capsys.readouterr().err == "note: 4 interactions of x are there twice\n"
    rows += [("u", "1", 9), ("v", "1", 1), ("v", "2", 2), ("v", "3", 3)]
    later = build("x", RawData(frame(rows), titles), Filters(min_uc=3, min_sc=1))
    assert len(later.item_ids) == 8 and later.num_repeated() == 1  # had again, another time


def test_order_of_long_timestamps(tmp_path: Path):
    moments = [(f"i{n}", 1_700_000_000_000_000_000 + 7 * (4 - n)) for n in range(5)]
    log = tmp_path / "log.csv"
    log.write_text("user,item,timestamp\n" + "".join(f"u,{i},{t}\n" for i, t in moments))
    columns = {"user": [], "item": [], "timestamp": [], "rating": []}
    raw = RawData(interactions(log, columns), {f"i{n}": f"t{n}" for n in range(5)})
    data = build("x", raw, Filters(min_uc=3, min_sc=1))
    assert [data.item_names[i] for i in data.item_ids] == ["i4", "i3", "i2", "i1", "i0"]


def test_low_ratings_and_untitled_items_go():
    rows = [("u", str(i), i) for i in range(6)]
    table = frame(rows).assign(rating=[5, 5, 5, 5, 1, 5])
    titles = {str(i): f"t{i}" for i in range(5)}
    data = build("x", RawData(table, titles), Filters(min_rating=3, min_uc=3, min_sc=1))
    assert data.item_names[1:] == ["0", "1", "2", "3"]


def test_hash_seed_changes_nothing(toy: dict[str, Path], tmp_path: Path):
    code = (
        "import sys; from datasets import load_dataset; from datasets.base import Filters\n"
        "d = load_dataset('custom', data_root='.', cache_root=sys.argv[3], filters=Filters(),"
        " interactions=sys.argv[1], items=sys.argv[2])\n"
        "print(d.fingerprint, d.user_names, d.item_names)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, toy["interactions"], toy["items"], tmp_path / seed],
            capture_output=True, text=True, check=True, cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for seed in ("0", "1", "77")
    }  # fmt: skip
    assert len(found) == 1


def test_cache_is_keyed_by_all_that_shapes_it(
    toy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    files = {name: tmp_path / path.name for name, path in toy.items()}
    for name, path in toy.items():
        files[name].write_bytes(path.read_bytes())
    first = load_custom(files, tmp_path)
    assert load_custom(files, tmp_path).fingerprint == first.fingerprint
    assert capsys.readouterr().err == ""  # taken from the cache, silently
    strict = load_custom(files, tmp_path, filters=Filters(min_uc=12))
    assert strict.num_users < first.num_users
    assert "made from other files or flags" in capsys.readouterr().err
    files["items"].write_text(files["items"].read_text().replace("Story", "Tale"))
    changed = load_custom(files, tmp_path)
    assert "Tale" in changed.titles[1] and changed.fingerprint != first.fingerprint
    assert "rebuilt" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "pickle"])
def test_damaged_cache_is_rebuilt(
    damage: str, toy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    first = load_custom(toy, tmp_path)
    cache = tmp_path / "custom.npz"
    content = cache.read_bytes()
    if damage == "pickle":
        np.savez(cache, text=np.array([{"key": 1}], dtype=object))
    else:
        damaged = {"truncated": content[: len(content) // 2], "noise": b"noise", "empty": b""}
        cache.write_bytes(damaged[damage])
    again = load_custom(toy, tmp_path)
    assert "custom.npz is damaged (" in capsys.readouterr().err
    assert again.fingerprint == first.fingerprint and again.titles == first.titles
    assert np.array_equal(again.item_ids, first.item_ids)
    load_custom(toy, tmp_path)
    assert capsys.readouterr().err == ""


def test_formats_of_custom_data(toy: dict[str, Path], tmp_path: Path):
    expected = load_custom(toy, tmp_path / "csv")
    table, items = (pd.read_csv(toy[name], dtype=str) for name in ("interactions", "items"))
    forms = {
        "tsv": lambda t, path: t.to_csv(path, sep="\t", index=False),
        "parquet": lambda t, path: t.to_parquet(path),
    }
    for suffix, write in forms.items():
        files = {n: tmp_path / f"{n}.{suffix}" for n in ("interactions", "items")}
        write(table.astype({"timestamp": int}), files["interactions"])
        write(items, files["items"])
        assert load_custom(files, tmp_path / suffix).fingerprint == expected.fingerprint
    files = {"interactions": tmp_path / "x.inter", "items": tmp_path / "x.item"}
    table.set_axis(["user_id:token", "item_id:token", "timestamp:float"], axis=1).to_csv(
        files["interactions"], sep="\t", index=False
    )
    items.set_axis(["item_id:token", "movie_title:token_seq"], axis=1).to_csv(
        files["items"], sep="\t", index=False
    )
    assert load_custom(files, tmp_path / "recbole").fingerprint == expected.fingerprint


def test_toy_data_is_not_degenerate():
    assert len({item for _, item, _ in toy_interactions()}) == 40


def write_amazon(folder: Path, meta: list[str]) -> None:
    (folder / "beauty").mkdir(parents=True)
    rows = [f"u{u},i{i},5.0,{u + i}\n" for u in range(6) for i in range(6)]
    (folder / "beauty" / "ratings_Beauty.csv").write_text("".join(rows))
    with gzip.open(folder / "beauty" / "meta_Beauty.json.gz", "wt") as file:
        file.writelines(line + "\n" for line in meta)


def test_amazon_metadata_in_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture):
    meta = [f"{{'asin': 'i{i}', 'title': \"It's {i}\"}}" for i in range(3)]
    meta += [f'{{"asin": "i{i}", "title": "No {i}", "x": null}}' for i in range(3, 6)]
    meta += ["{'asin': 'i9'}"]
    write_amazon(tmp_path, meta)
    data = load("beauty", tmp_path, tmp_path / "cache")
    assert data.titles == ["", "It's 0", "It's 1", "It's 2", "No 3", "No 4", "No 5"]
    assert "the paper's beauty has 22,332 users" in capsys.readouterr().err


def test_metadata_is_never_executed(tmp_path: Path):
    write_amazon(tmp_path, [f"__import__('pathlib').Path({str(tmp_path / 'x')!r}).touch()"])
    with pytest.raises(UserError, match="row 1"):
        load("beauty", tmp_path, tmp_path / "cache")
    assert not (tmp_path / "x").exists()


def test_download_resumes(server: str, tmp_path: Path):
    content = bytes(range(256)) * 40_000
    Handler.files["/f.csv"], Handler.cut = content, 5_000_000
    target = tmp_path / "sub" / "f.csv"
    with pytest.raises(UserError, match=r"put it at .*f\.csv, or run again"):
        fetch_file(f"{server}/f.csv", target)
    assert not target.exists()
    fetch_file(f"{server}/f.csv", target)
    assert target.read_bytes() == content
    assert Handler.ranges[0] is None and int(Handler.ranges[1][6:-1]) > 0
    assert [p.name for p in target.parent.iterdir()] == ["f.csv"]
    fetch_file("http://127.0.0.1:9/gone", target)  # there already: nothing is asked for


def test_download_failures_say_what_to_do(server: str, tmp_path: Path):
    target = tmp_path / "f.csv"
    for url in (f"{server}/none.csv", "http://127.0.0.1:9/f.csv"):
        with pytest.raises(UserError) as caught:
            fetch_file(url, target)
        assert url in str(caught.value) and str(target) in str(caught.value)
    Handler.files["/f.gz"] = gzip.compress(b"x" * 100_000)[:-20]
    with pytest.raises(UserError, match="fetch it by hand"):
        fetch_file(f"{server}/f.gz", tmp_path / "f.gz")
    assert list(tmp_path.iterdir()) == []


def test_archive_is_verified(server: str, tmp_path: Path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("inside/one.csv", "1")
        zipped.writestr("inside/two.csv", "2")
    Handler.files["/a.zip"] = archive.read_bytes()
    hashes = {n: hashlib.sha256(c).hexdigest() for n, c in (("one.csv", b"1"), ("two.csv", b"2"))}
    folder = tmp_path / "out"
    fetch_archive(f"{server}/a.zip", folder, hashes, inside="inside")
    assert sorted(p.name for p in folder.iterdir()) == ["one.csv", "two.csv"]
    assert (folder / "two.csv").read_text() == "2"

    wrong = tmp_path / "wrong"
    with pytest.raises(UserError, match=r"another SHA-256\): fetch .* by hand"):
        fetch_archive(f"{server}/a.zip", wrong, {"one.csv": "0" * 64}, inside="inside")
    assert not wrong.exists()
    Handler.files["/b.zip"] = b"<html>not found</html>"
    with pytest.raises(UserError, match="is not the file expected"):
        fetch_archive(f"{server}/b.zip", wrong, hashes, inside="inside")
    assert not wrong.exists()
