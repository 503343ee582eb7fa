import gzip
import json
from pathlib import Path

import pytest

from datasets.amazon import read_titles
from errors import UserError
from tests.helpers import load


def write_amazon(folder: Path, metadata: list[str]) -> None:
    (folder / "beauty").mkdir(parents=True)
    rows = [f"u{u},i{i},5.0,{u + i}\n" for u in range(6) for i in range(6)]
    (folder / "beauty" / "ratings_Beauty.csv").write_text("".join(rows))
    with gzip.open(folder / "beauty" / "meta_Beauty.json.gz", "wt") as file:
        file.writelines(line + "\n" for line in metadata)


def test_metadata_in_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture):
    metadata = [f"{{'asin': 'i{i}', 'title': \"It's {i}\"}}" for i in range(3)]
    metadata += [f'{{"asin": "i{i}", "title": "No {i}", "x": null}}' for i in range(3, 6)]
    metadata += ["{'asin': 'i9'}"]
    write_amazon(tmp_path, metadata)
    data = load("beauty", tmp_path, tmp_path / "cache")
    assert data.titles == ["", "It's 0", "It's 1", "It's 2", "No 3", "No 4", "No 5"]
    assert capsys.readouterr().err == (
        "note: the paper reports 22,332 users, 12,086 items, 198,215 interactions for beauty\n"
    )


def test_html_entities_in_titles_are_decoded(tmp_path: Path):
    path = tmp_path / "meta.json.gz"
    titles = {"i1": "A &amp; B&#39;s &eacute;&nbsp;&#10;C", "i2": "A &amp;amp; B", "i3": "A & B; C"}
    lines = [json.dumps({"asin": item, "title": title}) + "\n" for item, title in titles.items()]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    assert read_titles(path) == {"i1": "A & B's é C", "i2": "A &amp; B", "i3": "A & B; C"}


def test_metadata_is_never_executed(tmp_path: Path):
    write_amazon(tmp_path, [f"__import__('pathlib').Path({str(tmp_path / 'x')!r}).touch()"])
    with pytest.raises(UserError, match="row 1"):
        load("beauty", tmp_path, tmp_path / "cache")
    assert not (tmp_path / "x").exists()


GOOD = b"{'asin': 'i1', 'title': 'x'}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(GOOD * 50, mtime=0)[:-12], "is not a complete gzip file (Compressed file"),
        (b"not gzip", "is not a complete gzip file (Not a gzipped file"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (gzip.compress(b"{'asin': 'i1'}\n", mtime=0), "is empty"),
        (gzip.compress(GOOD + b"[1]\n", mtime=0), "row 2: not a record with asin and title"),
        (gzip.compress(GOOD + b"{'asin': 'i2', 't", mtime=0), "row 2: not a record"),
        (gzip.compress(GOOD + b"{'title': 'x'}\n", mtime=0), "row 2: not a record"),
        (gzip.compress(b"[" * 100_000 + b"\n", mtime=0), "row 1: not a record with asin and title"),
        (gzip.compress(GOOD + b"\xff\n", mtime=0), "row 2 is not UTF-8 text"),
        (gzip.compress(b" " * (17 << 20), mtime=0), "row 1: longer than 16,777,216 bytes"),
    ],
)  # fmt: skip
def test_unusable_metadata(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "meta.json.gz"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_titles(path)
    assert str(caught.value).startswith(f"{path} {message}")


def test_missing_metadata(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_titles(tmp_path / "meta.json.gz")


def test_metadata_that_decompresses_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("storage.MAX_UNPACKED_BYTES", 1 << 20)
    path = tmp_path / "meta.json.gz"
    path.write_bytes(gzip.compress(GOOD * 50_000))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_titles(path)
