import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datasets.tables import read_columns, read_interactions, to_numbers
from errors import UserError

COLUMNS = {"user": ["user_id", "uid"], "item": [], "timestamp": [], "rating": []}


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.csv"


def test_columns_by_preference(path: Path):
    path.write_text("uid,item:token, user_id ,more\n1,NA,2,\n")
    table = read_columns(path, {"user": ["user_id", "uid"], "item": []})
    assert table.to_dict("list") == {"user": ["2"], "item": ["NA"]}


def test_columns_by_position(path: Path):
    path.write_text("u,i,1.5,9,more\n")
    columns = {"user": [], "item": [], "rating": [], "timestamp": []}
    table = read_interactions(path, columns, header=False)
    assert list(table.columns) == ["user", "item", "timestamp", "rating"]
    assert table.iloc[0].tolist() == ["u", "i", 9, 1.5]


def test_byte_order_mark_and_quotes(path: Path):
    path.write_bytes('\ufeffuser,item\n"a,b","c\nd"\n'.encode())
    table = read_columns(path, {"user": [], "item": []})
    assert table.to_dict("list") == {"user": ["a,b"], "item": ["c\nd"]}
    for name in ("x.inter", "u.data"):  # here they are part of the text
        path = path.with_name(name)
        path.write_text('user\titem\n"a\tb"\n')
        table = read_columns(path, {"user": [], "item": []}, separator="\t")
        assert table.to_dict("list") == {"user": ['"a'], "item": ['b"']}


@pytest.mark.parametrize("text", ['say "hi"', "a\tb", '"', "plain", "a,b", "two\nlines"])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_what_pandas_writes(path: Path, separator: str, text: str):
    path = path.with_suffix(".csv" if separator == "," else ".tsv")
    pd.DataFrame({"user": [text, "x"], "item": ["y", text]}).to_csv(
        path, sep=separator, index=False
    )
    table = read_columns(path, {"user": [], "item": []}, separator=separator)
    assert table.to_dict("list") == {"user": [text, "x"], "item": ["y", text]}


def test_blank_lines_are_skipped(path: Path):
    path.write_text('\nuser,item\n1,"2\n"\n\n3,"4\n"\n')
    table = read_columns(path, {"user": [], "item": []})
    assert table.to_dict("list") == {"user": ["1", "3"], "item": ["2\n", "4\n"]}


def test_names_in_upper_or_lower_case(path: Path):
    path.write_text("USER, Item,item\n1,2,3\n")
    table = read_columns(path, {"user": [], "item": []})
    assert table.to_dict("list") == {"user": ["1"], "item": ["3"]}
    path.write_text("User_Id,ITEM\n1,2\n")
    table = read_columns(path, {"user": ["user_id"], "item": []})
    assert table.to_dict("list") == {"user": ["1"], "item": ["2"]}


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("2014-07-23", "2014-07-24"),
        ("2014-07-23T18:30:00", "2014-07-23T18:30:00.5"),
        ("2014-07-23T18:30:00+02:00", "2014-07-23T17:00:00Z"),
        ("2014-07-23 18:30", "2014-07-23 18:31"),
    ],
)
def test_dates(path: Path, earlier: str, later: str):
    path.write_text(f"user,item,timestamp\na,1,{earlier}\na,2,{later}\na,3,{earlier}\n")
    first, second, third = read_interactions(path, COLUMNS)["timestamp"]
    assert first == third < second


@pytest.mark.parametrize("wrong", ["23.07.2014", "tomorrow", "", "1406073600"])
def test_dates_that_are_none(path: Path, wrong: str):
    path.write_text(f"user,item,timestamp\na,1,2014-07-23\na,2,{wrong}\n")
    with pytest.raises(UserError, match=f"row 3: timestamp '{wrong}' is neither a number nor a d"):
        read_interactions(path, COLUMNS)


def test_a_folder_or_pipe_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.csv", "folder.csv"):
        with pytest.raises(UserError, match=rf"{name} is not a regular file"):
            read_columns(tmp_path / name, {"user": []})


def test_parquet(tmp_path: Path):
    path = tmp_path / "log.parquet"
    pd.DataFrame({"user": [1, 2], "item": ["a", None], "x": [0.5, 1]}).to_parquet(path)
    table = read_columns(path, {"user": [], "item": []})
    assert table.to_dict("list") == {"user": ["1", "2"], "item": ["a", ""]}


