"""What comes from elsewhere is not run and may not choose paths or sizes; secrets stay secret."""

import ast
import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from datasets.download import fetch_archive, fetch_file, fetch_wheel
from datasets.tables import amazon_titles
from storage import read_arrays
from tests.conftest import ROOT, Handler, run_script

SOURCES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in ("tests", ".venv", "data")
]
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
OPTIONS = {"allow_pickle", "trust_remote_code", "shell"}


def dangers(source: str) -> list[str]:
    """Imports, calls and options that run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in CALLS else []
            found += [
                f"{name}({word.arg})"
                for word in node.keywords
                if word.arg in OPTIONS and ast.unparse(word.value) != "False"
            ]
            if name in ("np.load", "numpy.load"):
                found += [] if any(x.arg == "allow_pickle" for x in node.keywords) else [name]
    return found


def test_no_source_runs_what_a_file_says():
    assert len(SOURCES) > 30
    assert {
        path.name: dangers(path.read_text()) for path in SOURCES if dangers(path.read_text())
    } == {}
    for bad in (
        "import pickle",
        "eval(x)",
        "torch.load(f)",
        "np.load(f)",
        "np.load(f, allow_pickle=y)",
    ):
        assert dangers(bad)


def test_members_of_an_archive_go_nowhere_else(server: str, tmp_path: Path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("inside/one.csv", "1")
        zipped.writestr("inside/../../../escaped.csv", "2")
        zipped.writestr("/escaped.csv", "2")
    Handler.files["/a.zip"] = archive.read_bytes()
    folder = tmp_path / "deep" / "er"
    one = hashlib.sha256(b"1").hexdigest()
    fetch_archive(f"{server}/a.zip", folder, {"one.csv": one}, inside="inside")
    assert [path.name for path in tmp_path.rglob("*.csv")] == ["one.csv"]
    assert not Path("/escaped.csv").exists()


@pytest.fixture()
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.MAX_UNPACKED", 1 << 20)


def test_archives_may_not_unpack_without_end(server: str, tmp_path: Path, small_limit: None):
    zeros = bytes(2 << 20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("inside/one.csv", zeros)
    Handler.files = {"/a.zip": (tmp_path / "a.zip").read_bytes(), "/a.gz": gzip.compress(zeros)}
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="unpacks to more than"):
        fetch_archive(f"{server}/a.zip", folder, {"one.csv": "0" * 64}, inside="inside")
    assert not folder.exists()
    with pytest.raises(UserError, match="unpacks to more than"):
        fetch_file(f"{server}/a.gz", folder / "a.gz")
    assert not folder.exists()
    (tmp_path / "lines.gz").write_bytes(gzip.compress(b'{"asin": "1", "title": "x"}\n' * 99_999))
    with pytest.raises(UserError, match="unpacks to more than"):
        amazon_titles(tmp_path / "lines.gz")
    np.savez_compressed(tmp_path / "a.npz", items=np.zeros(1 << 20))
    with pytest.raises(UserError, match="unpacks to more than"):
        read_arrays(tmp_path / "a.npz")


def make_wheel(folder: Path) -> tuple[Path, str]:
    folder.mkdir()
    path = folder / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("toy/data.csv", "1")
        zipped.writestr("toy/setup.py", "raise SystemExit")
        zipped.writestr(
            "toy_data-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n",
        )
        zipped.writestr("toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        zipped.writestr("toy_data-1.0.dist-info/RECORD", "")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_wheels_are_verified_before_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheel, digest = make_wheel(tmp_path / "index")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    members = {"toy/data.csv": tmp_path / "out" / "data.csv"}

    def fails() -> None:
        with pytest.raises(UserError, match=r"cannot download toy-data==1\.0 .* by hand"):
            fetch_wheel("toy-data==1.0", digest, members)
        assert not (tmp_path / "out").exists() and not list(scratch.iterdir())

    whole = wheel.read_bytes()
    for damaged in (whole[:-30], whole.replace(b"toy/data.csv", b"toy/date.csv"), b""):
        wheel.write_bytes(damaged)
        fails()
    wheel.unlink()
    fails()
    wheel.write_bytes(whole)
    fetch_wheel("toy-data==1.0", digest, members)
    assert (tmp_path / "out" / "data.csv").read_text() == "1" and not list(scratch.iterdir())


def test_secrets_and_the_tracker_stay_out(toy_flags: list, tiny_llama: Path, tmp_path: Path):
    """Nothing a run prints or writes holds a secret, and nothing imports wandb unasked."""
    (tmp_path / "wandb.py").write_text("raise SystemExit('wandb was imported')\n")
    url = "http://user:5ec2e7@127.0.0.1:9"
    env = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), "5ec2e7")
    env |= {"HF_ENDPOINT": url, "PIP_INDEX_URL": url, "https_proxy": url, "http_proxy": url}
    env |= {"PYTHONPATH": str(tmp_path), "PIP_RETRIES": "0"}
    run = tmp_path / "retriever"
    steps = ["--device", "cpu", "--max_steps", 2]
    commands = [
        ["train_retriever.py", *toy_flags, *steps, "--export_root", run],
        ["train_ranker.py", "--llm_retrieved_path", run, "--llm_base_model", tiny_llama, *steps,
         "--export_root", tmp_path / "ranker"],
    ]  # fmt: skip
    for command in commands:
        done = run_script(*command, env=env)
        assert done.returncode == 0, done.stderr
        assert "5ec2e7" not in done.stdout + done.stderr
    # Neither do the messages of what cannot be reached.
    for command in (
        ["train_retriever.py", "--dataset_code", "ml-100k"],
        ["train_retriever.py", "--dataset_code", "ml-100k-classic"],
        [*commands[1], "--llm_base_model", "someone/model", "--llm_cache_dir", tmp_path],
    ):
        done = run_script(
            *command, "--data_root", tmp_path / "data", env=env | {"HF_HUB_OFFLINE": "0"}
        )
        assert done.returncode == 2 and "download" in done.stderr
        assert "5ec2e7" not in done.stdout + done.stderr, done.stderr
    (tmp_path / "wandb.py").unlink()
    assert len(list(tmp_path.rglob("config.json"))) == 2
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"5ec2e7" not in path.read_bytes(), path
