"""A disk that is full or fails: one line on stderr, and every file is complete or absent."""

import builtins
import errno
import functools
import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from datasets import SequenceDataset
from errors import UserError
from tests.faults.conftest import MAINS, assert_all_complete
from tests.helpers import ROOT

RETRIEVER = [
    "train_retriever.py", "--device", "cpu", "--max_steps", 4, "--val_iterations", 2,
    "--train_batch_size", 16,
]  # fmt: skip
RANKER = [
    "train_ranker.py", "--device", "cpu", "--max_steps", 2, "--lora_val_iterations", 1,
    "--train_batch_size", 2,
]  # fmt: skip
AUGMENTATION = [
    "augment_data.py", "--device", "cpu", "--max_steps", 2, "--lora_val_iterations", 1,
    "--train_batch_size", 2, "--local_examples", 1, "--max_new_tokens", 8, "--save_seconds", 0,
]  # fmt: skip
WRITERS = (  # not in Python; their second argument is the path
    "trainer.checkpoint.save_file", "recipes.fit_retriever.save_file",
    "peft.peft_model.safe_save_file", "pyarrow.parquet.write_table", "torch.export.save",
)  # fmt: skip
OUTPUT_FLAGS = {"recommend.py": "--output", "export_run.py": "--output"}  # else --export_root


@pytest.fixture(scope="session")
def retriever_command(toy_flags: list) -> list:
    return [*RETRIEVER, *toy_flags]