def test_missing_ratings_are_infinite(path: Path):
    path.write_text("user,item,timestamp\na,1,7\n")
    assert read_interactions(path, COLUMNS)["rating"].tolist() == [np.inf]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("user,item,timestamp\n", "is empty"),
        ("name,item\na,1\n", "lacks the column user (or user_id, uid); it has name, item"),
        ("user,item\na,1\n", "lacks the column timestamp; it has user, item"),
        ("user:a,user:b,item,timestamp\na,b,1,1\n", "has two columns user: rename one"),
        ("user,item,timestamp\n,1,1\n", "row 2: user is empty"),
        ("user,item,timestamp\na,1,1\na,,1\n", "row 3: item is empty"),
        ("user,item,timestamp\na,1,1\na,1,now\n", "row 3: timestamp 'now' is not a number"),
        ("user,item,timestamp\na,1,1\na,1,0x1\n", "row 3: timestamp '0x1' is not a number"),
        ("user,item,timestamp,rating\na,1,1,inf\n", "row 2: rating 'inf' is not a number"),
    ],
)  # fmt: skip
def test_unusable_content(content: str, message: str, path: Path):
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_interactions(path, COLUMNS)
    assert str(caught.value) == f"{path} {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'user,item,timestamp\na,"1,1\n', "line 2, saw 2; a quote in it may not be closed"),
        (b"user,item,timestamp\na,1,1,1\n", "its rows have more fields than its first line"),
        (b"user,item,timestamp\na,1,1\na,1,1,1\n", "Expected 3 fields in line 3, saw 4"),
        (b"user,item,timestamp\na,1,1\na,1\n", "Expected 3 fields in line 3, saw 2"),
        (b'user,item,timestamp,note\na,1,1,"x\nb,2,2,y\n', "a quote is never closed"),
    ],
)
def test_unreadable_text(content: bytes, message: str, path: Path):
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_interactions(path, COLUMNS)
    assert str(caught.value).startswith(f"cannot read {path}: ") and message in str(caught.value)


def test_text_in_another_encoding(path: Path):
    path.write_bytes(b"user,item\n\xff,1\n")
    with pytest.raises(UserError) as caught:
        read_interactions(path, COLUMNS)
    assert str(caught.value) == f"{path} is not UTF-8 text: save it in that encoding"


def test_too_few_columns_without_header(path: Path):
    path.write_text("a,1,2\n")
    with pytest.raises(UserError, match="has 3 columns but needs user, item, timestamp, rating"):
        read_columns(path, COLUMNS, header=False)


def test_missing_file(path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_columns(path, COLUMNS)


def test_damaged_parquet(tmp_path: Path):
    path = tmp_path / "log.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"cannot read .*log\.parquet"):
        read_columns(path, COLUMNS)


def test_parquet_that_decompresses_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "log.parquet"
    pd.DataFrame({"user": ["a"] * 10_000}).to_parquet(path)
    monkeypatch.setattr("storage.MAX_UNPACKED_BYTES", 50_000)
    with pytest.raises(UserError, match="unpacks to more than"):
        read_columns(path, {"user": []})


def test_to_numbers_keeps_large_integers():
    values = ["9007199254740993", "-1", "0"]
    numbers = to_numbers(pd.Series(values), Path("x"), first_row=2)
    assert numbers.dtype == np.int64 and numbers.tolist() == [2**53 + 1, -1, 0]
    numbers = to_numbers(pd.Series(["9007199254740993", "007"]), Path("x"), first_row=2)
    assert numbers.dtype == np.int64 and numbers.tolist() == [2**53 + 1, 7]
    numbers = to_numbers(pd.Series(["1", str(2**64)]), Path("x"), first_row=2)
    assert numbers.dtype == np.float64 and numbers.tolist() == [1, 2**64]
    numbers = to_numbers(pd.Series(["1", "0.5"]), Path("x"), first_row=2)
    assert numbers.dtype == np.float64 and numbers.tolist() == [1, 0.5]


# Chunks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("times", [[3, 2**60 + 1, 5, 1, 2], ["2014-07-23", "2015", "2016"]])
def test_chunks_change_nothing(
    suffix: str, times: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ["b", "a", "b", "c", "a"][: len(times)]
    table = pd.DataFrame({"user": names, "item": names[::-1], "timestamp": times, "rating": 1.5})
    path = tmp_path / f"log{suffix}"
    table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path)
    whole, text = read_interactions(path, COLUMNS), read_columns(path, COLUMNS)
    assert whole["user"].tolist() == names and text["user"].tolist() == names
    for rows in (1, 2, 4):
        monkeypatch.setattr("datasets.tables.CHUNK_ROWS", rows)
        pd.testing.assert_frame_equal(read_interactions(path, COLUMNS), whole)
        pd.testing.assert_frame_equal(read_columns(path, COLUMNS), text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,1,1\nb,1,1\n,1,1\n", "row 4: user is empty"),
        ("a,1,1\nb,1,1\nc,1,x\n", "row 4: timestamp 'x' is not a number"),
        ("a,1,1\nb,1,1\nc,1,2014\nd,1,2014-07-23\n", "row 5: timestamp '2014-07-23' is not"),
        ("a,1,2014-07-23\nb,1,2014\nc,1,x\n", "row 4: timestamp 'x' is neither"),
    ],
)
def test_mistakes_in_later_chunks(
    content: str, message: str, path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("datasets.tables.CHUNK_ROWS", 2)
    path.write_text("user,item,timestamp\n" + content)
    with pytest.raises(UserError) as caught:
        read_interactions(path, COLUMNS)
    assert str(caught.value).startswith(f"{path} {message}")
