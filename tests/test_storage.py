import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import InputError, UserError
from storage import (
    atomic_folder,
    atomic_path,
    check_unpacked_size,
    describe,
    map_arrays,
    read_arrays,
    read_json,
    reading,
    remove_temporary_files,
    temporary_unless_used,
    write_arrays,
    write_json,
    write_mappable_arrays,
)
from tests.helpers import file_names


class Stop(Exception):
    """An error that no code handles."""


def test_describe():
    assert describe(FileNotFoundError(2, "No such file", "x")) == "No such file"
    assert describe(ValueError("a\n  b")) == "a b"
    assert describe(KeyError()) == "KeyError"
    assert describe(KeyError("users")) == "no 'users'"
    assert describe(KeyError("x is not a file in the archive")) == "x is not a file in the archive"
    assert len(describe(ValueError("x" * 999))) == 200


# Atomic writes ----------------------------------------------------------------------------------


def test_atomic_path_replaces_the_file_at_the_end(tmp_path: Path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent and path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_atomic_path_keeps_the_file_if_the_block_fails(tmp_path: Path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(Stop), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise Stop
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_path_makes_folders_only_for_a_file(tmp_path: Path):
    path = tmp_path / "a" / "b" / "f.txt"
    with pytest.raises(Stop), atomic_path(path):
        raise Stop
    assert list(tmp_path.iterdir()) == []
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_atomic_path_sets_ordinary_permissions(tmp_path: Path):
    plain, path = tmp_path / "plain", tmp_path / "f.txt"
    plain.touch()
    with atomic_path(path) as temporary:
        temporary.touch(mode=0o600)
    assert path.stat().st_mode == plain.stat().st_mode


def test_atomic_path_names_the_file_it_cannot_write(tmp_path: Path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "f.txt"
    with pytest.raises(UserError) as caught, atomic_path(path) as temporary:
        temporary.write_text("new")
    assert str(caught.value).startswith(f"cannot write {path}: ")


def test_atomic_folder_replaces_the_folder_at_the_end(tmp_path: Path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with atomic_folder(path) as temporary:
        (temporary / "new").touch()
        assert [file.name for file in path.iterdir()] == ["old"]
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_folder_keeps_the_folder_if_the_block_fails(tmp_path: Path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(Stop), atomic_folder(path) as temporary:
        (temporary / "new").touch()
        raise Stop
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_folder_names_the_folder_it_cannot_write(tmp_path: Path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "folder"
    with pytest.raises(UserError) as caught, atomic_folder(path):
        pass
    assert str(caught.value).startswith(f"cannot write {path}: ")


def test_temporary_unless_used(tmp_path: Path):
    folder = tmp_path / "a" / "b"
    with temporary_unless_used(folder):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    with temporary_unless_used(folder):
        (folder / "f.txt").touch()
    assert (folder / "f.txt").exists()


def test_temporary_unless_used_keeps_what_existed(tmp_path: Path):
    folder = tmp_path / "a"
    folder.mkdir()
    with pytest.raises(Stop), temporary_unless_used(folder / "b"):
        raise Stop
    assert folder.is_dir() and list(folder.iterdir()) == []


def test_remove_temporary_files(tmp_path: Path):
    left = [tmp_path / name for name in ("f.txt", ".hidden", "g.tmp")]
    for path in (*left, tmp_path / f".f.txt.{os.getpid()}.tmp", tmp_path / ".tmpAbC123"):
        path.touch()
    folder = tmp_path / ".adapter.7.tmp"
    folder.mkdir()
    (folder / "inside").touch()
    remove_temporary_files(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(left)


# Guarded reads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError("bad"), Stop("bad")])
def test_reading_names_the_file(error: Exception):
    with pytest.raises(InputError) as caught, reading(Path("f.npz")):
        raise error
    assert str(caught.value) == "f.npz is damaged (bad)" and caught.value.__cause__ is error


def test_reading_passes_on_messages_for_the_user():
    error = UserError("complete")
    with pytest.raises(UserError) as caught, reading(Path("f.npz")):
        raise error
    assert caught.value is error


def test_reading_passes_on_interrupts():
    with pytest.raises(KeyboardInterrupt), reading(Path("f.npz")):
        raise KeyboardInterrupt


def test_check_unpacked_size():
    check_unpacked_size(Path("f.zip"), 4 << 30)
    with pytest.raises(UserError, match=r"f\.zip unpacks to more than 4 GiB"):
        check_unpacked_size(Path("f.zip"), (4 << 30) + 1)


# Arrays -----------------------------------------------------------------------------------------


def test_arrays_round_trip(tmp_path: Path):
    path = tmp_path / "a.npz"
    arrays = {"x": np.arange(6, dtype=np.int32).reshape(2, 3), "name": np.array("text")}
    write_arrays(path, **arrays)
    loaded = read_arrays(path)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(loaded[name], array) and loaded[name].dtype == array.dtype


def test_arrays_of_the_same_values_are_the_same_bytes(tmp_path: Path):
    buffer = io.BytesIO()
    np.savez(buffer, x=np.arange(9), y=np.ones(2))
    write_arrays(tmp_path / "a.npz", x=np.arange(9), y=np.ones(2))
    assert (tmp_path / "a.npz").read_bytes() == buffer.getvalue()


def test_arrays_are_read_without_pickle(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="allow_pickle=False"), reading(path):
        read_arrays(path)


def test_arrays_that_decompress_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros(1000), y=np.zeros(1000))
    size = sum(member.file_size for member in zipfile.ZipFile(path).infolist())
    assert path.stat().st_size < size / 10
    monkeypatch.setattr("storage.MAX_UNPACKED_BYTES", size)
    read_arrays(path)
    monkeypatch.setattr("storage.MAX_UNPACKED_BYTES", size - 1)
    with pytest.raises(UserError, match="unpacks to more than"):
        read_arrays(path)


@pytest.mark.parametrize("content", [b"", b"noise", b"PK\x03\x04"])
def test_damaged_arrays(content: bytes, tmp_path: Path):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"), reading(path):
        read_arrays(path)


# JSON -------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.text()
        | st.floats(allow_nan=False) | st.lists(st.floats(allow_nan=False)),
    )
)  # fmt: skip
def test_json_round_trip_is_exact(tmp_path: Path, value: dict):
    write_json(tmp_path / "f.json", value)
    assert read_json(tmp_path / "f.json") == value


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "it holds no JSON object"),
    ],
)
def test_unreadable_json(content: bytes, problem: str, tmp_path: Path):
    path = tmp_path / "f.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"cannot read {path}: ")


def test_missing_json(tmp_path: Path):
    with pytest.raises(UserError, match="No such file or directory"):
        read_json(tmp_path / "f.json")


# Mapped arrays ----------------------------------------------------------------------------------


def test_mapped_arrays_share_the_file(tmp_path: Path):
    path = tmp_path / "x.npz"
    arrays = {"a": np.arange(7, dtype=np.int32), "text": np.frombuffer(b"x", np.uint8)}
    arrays |= {"longer_name": np.arange(6.0).reshape(2, 3)}
    write_mappable_arrays(path, **arrays)
    with reading(path):
        mapped = map_arrays(path)
    for found in (mapped, read_arrays(path), np.load(path)):
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert np.array_equal(found[name], array) and found[name].dtype == array.dtype
    for array in mapped.values():
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
        assert array.ctypes.data % 64 == 0
    before = mapped["a"]
    write_mappable_arrays(path, a=np.zeros(7, np.int32))  # another file takes its name
    assert before.tolist() == list(range(7)) and file_names(tmp_path) == ["x.npz"]


def test_arrays_of_numpys_own_files_are_read(tmp_path: Path):
    write_arrays(tmp_path / "x.npz", a=np.arange(7, dtype=np.int64), name=np.arange(3.0))
    mapped = map_arrays(tmp_path / "x.npz")
    assert mapped["a"].tolist() == list(range(7)) and mapped["name"].flags.aligned


@pytest.mark.parametrize("damage", ["byte", "compressed", "pickle", "end"])
def test_what_cannot_be_mapped(damage: str, tmp_path: Path):
    path = tmp_path / "x.npz"
    write_mappable_arrays(path, a=np.arange(100))
    content = bytearray(path.read_bytes())
    if damage == "byte":
        content[400] ^= 1
        path.write_bytes(content)
    elif damage == "end":
        path.write_bytes(content[:600])
    elif damage == "compressed":
        np.savez_compressed(path, a=np.arange(100))
    else:
        np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"x\.npz is damaged"), reading(path):
        map_arrays(path)
