"""No content of a raw file breaks a parser: it is read, or refused in one line that names it."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datasets import amazon, custom, movielens
from datasets.base import Filters
from datasets.preprocessing import build
from errors import UserError

any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# Text -------------------------------------------------------------------------------------------

fields = st.one_of(
    st.sampled_from(
        ["1", "2", "-3", "0.5", "", " ", "nan", "inf", "1e999", "9" * 5000, '"', "'", "\x00", "a,b"]
    ),
    st.text(max_size=4),
)
separators = st.sampled_from([",", "\t", ";", "::"])


@st.composite
def tables(draw: st.DrawFn, header: str) -> bytes:
    """A file that begins with the right header, or anything."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=300))
    separator = "," if "," in header else "\t"
    width = header.count(separator) + 1
    if draw(st.booleans()):
        separator, width = draw(separators), draw(st.integers(0, 5))
    row = st.lists(fields, min_size=width, max_size=width).map(separator.join)
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    mark = draw(st.sampled_from(["", "\ufeff"]))
    return (mark + end.join([header, *draw(st.lists(row, max_size=6))])).encode()


records = st.one_of(
    st.binary(max_size=60),
    st.dictionaries(
        st.sampled_from(["asin", "title", "x"]),
        st.recursive(st.none() | st.integers() | st.text(st.characters(), max_size=5), st.lists),
    ).flatmap(
        lambda x: st.sampled_from([json.dumps(x).encode(), repr(x).encode("utf-8", "replace")])
    ),
)


@any_folder
@given(st.data())
def test_text_files(tmp_path: Path, data: st.DataObject):
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    log = data.draw(tables("user,item,timestamp"))
    good = write("items.csv", b"item,title\n1,One\n2,Two\n")
    custom_titles = write("titles.tsv", data.draw(tables("item_id:token\tname:token_seq")))
    write("ratings.csv", data.draw(tables("userId,movieId,rating,timestamp")))
    write("movies.csv", data.draw(tables("movieId,title,genres")))
    write("ml-100k.inter", data.draw(tables("user_id:token\titem_id:token\trating\ttimestamp")))
    write("ml-100k.item", data.draw(tables("item_id\tmovie_title\trelease_year")))
    write("ratings_Beauty.csv", data.draw(tables("u,i1,5.0,1")))
    lines = b"\n".join(data.draw(st.lists(records, max_size=4)))
    packed = data.draw(st.sampled_from([gzip.compress(lines), gzip.compress(lines)[:-3], lines]))
    write("meta_Beauty.json.gz", packed)
    for source in (
        custom.source(write("log.csv", log), good),
        custom.source(write("log.inter", log), good),
        custom.source(write("log.parquet", log), good),
        custom.source(write("fine.csv", b"user,item,timestamp\na,1,1\n"), custom_titles),
        movielens.latest_small(tmp_path),
        movielens.classic(tmp_path),
        amazon.beauty(tmp_path),
    ):
        try:
            raw = source.read()
            built = build(source.code or "custom", raw, Filters(min_uc=1, min_sc=1))
        except UserError as error:
            message = str(error)
            names_a_file = any(str(path) in message for path in source.files)
            assert "\n" not in message and (
                names_a_file or message.startswith(source.code or "custom")
            )
        else:
            assert np.isfinite(raw.interactions["timestamp"]).all()
            assert all(built.titles[1:]) and all(built.user_names)


# Parquet ----------------------------------------------------------------------------------------

values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.binary(max_size=5), st.datetimes(), st.lists(st.integers(), max_size=2),
)  # fmt: skip


@any_folder
@given(
    st.lists(st.sampled_from(["user", "item", "timestamp", "rating", "x"]), unique=True), st.data()
)
def test_parquet_files(tmp_path: Path, names: list[str], data: st.DataObject):
    columns = {}
    for name in names:
        value = data.draw(st.sampled_from([st.integers(0, 9), st.text(max_size=3), values]))
        columns[name] = data.draw(st.lists(value, min_size=3, max_size=3))
    try:
        pd.DataFrame(columns).to_parquet(tmp_path / "log.parquet")
    except (pa.ArrowException, OverflowError, UnicodeError):
        return  # not every mixture can be written
    (tmp_path / "items.csv").write_text("item,title\n1,One\n")
    try:
        custom.source(tmp_path / "log.parquet", tmp_path / "items.csv").read()
    except UserError as error:
        assert "\n" not in str(error) and "log.parquet" in str(error)