@pytest.fixture(scope="session")
def ranker_command(retrieved: Path, tiny_llama: Path) -> list:
    return [*RANKER, "--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama]


@pytest.fixture(scope="session")
def augmentation_command(toy_flags: list, tiny_llama: Path) -> list:
    return [*AUGMENTATION, *toy_flags, "--llm_base_model", tiny_llama]


@pytest.fixture(scope="session")
def table_command(
    retrieved: Path, toy_data: SequenceDataset, tmp_path_factory: pytest.TempPathFactory
) -> list:
    users = tmp_path_factory.mktemp("users") / "users.csv"
    users.write_text("user\n" + "".join(f"{name}\n" for name in toy_data.user_names))
    return [
        "recommend.py",
        "--run",
        retrieved,
        "--input",
        users,
        "--device",
        "cpu",
        "--part_users",
        8,
    ]


@pytest.fixture(scope="session")
def export_command(retrieved: Path) -> list:
    return ["export_run.py", "--run", retrieved]


def run_limited(command: list, size: int, folder: Path) -> None:
    """Run with a limit on the size of files, which every library meets, also within a file."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    script, *flags = command
    flags += ["--cache_root", folder / "cache"]
    flags += [OUTPUT_FLAGS.get(script, "--export_root"), folder / "run"]
    done = subprocess.run(
        [sys.executable, "-B", str(ROOT / script), *map(str, flags)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        preexec_fn=limit,
    )
    assert_all_complete(folder)
    if size == ENOUGH:  # shows that the smaller limits are what makes the other runs fail
        assert done.returncode == 0, done.stderr
        return
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: cannot write "), done.stderr
    assert "Traceback" not in done.stderr


limits = pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
ENOUGH = 10**8


@limits
@pytest.mark.parametrize("size", [0, 300, 3_000, 30_000, 100_000, 300_000, 1_000_000, ENOUGH])
def test_file_size_limits_of_the_retriever(size: int, retriever_command: list, tmp_path: Path):
    run_limited(retriever_command, size, tmp_path)


@limits
@pytest.mark.parametrize("stage", ["ranker", "augmentation"])
def test_a_file_size_limit_of_other_scripts(
    stage: str, request: pytest.FixtureRequest, tmp_path: Path
):
    run_limited(request.getfixturevalue(f"{stage}_command"), 30_000, tmp_path)


@limits
@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 300, 3_000, 10_000, 20_000, 40_000, ENOUGH])
@pytest.mark.parametrize("stage", ["ranker", "augmentation"])
def test_every_file_size_limit_of_other_scripts(
    stage: str, size: int, request: pytest.FixtureRequest, tmp_path: Path
):
    run_limited(request.getfixturevalue(f"{stage}_command"), size, tmp_path)


class FailingDisk:
    """Counts the calls that change files below a folder and lets one of them fail.

    Args:
        monkeypatch: undoes the patches.
        below: the folder.
        fail_at: number of the call that fails, from 1; 0 for none.
        code: its errno.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, below: Path, fail_at: int, code: int):
        self.below, self.fail_at, self.code = str(below), fail_at, code
        self.calls = 0
        opened = builtins.open

        def open_file(file: object, mode: str = "r", *args: object, **options: object) -> object:
            if set(mode) & set("wax+"):
                self.count(file)
            return opened(file, mode, *args, **options)

        monkeypatch.setattr(builtins, "open", open_file)
        monkeypatch.setattr(io, "open", open_file)
        for name in ("replace", "chmod"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        mkdir, failing_mkdir = os.mkdir, self.counted(os.mkdir)

        def make(path: object, *args: object, **options: object) -> None:
            # Callers expect this to fail for a folder that exists.
            (mkdir if Path(path).is_dir() else failing_mkdir)(path, *args, **options)

        monkeypatch.setattr(os, "mkdir", make)
        for writer in WRITERS:
            monkeypatch.setattr(writer, self.counted(resolve_name(writer), argument=1))

    def count(self, path: object) -> None:
        if isinstance(path, int) or not str(path).startswith(self.below):
            return
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(self.code, os.strerror(self.code), str(path))

    def counted(self, function: Callable, argument: int = 0) -> Callable:
        def call(*args: object, **options: object) -> object:
            self.count(args[argument])
            return function(*args, **options)

        return call


@functools.cache
def exported(*_: object, **__: object) -> torch.export.ExportedProgram:
    return torch.export.export(torch.nn.Linear(1, 1), (torch.ones(1),))


def run_with_failure(fail_at: int, code: int, command: list, folder: Path) -> int:
    """Run with one failing call and return the number of calls."""
    script, *flags = command
    flags += ["--cache_root", folder / "cache"]
    flags += [OUTPUT_FLAGS.get(script, "--export_root"), folder / "run"]
    words = [str(flag) for flag in flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.export.export_retriever", exported)  # it is slow and writes nothing
        disk = FailingDisk(patch, folder, fail_at, code)
        try:
            MAINS[script](words)
        except UserError as error:
            assert fail_at and "\n" not in str(error) and os.strerror(code) in str(error)
        else:  # the first run in a process may make more calls than later ones
            assert not fail_at or disk.calls < fail_at
    assert_all_complete(folder)
    return disk.calls


def sweep(every: int, code: int, command: list, tmp_path: Path) -> None:
    """Let every ``every``-th call fail, each in a run of its own."""
    calls = run_with_failure(0, code, command, tmp_path / "complete")
    assert calls > 5
    for fail_at in range(1, calls + 1, every):
        run_with_failure(fail_at, code, command, tmp_path / str(fail_at))


def test_some_failing_calls_of_the_retriever(retriever_command: list, tmp_path: Path):
    sweep(9, errno.ENOSPC, retriever_command, tmp_path)


def test_some_failing_calls_of_the_ranker(ranker_command: list, tmp_path: Path):
    sweep(17, errno.ENOSPC, ranker_command, tmp_path)


def test_some_failing_calls_of_the_augmentation(augmentation_command: list, tmp_path: Path):
    sweep(29, errno.ENOSPC, augmentation_command, tmp_path)


def test_some_failing_calls_of_a_table(table_command: list, tmp_path: Path):
    sweep(7, errno.ENOSPC, table_command, tmp_path)


def test_some_failing_calls_of_an_export(export_command: list, tmp_path: Path):
    sweep(7, errno.ENOSPC, export_command, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("stage", ["retriever", "ranker", "augmentation", "table", "export"])
def test_every_failing_call(code: int, stage: str, request: pytest.FixtureRequest, tmp_path: Path):
    sweep(1, code, request.getfixturevalue(f"{stage}_command"), tmp_path)
