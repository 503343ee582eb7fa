import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

import distributed
from dataloader.sampler import ShuffledBatches, evaluation_loader, training_loader
from distributed import in_main_process, interleave, joined, largest, main_first, total
from tests.helpers import LAUNCH, ROOT, contents, copy_run, run_script, workers

INTERACTIONS = np.array([0, 0, 2, 4, 4, 6]), np.array([3, 9, 30, 1, 17, 2])  # users, items
NO_DROPOUT = ["--dropout", 0, "--attn_dropout", 0]


def launch(num_processes: int, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a command in several processes."""
    words = [*LAUNCH, num_processes, *command]
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, cwd=ROOT, timeout=600
    )


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Set what a launcher sets."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


# Shares -----------------------------------------------------------------------------------------


class Numbers(Dataset):
    """A batch is the list of its examples."""

    def __len__(self) -> int:
        return 11

    def __getitems__(self, numbers: list[int]) -> list[int]:
        return numbers


@given(st.integers(1, 14), st.integers(1, 5))
def test_processes_share_the_examples(batch_size: int, size: int):
    evaluated, trained = [], []
    with pytest.MonkeyPatch.context() as patch:
        sampler = ShuffledBatches(len(Numbers()), batch_size, seed=0)
        whole = list(sampler)
        for rank in range(size):
            pretend(patch, rank, size)
            loader = evaluation_loader(Numbers(), batch_size, 0)
            evaluated.append(list(loader))
            assert len(loader) == len(evaluated[-1])
            trained.append(list(training_loader(Numbers(), sampler, 0)))
            assert len(trained[-1]) == len(whole)
    batches = [evaluated[i % size][i // size] for i in range(sum(map(len, evaluated)))]
    assert batches == list(evaluation_loader(Numbers(), batch_size, 0))
    for batch, shares in zip(whole, zip(*trained)):
        assert sorted(number for share in shares for number in share) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_exchanges_nothing():
    assert (total(3), largest(3), interleave([1, 2])) == (3, 3, [1, 2])
    with joined(), main_first():
        distributed.join()
        distributed.wait()


def test_the_main_process_alone(monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    function = in_main_process(lambda *args, **kwargs: calls.append((args, kwargs)))
    function(1, x=2)
    pretend(monkeypatch, 1, 2)
    function(3)
    assert calls == [((1,), {"x": 2})]


# Exchanges --------------------------------------------------------------------------------------


def test_evaluation_equals_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tests.distributed_worker import main

    monkeypatch.setattr(Path, "exists", lambda path: False)  # what main has cached
    main(tmp_path)
    monkeypatch.undo()
    (tmp_path / "cached").unlink()
    done = launch(3, "-m", "tests.distributed_worker", tmp_path)
    assert done.returncode == 0, done.stderr
    expected = np.load(tmp_path / "0_of_1.npz")
    for rank in range(3):
        found = np.load(tmp_path / f"{rank}_of_3.npz")
        assert found.files == expected.files
        for name in expected.files:
            assert found[name].tobytes() == expected[name].tobytes()


# Scripts ----------------------------------------------------------------------------------------


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_two_processes_train_a_retriever_as_one(toy_flags: list[object], tmp_path: Path):
    flags = [
        *toy_flags, *NO_DROPOUT, "--device", "cpu", "--max_steps", 50, "--val_iterations", 10,
        "--train_batch_size", 29, "--num_candidates", 5,
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_script("train_retriever.py", *flags, "--export_root", one)
    assert done.returncode == 0, done.stderr
    again = launch(2, "train_retriever.py", *flags, "--export_root", two)
    assert again.returncode == 0, again.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len(losses(one)) == 5
    assert contents(two).keys() == contents(one).keys()
    assert again.stdout.count("written to") == 1
    assert json.loads((two / "config.json").read_text())["num_processes"] == 2
    # Mistakes are reported once, by the main process.
    refused = launch(2, "train_retriever.py", *flags, "--export_root", two)
    assert refused.returncode == 1 and refused.stderr.count("holds an earlier run") == 1


@pytest.mark.parametrize("verbalizer", [["--verbalizer", "titles", "--folds", 2], []])
def test_two_processes_tune_a_ranker_as_one(
    verbalizer: list[object], retrieved: Path, tiny_llama: Path, tmp_path: Path
):
    flags = [
        "--llm_retrieved_path", copy_run(retrieved, tmp_path / "retriever"), *verbalizer,
        "--llm_base_model", tiny_llama, "--llm_max_history", 5, "--lora_dropout", 0,
        "--train_batch_size", 7, "--max_steps", 4, "--warmup_steps", 0, "--lora_val_iterations", 2,
        "--device", "cpu",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_script("train_ranker.py", *flags, "--export_root", one)
    assert done.returncode == 0, done.stderr
    done = launch(2, "train_ranker.py", *flags, "--export_root", two)
    assert done.returncode == 0, done.stderr
    tolerance = 1e-3 if verbalizer else 1e-5  # adapters of titles compute in bfloat16
    assert losses(two) == pytest.approx(losses(one), abs=tolerance)
    assert contents(two).keys() == contents(one).keys()


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--llm_load_in_4bit", "true"], 1e-5),
        (["--verbalizer", "titles", "--folds", 2, "--gradient_checkpointing", "true"], 1e-3),
    ],
)
def test_sharded_weights_train_as_one_process(
    flags: list[object], tolerance: float, retrieved: Path, tiny_llama: Path, tmp_path: Path
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # Steps of 3 examples leave a process without any, and other numbers of micro-batches.
    words = [
        "--llm_retrieved_path", copy_run(retrieved, tmp_path / "retriever"), *flags,
        "--llm_base_model", tiny_llama, "--llm_max_history", 5, "--lora_dropout", 0, "--device",
        "cpu", "--train_batch_size", 3, "--lora_micro_batch_size", 2, "--max_steps", 20,
        "--lora_lr", 1e-4, "--lora_val_iterations", 5, "--val_users", 9, "--val_batch_size", 2,
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_script("train_ranker.py", *words, "--export_root", one)
    assert done.returncode == 0, done.stderr
    words += ["--llm_shard_weights", "true", "--export_root", two]
    done = launch(2, "train_ranker.py", *words)
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), abs=tolerance) and len(losses(one)) == 4
    assert contents(two).keys() == contents(one).keys()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), two / "adapter")


def test_two_processes_generate_the_texts_of_one(
    toy_flags: list[object], tiny_llama: Path, tmp_path: Path
):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [
        *toy_flags, "--device", "cpu", "--max_steps", 2, "--lora_val_iterations", 2,
        "--train_batch_size", 8, "--max_new_tokens", 12, "--test_batch_size", 7,
        "--llm_base_model", tiny_llama,
    ]  # fmt: skip
    done = run_script("augment_data.py", *flags, "--export_root", one)
    assert done.returncode == 0, done.stderr
    shutil.copytree(one, two)
    for name in ("generated.jsonl", "augmented.npz", "augmentation.json"):
        (two / name).unlink()
    done = launch(2, "augment_data.py", *flags, "--export_root", two, "--resume")
    assert done.returncode == 0, done.stderr
    assert contents(two) == contents(one)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_killed_run_of_two_resumes_with_any_number(
    number: int, toy_flags: list[object], tmp_path: Path
):
    flags = [
        *toy_flags, *NO_DROPOUT, "--device", "cpu", "--max_steps", 100, "--val_iterations", 25,
        "--num_candidates", 5, "--save_seconds", 0.05,
    ]  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_script("train_retriever.py", *flags, "--export_root", whole).returncode == 0
    script: list[object] = ["train_retriever.py", *flags, "--export_root", run]
    kill_workers([*LAUNCH, "2", *map(str, script)], run, slice(1))
    script.append("--resume")
    kill_workers([*LAUNCH, "2", *map(str, script)], run, slice(2))
    done = run_script(*map(str, script)) if number == 1 else launch(number, *script)
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    assert contents(run).keys() == contents(whole).keys()


def kill_workers(command: list[str], run: Path, victims: slice) -> None:
    """Start a run and kill some of its processes once it has written a checkpoint."""
    checkpoint = run / "checkpoint.safetensors"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    with subprocess.Popen(command, **quiet) as process:
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        for pid in workers(process)[victims]:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(120) != 0
