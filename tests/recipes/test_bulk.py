"""Recommendations for a table of users."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import recommend
from datasets import SequenceDataset
from errors import UserError
from recipes import bulk
from recipes.bulk import MANIFEST
from recipes.people import People
from recipes.recommend import Recommender
from storage import read_json


@pytest.fixture()
def users(toy_data: SequenceDataset, tmp_path: Path) -> Path:
    """A file with all users of the data set and one that it does not know."""
    path = tmp_path / "users.csv"
    pd.DataFrame({"user": [*toy_data.user_names, "stranger"]}).to_csv(path, index=False)
    return path


@pytest.fixture()
def interactions(toy_data: SequenceDataset, tmp_path: Path) -> Path:
    """The interactions of all users, in random order within a user, and some of unknown items."""
    rows = []
    for user, name in enumerate(toy_data.user_names):
        items = toy_data.item_ids[toy_data.offsets[user] : toy_data.offsets[user + 1]]
        own = [(f"new {name}", toy_data.item_names[item], 50 + i) for i, item in enumerate(items)]
        own.append((f"new {name}", "unknown", 10))
        rows += [own[i] for i in np.random.default_rng(user).permutation(len(own))]
    rows.append(("stranger", "unknown", 1))
    path = tmp_path / "interactions.parquet"
    pd.DataFrame(rows, columns=["user", "item", "timestamp"]).to_parquet(path)
    return path


def fill(run: Path, source: Path, output: Path, *flags: str) -> pd.DataFrame:
    recommend.main(
        ["--run", str(run), "--input", str(source), "--output", str(output), "--k", "5",
         "--part_users", "16", "--device", "cpu", *flags]
    )  # fmt: skip
    return read(output)


def read(output: Path) -> pd.DataFrame:
    table = pd.concat(map(pd.read_parquet, sorted(output.glob("*.parquet"))), ignore_index=True)
    pd.testing.assert_frame_equal(table, pd.read_parquet(output))  # which skips the manifest
    return table


def test_users_of_the_data_set(
    retrieved: Path,
    toy_data: SequenceDataset,
    users: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    found = fill(retrieved, users, tmp_path / "out")
    printed = capsys.readouterr()
    assert "users 60, files 4" in printed.out
    assert "note: users not in the data set are left out: 1, the first: stranger" in printed.err
    assert list(found.columns) == ["user", "rank", "item", "title", "retrieved", "retriever"]
    assert found["user"].tolist() == np.repeat(toy_data.user_names, 5).tolist()
    assert found["rank"].tolist() == [1, 2, 3, 4, 5] * 60
    recommender = Recommender(retrieved, toy_data, "cpu", None)
    items = toy_data.item_ids[toy_data.offsets[7] : toy_data.offsets[8]]
    expected = recommender.recommend([items], 5).items[0]
    own = found[found["user"] == toy_data.user_names[7]]
    assert own["item"].tolist() == [toy_data.item_names[item] for item in expected]
    assert own["title"].tolist() == [toy_data.titles[item] for item in expected]
    record = read_json(tmp_path / "out" / MANIFEST)
    assert record["finished"] and record["users"] == 60 and record["skipped"] == 1


def test_interactions_of_new_users(
    retrieved: Path, users: Path, interactions: Path, tmp_path: Path
):
    known = fill(retrieved, users, tmp_path / "known")
    new = fill(retrieved, interactions, tmp_path / "new")
    assert new["user"].tolist() == ("new " + known["user"]).tolist()
    assert new["item"].tolist() == known["item"].tolist()


def test_an_empty_item_is_unknown(toy_data: SequenceDataset, tmp_path: Path):
    path = tmp_path / "log.csv"
    known = toy_data.item_names[7]
    path.write_text(f"user,item,timestamp\nann,,1\nann,{known},2\nbob,,3\n")
    people = People(path, toy_data)
    assert [(person.name, person.history.tolist()) for person in people] == [("ann", [7])]
    assert people.num_skipped == 1 and people.first_skipped == "bob"


def test_files_as_in_custom_data(toy_data: SequenceDataset, tmp_path: Path):
    first, second = toy_data.item_names[7], toy_data.item_names[8]
    contents = {
        "UP.CSV": f'User, Item ,TIME\n"ann",{first},2014-07-24\nann,{second},2014-07-23T12:00\n',
        "log.inter": f"user_id:token\titem_id:token\ttimestamp:float\nann\t{first}\t2\n"
        f"ann\t{second}\t1.5\n",
        "UP.TSV": f"userId\tasin\ttimestamp\nann\t{first}\t2\nann\t{second}\t1\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        people = list(People(tmp_path / name, toy_data))
        assert [(person.name, person.history.tolist()) for person in people] == [("ann", [8, 7])]
    table = pd.DataFrame({"uid": ["u1"], "time": [3]})
    table.to_parquet(tmp_path / "UP.PARQUET")
    (person,) = People(tmp_path / "UP.PARQUET", toy_data)
    assert person.name == "u1" and len(person.history)


@pytest.mark.parametrize("name", ["nobody.csv", "nobody.parquet"])
def test_nobody(retrieved: Path, tmp_path: Path, name: str):
    path = tmp_path / name
    empty = pd.DataFrame({"user": pd.Series([], dtype=str)})
    empty.to_csv(path, index=False) if name.endswith("csv") else empty.to_parquet(path)
    recommend.main(
        ["--run", str(retrieved), "--input", str(path), "--output", str(tmp_path / "out"),
         "--device", "cpu"]
    )  # fmt: skip
    record = read_json(tmp_path / "out" / MANIFEST)
    assert record["finished"] and record["users"] == record["parts"] == 0


def test_an_interrupted_table_is_continued(
    retrieved: Path, users: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fill(retrieved, users, tmp_path / "whole")
    output, tables = tmp_path / "out", []
    make_table = bulk._table

    def interrupted(*args: object) -> object:
        if len(tables) == 2:
            raise KeyboardInterrupt
        tables.append(args)
        return make_table(*args)

    monkeypatch.setattr(bulk, "_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(retrieved, users, output)
    assert len(list(output.glob("*.parquet"))) == 2
    assert not read_json(output / MANIFEST)["finished"]
    monkeypatch.setattr(bulk, "_table", lambda *args: tables.append(args) or make_table(*args))
    with pytest.raises(UserError, match="continue with --resume or replace them with --overwrite"):
        fill(retrieved, users, output)
    fill(retrieved, users, output, "--resume")
    assert len(tables) == 4  # no part twice
    for path in (tmp_path / "whole").iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()
    fill(retrieved, users, output, "--overwrite")
    assert len(tables) == 8


def test_parts_of_something_else_are_not_mixed(retrieved: Path, users: Path, tmp_path: Path):
    fill(retrieved, users, tmp_path / "out")
    users.write_text("user\nu1\n")
    with pytest.raises(
        UserError, match="recommendations of another run, input, --k, --retrieval or --part_us"
    ):
        fill(retrieved, users, tmp_path / "out", "--resume")


def test_output_that_cannot_be_used(retrieved: Path, users: Path, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("")
    for name, message in (("users.csv", "is a file"), ("folder", "holds something else")):
        with pytest.raises(UserError, match=message):
            fill(retrieved, users, tmp_path / name)
    with pytest.raises(UserError, match="--input and --output need each other"):
        recommend.main(["--run", str(retrieved), "--input", str(users)])
    with pytest.raises(UserError, match=r"--input no\.csv: no such file"):
        fill(retrieved, Path("no.csv"), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name\nu1\n", "lacks the column user"),
        ("a.csv", "user,item\nu1,i1\n", "lacks the column timestamp"),
        (
            "a.tsv",
            "user\titem\ttimestamp\nu1\ti1\tyesterday\n",
            "row 2: timestamp 'yesterday' is neither a number nor a date",
        ),
        ("a.csv", "user,item,timestamp\nu1,i1\n", "is damaged"),
        ("a.parquet", "user\nu1\n", "is damaged"),
        ("a.csv", "", "is damaged"),
        ("a.txt", "user\nu1\n", r"its name must end in \.csv"),
        ("a.csv", "user,user\nu1,u1\n", "has two columns user: rename one"),
    ],
)
def test_files_that_cannot_be_used(
    toy_data: SequenceDataset, tmp_path: Path, name: str, content: str, message: str
):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        list(People(path, toy_data))


def test_a_user_who_appears_again(
    toy_data: SequenceDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    item, path = toy_data.item_names[7], tmp_path / "log.csv"
    rows = (f"{user},{item},1\n" for user in ("ann", "ann", "bob", "ann"))
    path.write_text("user,item,timestamp\n" + "".join(rows))
    with pytest.raises(UserError, match=r"log\.csv row 5: user 'ann' appears again after others"):
        list(People(path, toy_data))
    monkeypatch.setattr("recipes.people.RECENT", 1)  # ann is no longer remembered
    assert [person.name for person in People(path, toy_data)] == ["ann", "bob", "ann"]


def test_a_bad_row_is_found_before_anything_is_written(
    retrieved: Path, users: Path, toy_data: SequenceDataset, tmp_path: Path
):
    item, path, output = toy_data.item_names[7], tmp_path / "log.csv", tmp_path / "out"
    rows = [f"user {number},{item},1\n" for number in range(40)]
    path.write_text("user,item,timestamp\n" + "".join(rows) + f"late,{item},yesterday\n")
    with pytest.raises(UserError, match="row 42: timestamp 'yesterday'"):
        fill(retrieved, path, output)
    assert not output.exists()
    earlier = fill(retrieved, users, output)
    with pytest.raises(UserError, match="row 42"):
        fill(retrieved, path, output, "--overwrite")
    pd.testing.assert_frame_equal(read(output), earlier)


def test_faiss_is_optional(retrieved: Path, users: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recommend.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        fill(retrieved, users, users.parent / "out", "--retrieval", "approximate")
    assert str(caught.value) == (
        "--retrieval approximate needs faiss: pip install -r requirements-faiss.txt"
    )
    assert not (users.parent / "out").exists()


def test_exact_and_approximate_parts_are_not_mixed(retrieved: Path, users: Path, tmp_path: Path):
    pytest.importorskip("faiss")
    exact, output = fill(retrieved, users, tmp_path / "exact"), tmp_path / "out"
    found = fill(retrieved, users, output, "--retrieval", "approximate")
    assert found["user"].tolist() == exact["user"].tolist()
    assert (found["retriever"] <= exact["retriever"] + 1e-5).all()
    with pytest.raises(UserError, match="of another run, input, --k, --retrieval or --part_users"):
        fill(retrieved, users, output, "--resume")
