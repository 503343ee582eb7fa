"""A working directory with everything that a script reads, and scripts run within the test."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

import augment_data
import cli
import export_run
import recommend
import report
import train_ranker
import train_retriever
from errors import UserError
from recipes import augment, bulk, fit_ranker, fit_retriever
from tests.helpers import toy_interactions

MAINS = {
    "train_retriever.py": train_retriever.main,
    "train_ranker.py": train_ranker.main,
    "augment_data.py": augment_data.main,
    "recommend.py": recommend.main,
    "export_run.py": export_run.main,
    "report.py": report.main,
}
DATA = [
    "--dataset_code", "custom", "--interactions", "log.csv", "--items", "titles.csv",
    "--cache_root", "cache", "--device", "cpu",
]  # fmt: skip
RETRIEVER = [
    "train_retriever.py", *DATA, "--max_steps", "2", "--val_iterations", "1", "--hidden_units", "8",
    "--train_batch_size", "8", "--num_blocks", "1",
]  # fmt: skip
SHORT = [
    "--llm_base_model", "model", "--max_steps", "2", "--lora_val_iterations", "1",
    "--train_batch_size", "2", "--warmup_steps", "0",
]  # fmt: skip
RANKER = [
    "train_ranker.py", "--llm_retrieved_path", "retriever", "--device", "cpu", *SHORT,
    "--verbalizer", "titles", "--folds", "2", "--llm_max_history", "5", "--val_users", "4",
]  # fmt: skip
AUGMENTATION = [
    "augment_data.py", *DATA, *SHORT, "--local_examples", "1", "--max_new_tokens", "8",
]  # fmt: skip
TABLE = [
    "recommend.py", "--run", "retriever", "--input", "users.csv", "--output", "table",
    "--part_users", "4", "--k", "3", "--device", "cpu",
]  # fmt: skip


def run_here(command: list[str]) -> tuple[int, str]:
    """Run a script as ``python`` would, but in this process and without touching its streams.

    Returns:
        The exit status and what was printed on stderr.
    """
    script, *words = command
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("process.set_up", lambda: None)
        patch.setattr("sys.stdin", io.StringIO())
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            try:
                cli.run_main(lambda _: MAINS[script](words))
            except SystemExit as stopped:
                return int(stopped.code or 0), errors.getvalue()
    return 0, errors.getvalue()


def assert_answered(command: list[str], status: int, errors: str) -> None:
    """Check that a script ended well, or with one line about a mistake."""
    assert status in (0, 2), (command, status, errors)
    assert "Traceback" not in errors, (command, errors)
    if status == 2:
        last = errors.splitlines()[-1]
        assert last.startswith("error: ") and len(last) < 8000, (command, errors)


def assert_complete(path: Path) -> None:
    """Check that a file is complete and not temporary."""
    assert not path.name.startswith("."), path
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        assert path.read_text().endswith("}\n")
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            assert all(file[name] is not None for name in file.files)
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            assert all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118
    elif path.suffix == ".parquet":
        pq.read_table(path)


def assert_all_complete(folder: Path) -> None:
    """Check that every file below the folder is complete and none is temporary."""
    for path in folder.rglob("*"):
        assert_complete(path)


def run_until(command: list[str], module: object, name: str, earlier_calls: int = 0) -> None:
    """Run a script until it calls a function once more than given."""
    function, calls = getattr(module, name), []

    def call(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) > earlier_calls:
            raise UserError("stopped")
        return function(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        status, errors = run_here(command)
    assert status == 2 and "stopped" in errors, errors


@contextlib.contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def place(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data, a model, and runs of all scripts, finished and interrupted."""
    root = tmp_path_factory.mktemp("place")
    rows = toy_interactions(num_users=16, num_items=24)
    lines = (f"{user},{item},{time}\n" for user, item, time in rows)
    (root / "log.csv").write_text("user,item,timestamp\n" + "".join(lines))
    names = sorted({item for _, item, _ in rows})
    (root / "titles.csv").write_text(
        "item,title\n" + "".join(f"{name},The {name} Story\n" for name in names)
    )
    (root / "users.csv").write_text("user\n" + "".join(f"u{user}\n" for user in range(16)))
    shutil.copytree(tiny_llama, root / "model")
    with working_directory(root):
        for command in (
            [*RETRIEVER, "--export_root", "retriever"],
            [*RANKER, "--export_root", "ranker"],
            [*AUGMENTATION, "--export_root", "augmented"],
            TABLE,
        ):
            status, errors = run_here(command)
            assert status == 0, errors
        run_until([*RETRIEVER, "--export_root", "half"], fit_retriever, "write_json")
        run_until([*RANKER, "--export_root", "half_ranker"], fit_ranker, "write_json")
        run_until([*AUGMENTATION, "--export_root", "half_augmented"], augment, "write_json")
        half_table = [word if word != "table" else "half_table" for word in TABLE]
        run_until(half_table, bulk, "_table", earlier_calls=2)
    return root
