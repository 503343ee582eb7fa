"""Runs that are killed again and again end as if nothing had happened.

Each campaign runs a script without interruption, then again with a number of SIGKILLs at random
moments, each time resumed: the final files must be the same to the byte. All campaigns together:

    .venv/bin/python -m pytest -n logical -m slow tests/faults/test_kills.py
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datasets import SequenceDataset
from tests.helpers import LAUNCH, ROOT, contents, workers

RETRIEVER = [
    "train_retriever.py", "--device", "cpu", "--max_steps", 400, "--val_iterations", 20,
    "--train_batch_size", 16, "--save_seconds", 0.2, "--ema_decay", 0.9,
]  # fmt: skip
SEARCH = [
    *RETRIEVER, "--max_steps", 150, "--search", "--search_weight_decay", 0.01,
    "--search_dropout", 0.1, 0.5,
]  # fmt: skip
RANKER = [
    "train_ranker.py", "--device", "cpu", "--max_steps", 30, "--lora_val_iterations", 10,
    "--train_batch_size", 8, "--save_seconds", 0.2,
]  # fmt: skip
AGAIN = {  # how a script is started again
    "": ["--export_root", "{}", "--resume"],
    "recommend.py": ["--output", "{}", "--resume"],
    "export_run.py": ["--output", "{}", "--overwrite"],
}
KILLS = 10  # in each of the 21 campaigns that are marked slow
AUGMENTATION = [
    "augment_data.py", "--device", "cpu", "--max_steps", 30, "--lora_val_iterations", 10,
    "--train_batch_size", 8, "--max_new_tokens", 60, "--test_batch_size", 4,
    "--constrained", "--save_seconds", 0.2,
]  # fmt: skip


def start(command: list, folder: Path, processes: int = 1) -> subprocess.Popen:
    script, *flags = command
    python = [sys.executable] if processes == 1 else [*LAUNCH, str(processes)]
    words = [*python, str(ROOT / script), *map(str, flags)]
    return subprocess.Popen(
        [*words, *(word.format(folder) for word in AGAIN.get(script, AGAIN[""]))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


def assert_same(run: Path, expected: Path) -> None:
    ours, theirs = contents(run), contents(expected)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []


def kill(process: subprocess.Popen, processes: int, rng: random.Random) -> bool:
    """Kill a run, or some of its processes, which ends the others; False if none has started."""
    started = [process.pid] if processes == 1 else workers(process)
    for pid in rng.sample(started, rng.randint(1, len(started)) if started else 0):
        os.kill(pid, signal.SIGKILL)
    return bool(started)


def campaign(command: list, kills: int, tmp_path: Path, seed: int = 0, processes: int = 1) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    began = time.monotonic()
    finish(start(command, whole, processes))
    seconds = time.monotonic() - began
    rng = random.Random(seed)
    landed = ended = 0
    while landed < kills:
        process = start(command, broken, processes)
        try:
            process.communicate(timeout=rng.uniform(0.3, 0.8) * seconds)
        except subprocess.TimeoutExpired:
            landed += kill(process, processes, rng)
        process.communicate()
        if process.returncode == 0:  # it finished before the kill: start another run
            assert_same(broken, whole)
            ended += 1
            broken = tmp_path / f"broken{ended}"
            seconds *= 0.8  # the machine may be less busy than at first
        time.sleep(0.3)  # the runs of a search end a moment after it
    finish(start(command, broken, processes))
    assert_same(broken, whole)
    assert not list(tmp_path.glob(".*"))  # nor anything beside the folder


def test_few_kills(toy_flags: list, tmp_path: Path):
    campaign([*RETRIEVER, *toy_flags], 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("command", [RETRIEVER, SEARCH], ids=["retriever", "search"])
def test_many_kills_of_retrievers(command: list, seed: int, toy_flags: list, tmp_path: Path):
    campaign([*command, *toy_flags, "--seed", seed], KILLS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills_of_two_processes(seed: int, toy_flags: list, tmp_path: Path):
    campaign([*RETRIEVER, *toy_flags, "--seed", seed], KILLS, tmp_path, seed, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills_of_rankers(seed: int, retrieved: Path, tiny_llama: Path, tmp_path: Path):
    inputs = ["--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama]
    campaign([*RANKER, *inputs, "--seed", seed], KILLS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills_of_augmentations(
    seed: int, toy_flags: list, retrieved: Path, tiny_llama: Path, tmp_path: Path
):
    inputs = ["--llm_base_model", tiny_llama, "--retriever_path", retrieved]
    campaign([*AUGMENTATION, *toy_flags, *inputs, "--seed", seed], KILLS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills_of_recommendations(
    seed: int, retrieved: Path, toy_data: SequenceDataset, tmp_path: Path
):
    users = tmp_path / "users.csv"
    names = [toy_data.user_names[(seed + index) % 60] for index in range(3000)]
    users.write_text("user\n" + "".join(f"{name}\n" for name in names))
    table = ["--run", retrieved, "--input", users, "--part_users", 4, "--device", "cpu"]
    campaign(["recommend.py", *table], KILLS, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_many_kills_of_exports(seed: int, retrieved: Path, tmp_path: Path):
    campaign(["export_run.py", "--run", retrieved], KILLS, tmp_path, seed)
