import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datasets.base import Filters
from datasets.cache import CACHE_FORMAT
from tests.helpers import ROOT, file_names, load, load_custom


@pytest.fixture()
def files(toy: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the toy data's files, to be changed."""
    copies = {name: tmp_path / path.name for name, path in toy.items()}
    for name, path in toy.items():
        copies[name].write_bytes(path.read_bytes())
    return copies


def test_cached_data_equals_what_was_built(
    toy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    built = load_custom(toy, tmp_path)
    cached = load_custom(toy, tmp_path)
    assert capsys.readouterr().err == ""
    for name in ("item_ids", "offsets"):
        assert np.array_equal(getattr(cached, name), getattr(built, name))
        assert getattr(cached, name).dtype == getattr(built, name).dtype
    for name in ("code", "titles", "user_names", "item_names", "fingerprint"):
        assert getattr(cached, name) == getattr(built, name)


def test_other_filters_rebuild(toy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    built = load_custom(toy, tmp_path)
    strict = load_custom(toy, tmp_path, filters=Filters(min_uc=12))
    assert strict.num_users < built.num_users
    note = f"note: {tmp_path / built.code}.npz was built from other files or with other filters"
    assert capsys.readouterr().err == f"{note}: rebuilt\n"


def test_changed_files_are_another_data_set(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    built = load_custom(files, tmp_path / "cache")
    files["items"].write_text(files["items"].read_text().replace("Story", "Tale"))
    changed = load_custom(files, tmp_path / "cache")
    assert "Tale" in changed.titles[1] and changed.fingerprint != built.fingerprint
    assert re.fullmatch("interactions-[0-9a-f]{8}", built.code)
    assert file_names(tmp_path / "cache") == sorted([f"{built.code}.npz", f"{changed.code}.npz"])
    assert capsys.readouterr().err == ""


def test_changed_files_of_a_known_data_set_rebuild(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    rows = "".join(f"{user},{item},5,{user + item}\n" for user in range(6) for item in range(6))
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
    for title in ("Film", "Tale"):
        films = "".join(f"{item},{title} {item}\n" for item in range(6))
        (folder / "movies.csv").write_text("movieId,title\n" + films)
        assert title in load("ml-100k", tmp_path, tmp_path / "cache").titles[1]
    assert file_names(tmp_path / "cache") == ["ml-100k.npz"]
    assert "rebuilt" in capsys.readouterr().err


def test_names_of_files_are_made_safe(files: dict[str, Path], tmp_path: Path):
    named = tmp_path / f"my log/\n{'é' * 60}.csv".replace("/", "\\")
    files["interactions"].rename(named)
    code = load_custom(files | {"interactions": named}, tmp_path / "cache").code
    assert code.startswith("my_log__é") and len(code) == 40 + 9


def test_another_format_rebuilds(
    toy: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    load_custom(toy, tmp_path)
    monkeypatch.setattr("datasets.cache.CACHE_FORMAT", CACHE_FORMAT + 1)
    load_custom(toy, tmp_path)
    assert "rebuilt" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "pickle"])
def test_damaged_cache_is_rebuilt(
    damage: str, toy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    built = load_custom(toy, tmp_path)
    cache = tmp_path / f"{built.code}.npz"
    content = cache.read_bytes()
    if damage == "pickle":
        np.savez(cache, text=np.array([{"key": 1}], dtype=object))
    else:
        damaged = {"truncated": content[: len(content) // 2], "noise": b"noise", "empty": b""}
        cache.write_bytes(damaged[damage])
    rebuilt = load_custom(toy, tmp_path)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: {cache} is damaged (") and note.endswith("): rebuilt")
    assert rebuilt.fingerprint == built.fingerprint and rebuilt.titles == built.titles
    assert np.array_equal(rebuilt.item_ids, built.item_ids)
    assert cache.read_bytes() == content
    load_custom(toy, tmp_path)
    assert capsys.readouterr().err == ""


def test_hash_seed_changes_nothing(toy: dict[str, Path], tmp_path: Path):
    code = (
        "import sys; from datasets import load_dataset; from datasets.base import Filters\n"
        "d = load_dataset('custom', data_root='.', cache_root=sys.argv[3], filters=Filters(),"
        " interactions=sys.argv[1], items=sys.argv[2])\n"
        "print(d.fingerprint, d.user_names, d.item_names)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, toy["interactions"], toy["items"], tmp_path / seed],
            capture_output=True, text=True, check=True, cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for seed in ("0", "1", "77")
    }  # fmt: skip
    assert len(outputs) == 1
