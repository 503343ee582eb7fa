from pathlib import Path

import pandas as pd
import pytest

from datasets import custom
from errors import UserError
from tests.helpers import load_custom

FORMATS = {
    "tsv": lambda table, path: table.to_csv(path, sep="\t", index=False),
    "parquet": lambda table, path: table.to_parquet(path),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_give_the_same_data(suffix: str, toy: dict[str, Path], tmp_path: Path):
    expected = load_custom(toy, tmp_path / "csv")
    table, items = (pd.read_csv(toy[name], dtype=str) for name in ("interactions", "items"))
    files = {name: tmp_path / f"{name}.{suffix}" for name in ("interactions", "items")}
    FORMATS[suffix](table.astype({"timestamp": int}), files["interactions"])
    FORMATS[suffix](items, files["items"])
    assert load_custom(files, tmp_path / suffix).fingerprint == expected.fingerprint


def test_recbole_files_give_the_same_data(toy: dict[str, Path], tmp_path: Path):
    expected = load_custom(toy, tmp_path / "csv")
    table, items = (pd.read_csv(toy[name], dtype=str) for name in ("interactions", "items"))
    files = {"interactions": tmp_path / "x.inter", "items": tmp_path / "x.item"}
    table.set_axis(["user_id:token", "item_id:token", "timestamp:float"], axis=1).to_csv(
        files["interactions"], sep="\t", index=False
    )
    items.set_axis(["item_id:token", "movie_title:token_seq"], axis=1).to_csv(
        files["items"], sep="\t", index=False
    )
    assert load_custom(files, tmp_path / "recbole").fingerprint == expected.fingerprint


@pytest.mark.parametrize("title", ["", " \t", "\u200b"])
def test_every_item_needs_a_title(title: str, toy: dict[str, Path], tmp_path: Path):
    items = tmp_path / "items.csv"
    items.write_text(toy["items"].read_text().replace("The i7 Story, part 7", title))
    with pytest.raises(UserError, match=r"no title for 1 of the items .* the first is 'i7'"):
        custom.source(toy["interactions"], items).read()


def test_the_last_of_several_titles_counts(
    toy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    items = tmp_path / "ITEMS.CSV"
    items.write_text(toy["items"].read_text() + 'i7,Another Story\ni8,"The i8 Story, part 8"\n')
    assert custom.source(toy["interactions"], items).read().titles["i7"] == "Another Story"
    printed = capsys.readouterr().err
    assert f"note: {items}: 1 items have several titles" in printed and "item is i7" in printed


def test_titles_that_look_missing_are_pointed_out(
    toy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    items = tmp_path / "items.csv"
    items.write_text(toy["items"].read_text().replace('"The i7 Story, part 7"', "NaN"))
    assert custom.source(toy["interactions"], items).read().titles["i7"] == "NaN"
    assert capsys.readouterr().err == (
        f"note: {items}: 1 items are titled 'NaN', which looks like a missing title; the first "
        "such item is i7\n"
    )
    custom.source(toy["interactions"], toy["items"]).read()
    assert capsys.readouterr().err == ""


def test_unknown_extension(tmp_path: Path):
    with pytest.raises(UserError, match=r"log\.xlsx: its name must end in \.csv"):
        custom.source(tmp_path / "log.xlsx", tmp_path / "items.csv")
