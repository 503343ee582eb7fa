import subprocess
import sys
from pathlib import Path

import pytest

from errors import InputError, UserError
from storage import write_json
from tests.helpers import ROOT
from trainer.run_folder import RunFolder

OUTPUTS = ("adapter", "metrics.json")


@pytest.fixture()
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", OUTPUTS, "mine")


def fill(run: RunFolder, *names: str, fingerprint: str = "mine") -> None:
    """Create files of a run, folders where the name has no suffix."""
    run.path.mkdir(exist_ok=True)
    write_json(run.path / "config.json", {"fingerprint": fingerprint})
    for name in names:
        path = run.path / name
        if path.suffix:
            path.touch()
        else:
            path.mkdir()
            (path / "inside").touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# State ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "interrupted", "has_outputs", "started", "finished"),
    [
        ([], False, False, False, False),
        (["log.jsonl"], False, False, False, False),
        (["checkpoint.safetensors"], True, False, True, False),
        (["adapter"], False, True, True, False),
        (["adapter", "metrics.json"], False, True, True, True),
        (["adapter", "metrics.json", "checkpoint.safetensors"], True, True, True, False),
    ],
)
def test_state(
    files: list[str],
    interrupted: bool,
    has_outputs: bool,
    started: bool,
    finished: bool,
    run: RunFolder,
):
    assert not run.is_started()  # without the folder
    fill(run, *files)
    assert (run.is_interrupted(), run.has_outputs()) == (interrupted, has_outputs)
    assert (run.is_started(), run.is_finished()) == (started, finished)
    assert run.checkpoint == run.path / "checkpoint.safetensors"


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "metrics.json"])
def test_another_run(name: str, run: RunFolder):
    fill(run, name, fingerprint="another")
    with pytest.raises(InputError) as caught:
        run.is_started()
    assert str(caught.value) == f"{run.path} holds a run with other settings or data"


def test_finished_outputs_of_another_run(run: RunFolder):
    fill(run, *OUTPUTS, fingerprint="another")
    with pytest.raises(InputError, match="holds a run with other settings"):
        run.is_finished()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_outputs_without_settings(content: str | None, run: RunFolder):
    fill(run, "adapter")
    (run.path / "config.json").unlink()
    if content is not None:
        (run.path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        run.is_started()


def test_clear(run: RunFolder):
    fill(run, *OUTPUTS, "checkpoint.safetensors", "log.jsonl", "search.json", "search", "notes.txt")
    run.clear()
    assert names(run.path) == ["config.json", "notes.txt"]  # config.json is then written again
    run.clear()


# Lock -------------------------------------------------------------------------------------------


def test_a_folder_created_for_a_run_that_fails_is_removed(tmp_path: Path):
    run = RunFolder(tmp_path / "a" / "b", OUTPUTS, "mine")
    with pytest.raises(ZeroDivisionError), run.locked():
        assert names(run.path) == [".lock"]
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_lock_leaves_the_files_of_the_run(run: RunFolder):
    with run.locked():
        fill(run, "metrics.json")
    assert names(run.path) == ["config.json", "metrics.json"]
    with run.locked():  # again
        pass


def test_a_lock_removes_what_a_killed_process_left(run: RunFolder):
    fill(run, "metrics.json", ".adapter.1.tmp.d", ".lock.x")
    (run.path / ".adapter.1.tmp").mkdir()
    (run.path / ".model.safetensors.1.tmp").write_text("half")
    (run.path / ".tmpfatfbU").write_text("half")
    (run.path / ".lock").touch()
    with run.locked():
        assert {".adapter.1.tmp", ".model.safetensors.1.tmp", ".tmpfatfbU"}.isdisjoint(
            names(run.path)
        )
        assert {"metrics.json", ".lock"} <= set(names(run.path))


def test_two_processes_cannot_use_a_folder(run: RunFolder):
    other = (
        "import sys; from pathlib import Path; from trainer.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1]), (), '').locked():\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", other, str(run.path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout.readline() == "locked\n"
        temporary = run.path / ".metrics.json.1.tmp"
        temporary.touch()
        with pytest.raises(InputError) as caught, run.locked():
            pass
        assert str(caught.value) == f"{run.path} is in use by another run"
        assert temporary.exists()  # the other process may be writing it
        temporary.unlink()
        process.stdin.close()
    assert process.returncode == 0
    with run.locked():
        pass


def test_a_folder_that_cannot_be_created(tmp_path: Path):
    (tmp_path / "file").touch()
    run = RunFolder(tmp_path / "file" / "run", OUTPUTS, "mine")
    with pytest.raises(UserError) as caught, run.locked():
        pass
    assert str(caught.value).startswith(f"cannot write {run.path}: ")
