"""``augment_data.py`` as a user runs it: files, reuse, resuming, and no leak of held-out items."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from augmentation.filters import REASONS
from errors import InputError
from tests.helpers import contents, interrupt, run_script, toy_interactions
from trainer.run_folder import RunFolder

FLAGS = [
    "--device", "cpu", "--max_steps", 6, "--lora_val_iterations", 3, "--train_batch_size", 8,
    "--max_new_tokens", 24, "--test_batch_size", 16,
]  # fmt: skip


@pytest.fixture(scope="module")
def augmented(toy_flags: list, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the toy data with a language model of random weights."""
    run = tmp_path_factory.mktemp("augmentation") / "free"
    done = run_script(
        "augment_data.py", *toy_flags, *FLAGS, "--llm_base_model", tiny_llama,
        "--export_root", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "for 60 users" in done.stdout
    return run


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_augmentation_writes_the_contract(augmented: Path):
    assert sorted(path.name for path in augmented.iterdir()) == [
        "adapter", "augmentation.json", "augmented.npz", "config.json", "exports",
        "generated.jsonl", "log.jsonl",
    ]  # fmt: skip
    texts = [json.loads(line) for line in (augmented / "generated.jsonl").open()]
    assert [text["user"] for text in texts] == list(range(60))
    counts = read(augmented / "augmentation.json")
    assert counts["written"] == counts["kept"] + sum(counts["dropped"].values()) > 0
    assert list(counts["dropped"]) == list(REASONS) and counts["valid_share"] < 1
    log = [json.loads(line) for line in (augmented / "log.jsonl").open()]
    assert [record["step"] for record in log] == [3, 6]
    assert log[1]["val_log_likelihood"] > log[0]["val_log_likelihood"]


@pytest.fixture(scope="module")
def constrained(
    augmented: Path, toy_flags: list, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with the same tuned model that samples items of the catalogue only."""
    run = tmp_path_factory.mktemp("augmentation") / "constrained"
    done = run_script(
        "augment_data.py", *toy_flags, *FLAGS, "--llm_base_model", tiny_llama,
        "--constrained", "true", "--reuse", augmented, "--export_root", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "adapter: reused from" in done.stdout
    assert "generated.jsonl: reused from" not in done.stdout
    return run


@pytest.fixture(scope="module")
def judged(
    constrained: Path,
    retrieved: Path,
    toy_flags: list,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run with the same texts that a retriever filters."""
    run = tmp_path_factory.mktemp("augmentation") / "judged"
    done = run_script(
        "augment_data.py", *toy_flags, *FLAGS, "--llm_base_model", tiny_llama,
        "--constrained", "true", "--retriever_path", retrieved, "--reuse", constrained,
        "--export_root", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "generated.jsonl: reused from" in done.stdout
    return run


def test_constrained_sampling_reuses_the_model(augmented: Path, constrained: Path):
    assert contents(constrained / "adapter") == contents(augmented / "adapter")
    counts = read(constrained / "augmentation.json")
    assert counts["valid_share"] == 1 and counts["kept"] > 60


def test_a_retriever_drops_implausible_items(constrained: Path, judged: Path):
    counts = read(constrained / "augmentation.json")
    judged_counts = read(judged / "augmentation.json")
    assert judged_counts["written"] == counts["written"] and judged_counts["plausible_rank"] >= 1
    assert judged_counts["kept"] + judged_counts["dropped"]["implausible"] == counts["kept"]
    assert 0 < judged_counts["kept"] < counts["kept"]


def test_a_retriever_trains_on_generated_interactions(
    judged: Path, retrieved: Path, toy_flags: list, tmp_path: Path
):
    retriever = tmp_path / "retriever"
    done = run_script(
        "train_retriever.py", *toy_flags, "--device", "cpu", "--max_steps", 60,
        "--val_iterations", 30, "--train_batch_size", 16, "--augmented", judged,
        "--export_root", retriever,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (
        np.load(retriever / "candidates.npz", allow_pickle=False) as ours,
        np.load(retrieved / "candidates.npz", allow_pickle=False) as theirs,
        np.load(judged / "augmented.npz", allow_pickle=False) as interactions,
    ):
        for split in ("val", "test"):
            assert np.array_equal(ours[f"{split}_labels"], theirs[f"{split}_labels"])
            assert not np.array_equal(ours[f"{split}_items"], theirs[f"{split}_items"])
        # Generated items are not part of the history at evaluation: they can be recommended.
        candidates = ours["test_items"]
        pairs = zip(interactions["users"], interactions["items"])
        assert any(item in candidates[user] for user, item in pairs)


def test_interrupted_published_recipe_resumes_to_the_same_bytes(
    toy_flags: list, tiny_llama: Path, tmp_path: Path
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = [
        *toy_flags, *FLAGS, "--llm_base_model", tiny_llama, "--preset", "published",
        "--save_seconds", 0, "--constrained",
    ]  # fmt: skip
    done = run_script("augment_data.py", *flags, "--export_root", whole)
    assert done.returncode == 0, done.stderr
    flags += ["--export_root", run]
    interrupt("augment_data.py", *flags, when=run / "checkpoint.safetensors")
    flags.append("--resume")
    interrupt("augment_data.py", *flags, when=run / "generated.jsonl", how=signal.SIGTERM)
    assert 0 < len((run / "generated.jsonl").read_text().splitlines()) < 60
    done = run_script("augment_data.py", *flags)
    assert done.returncode == 0, done.stderr
    assert contents(run) == contents(whole)
    texts = [json.loads(line)["text"] for line in (run / "generated.jsonl").open()]
    assert all(text.startswith("i") for text in texts)
    counts = read(run / "augmentation.json")
    assert counts["valid_share"] == 1 and counts["dropped"]["had"] == 0
    assert counts["dropped"]["repeated"] == 0 < counts["kept"]


def test_interrupted_augmentation_resumes_to_the_same_bytes(
    augmented: Path, toy_flags: list, tiny_llama: Path, tmp_path: Path
):
    run = tmp_path / "run"
    flags = [
        *toy_flags, *FLAGS, "--llm_base_model", tiny_llama, "--save_seconds", 0,
        "--export_root", run,
    ]  # fmt: skip
    interrupt("augment_data.py", *flags, when=run / "checkpoint.safetensors")
    before = contents(run)
    done = run_script("augment_data.py", *flags)
    assert done.returncode == 2 and "continue it with --resume" in done.stderr
    assert contents(run) == before
    flags += ["--resume", "true"]
    stopped = interrupt("augment_data.py", *flags, when=run / "generated.jsonl", how=signal.SIGTERM)
    message = "interrupted: to continue, run the same command with --resume and without --overwrite"
    assert stopped == (143, message)
    assert 0 < len((run / "generated.jsonl").read_text().splitlines()) < 60
    other = run_script("augment_data.py", *flags, "--top_p", 0.5)
    assert other.returncode == 2 and "other settings" in other.stderr
    done = run_script("augment_data.py", *flags)
    assert done.returncode == 0, done.stderr
    assert contents(run) == contents(augmented)
    done = run_script("augment_data.py", *flags)
    assert done.returncode == 0 and "nothing to resume" in done.stdout


def test_a_checkpoint_alone_can_be_resumed(tmp_path: Path):
    run = RunFolder(tmp_path, ("adapter",), "mine")
    assert not run.is_started()
    run.checkpoint.touch()
    (tmp_path / "config.json").write_text('{"fingerprint": "mine"}')
    assert run.is_started()
    with pytest.raises(InputError, match="other settings"):
        RunFolder(tmp_path, ("adapter",), "another").is_started()


def test_held_out_items_do_not_reach_the_language_model(
    augmented: Path, toy: dict[str, Path], tiny_llama: Path, tmp_path: Path
):
    """Give each user the held-out items of another user; the catalogue does not change."""
    sequences: dict[str, list[tuple]] = {}
    for row in toy_interactions():
        sequences.setdefault(row[0], []).append(row)
    users = list(sequences)
    lines = ["user,item,timestamp"]
    for user, lender in zip(users, users[1:] + users[:1]):
        rows = [*sequences[user][:-2], *sequences[lender][-2:]]
        timestamps = [timestamp for _, _, timestamp in sequences[user]]
        lines += [f"{user},{item},{timestamp}" for (_, item, _), timestamp in zip(rows, timestamps)]
    interactions = tmp_path / "interactions.csv"
    interactions.write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    done = run_script(
        "augment_data.py", "--dataset_code", "custom", "--interactions", interactions,
        "--items", toy["items"], "--cache_root", tmp_path / "cache", *FLAGS,
        "--llm_base_model", tiny_llama, "--export_root", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = contents(run), contents(augmented)
    same = {name for name in ours if ours[name] == theirs.get(name)}  # exports differ in name
    assert {"generated.jsonl", "log.jsonl", "augmentation.json"} <= same
    assert "adapter/adapter_model.safetensors" in same
    assert "augmented.npz" not in same  # it holds the fingerprint of its data
    with np.load(run / "augmented.npz") as mine, np.load(augmented / "augmented.npz") as yours:
        assert np.array_equal(mine["users"], yours["users"])
        assert np.array_equal(mine["items"], yours["items"])
