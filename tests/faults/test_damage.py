"""Damaged files: each script answers in one line, or ends well with complete files.

A case damages one of the files that a script reads, at random but by a seed, and runs the script:
some bytes change, the end is cut off or something appended, the file is empty, is gone, has the
content of another one, or a value of its JSON is another.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.conftest import (
    AUGMENTATION,
    RANKER,
    RETRIEVER,
    TABLE,
    assert_answered,
    assert_complete,
    run_here,
    working_directory,
)
from trainer.run_folder import CONFIG

CASES = 72  # of each of the 14 commands, if slow
USER = ["--user", "u1", "--k", "3", "--device", "cpu"]
DATA_FILES = ["log.csv", "titles.csv", "cache"]
HALF_TABLE = [word if word != "table" else "half_table" for word in TABLE]
# Each command with the files and folders that it reads.
READERS: dict[str, tuple[list[str], list[str]]] = {
    "retriever": ([*RETRIEVER, "--export_root", "new"], DATA_FILES),
    "retriever, resumed": ([*RETRIEVER, "--export_root", "half", "--resume"], ["half"]),
    "retriever, finished": (
        [*RETRIEVER, "--export_root", "retriever", "--resume"], ["retriever"]
    ),
    "retriever, augmented": (
        [*RETRIEVER, "--export_root", "new", "--augmented", "augmented"],
        ["augmented/augmented.npz", "augmented/config.json"],
    ),
    "ranker": ([*RANKER, "--export_root", "new"], ["retriever", "model", *DATA_FILES]),
    "ranker, resumed": ([*RANKER, "--export_root", "half_ranker", "--resume"], ["half_ranker"]),
    "augmentation": (
        [*AUGMENTATION, "--export_root", "new", "--reuse", "augmented",
         "--retriever_path", "retriever"],
        ["augmented", "retriever", "model"],
    ),
    "augmentation, resumed": (
        [*AUGMENTATION, "--export_root", "half_augmented", "--resume"], ["half_augmented"]
    ),
    "recommendations": (["recommend.py", "--run", "retriever", *USER], ["retriever", *DATA_FILES]),
    "recommendations of a ranker": (
        ["recommend.py", "--run", "ranker", *USER], ["ranker", "retriever", "model"]
    ),
    "table": ([*HALF_TABLE, "--resume"], ["half_table", "users.csv", "retriever"]),
    "export": (
        ["export_run.py", "--run", "ranker", "--output", "exported"], ["ranker", "retriever"]
    ),
    "report": (["report.py", "--experiment_root", "."], ["ranker", "retriever"]),
    "comparison": (["report.py", "--compare", "ranker", "retriever"], ["ranker", "retriever"]),
}  # fmt: skip
VALUES = [None, -1, 0, 1e308, 10**30, "x", "", [], {}, [1], True, "nan"]


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8) if content else 0):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randint(0, max(0, len(content) - 1))]


def append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice([rng.randbytes(rng.randint(1, 64)), content, b"\n", b"\n{}\n"])


def edit(content: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in a file of JSON, by lines or as a whole; else a few bytes."""
    try:
        lines = content.splitlines()
        record = json.loads(content if rng.random() < 0.5 else lines.pop())
        keys = list(record)
    except (ValueError, IndexError, TypeError):
        return flip(content, rng)
    holder = record
    while isinstance(holder.get(key := rng.choice(keys)), dict) and holder[key]:
        holder, keys = holder[key], list(holder[key])
    holder[key] = rng.choice(VALUES)
    if rng.random() < 0.3:
        del holder[key]
    ending = json.dumps(record).encode() + b"\n"
    return ending if len(lines) < 2 or lines[0] == b"{" else b"\n".join([*lines, ending])


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [flip, cut, append, edit]


def damage(root: Path, reads: list[str], rng: random.Random) -> str:
    """Damage one of the files; returns what was done."""
    paths = [root / name for name in reads]
    paths = [path for path in (*paths, *(x for p in paths for x in p.rglob("*"))) if path.is_file()]
    path = rng.choice(sorted(paths))
    kind = rng.choice([*DAMAGES, "swap", "empty", "remove", *DAMAGES])
    name = f"{path.relative_to(root)}: {kind if isinstance(kind, str) else kind.__name__}"
    if kind == "remove":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "swap":
        alike = [x for x in root.rglob(f"*{path.suffix}") if x.is_file()]
        path.write_bytes(rng.choice(sorted(alike)).read_bytes())
    elif not isinstance(kind, str):
        path.write_bytes(kind(path.read_bytes(), rng))
    return name


def check_damage(name: str, seed: int, place: Path, folder: Path) -> None:
    """Damage a file and run a script."""
    shutil.copytree(place, folder)
    done = damage(folder, READERS[name][1], random.Random(f"{name} {seed}"))
    check_answer(name, f"seed {seed}, {done}", folder)


def check_answer(name: str, done: str, folder: Path) -> int:
    """Run a script in a folder with a damaged file; returns the exit status."""
    command, _ = READERS[name]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        with working_directory(folder), pytest.MonkeyPatch.context() as patch:
            # Neither reads any file, and both are slow.
            patch.setattr("recipes.export.export_retriever", lambda *_, **__: None)
            patch.setattr("torch.export.save", lambda _, path: path.write_bytes(b""))
            patch.setattr("reporting.figures.draw", lambda *_: None)
            status, errors = run_here(command)
    except Exception as error:
        raise AssertionError(f"{name}, {done}: {error!r}") from error
    finally:
        torch.set_grad_enabled(True)
    assert_answered([f"{name}, {done}"], status, errors)
    for path in folder.rglob("*"):
        if path.is_file() and before.get(path) != path.read_bytes():
            assert_complete(path)
    if status == 0 and "--export_root" in command:
        assert_complete(folder / command[command.index("--export_root") + 1] / CONFIG)
    shutil.rmtree(folder)
    return status


@pytest.mark.parametrize(
    ("name", "file", "content", "status"),
    [
        ("retriever, resumed", "half/config.json", "{", 0),  # repaired
        ("retriever, finished", "retriever/test_metrics.json", '{"Recall@5": "x"}', 2),
        ("augmentation", "augmented/adapter/adapter_config.json", "{", 2),
        ("augmentation", "augmented/adapter/adapter_model.safetensors", "", 2),
        ("augmentation", "augmented/config.json", '{"stages": 1}', 2),
        ("export", "ranker/adapter/adapter_config.json", "{", 2),
        ("export", "ranker/adapter/adapter_model.safetensors", "", 2),
        ("export", "ranker/fusion.json", "{", 2),
    ],
)
def test_damage_that_was_overlooked(
    name: str, file: str, content: str, status: int, place: Path, tmp_path: Path
):
    folder = tmp_path / "case"
    shutil.copytree(place, folder)
    (folder / file).write_text(content)
    assert check_answer(name, file, folder) == status


@pytest.mark.parametrize("name", READERS)
def test_some_damaged_files(name: str, place: Path, tmp_path: Path):
    for seed in range(3):
        check_damage(name, seed, place, tmp_path / "case")


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files(name: str, place: Path, tmp_path: Path):
    for seed in range(3, 3 + CASES):
        check_damage(name, seed, place, tmp_path / "case")
