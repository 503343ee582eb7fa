"""``train_retriever.py`` as a user runs it: its files, reproducibility, resuming, failures."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import train_retriever
from datasets import SequenceDataset
from errors import UserError
from recipes import fit_retriever
from storage import read_json
from tests.helpers import file_names, interrupt, run_script

RUN_60 = [
    "--max_steps", 60, "--val_iterations", 30, "--train_batch_size", 16, "--device", "cpu",
]  # fmt: skip
FLAGS = ["--device", "cpu", "--val_iterations", 10, "--train_batch_size", 16]
FILES = [
    "candidates.npz", "config.json", "log.jsonl", "model.safetensors", "test_metrics.json",
    "val_metrics.json",
]  # fmt: skip


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def main(*flags: object) -> None:
    train_retriever.main(list(map(str, flags)))


# Files ------------------------------------------------------------------------------------------


def test_files(retrieved: Path):
    assert file_names(retrieved) == FILES
    config = read_json(retrieved / "config.json")
    assert config["seed"] == 42 and config["max_steps"] == 60 and "commit" in config
    metrics = read_json(retrieved / "test_metrics.json")
    keys = [f"{m}@{k}" for k in (1, 5, 10, 20, 50) for m in ("Recall", "MRR", "NDCG")]
    assert list(metrics) == [*keys, "num_users"] and metrics["num_users"] == 60
    with np.load(retrieved / "candidates.npz", allow_pickle=False) as file:
        for split in ("val", "test"):
            items, ranks = file[f"{split}_items"], file[f"{split}_label_ranks"]
            assert items.shape == (60, 20) and items.dtype == np.int32
            assert file[f"{split}_scores"].dtype == np.float32
            assert file[f"{split}_labels"].dtype == ranks.dtype == np.int32
            positions = (items == file[f"{split}_labels"][:, None]).argmax(1)
            assert (positions[ranks <= 20] + 1 == ranks[ranks <= 20]).all()
        recall = (file["test_label_ranks"] <= 10).mean()
    assert metrics["Recall@10"] == recall > 0.5  # toy users are easy to predict
    assert [record["step"] for record in read_log(retrieved)] == [30, 60]
    with safe_open(retrieved / "model.safetensors", "pt") as file:
        assert "embedding.weight" in file.keys()  # noqa: SIM118


def test_candidates_exclude_the_history(retrieved: Path, toy_data: SequenceDataset):
    data = toy_data
    with np.load(retrieved / "candidates.npz") as file:
        for split in ("val", "test"):
            for user, items in enumerate(file[f"{split}_items"]):
                history = data.item_ids[data.offsets[user] : data.history_ends(split)[user]]
                finite = np.isfinite(file[f"{split}_scores"][user])
                assert not set(history.tolist()) & set(items[finite].tolist())


def test_an_earlier_run_is_replaced_on_request(toy_flags: list, tmp_path: Path):
    run = tmp_path / "run"
    flags = [*toy_flags, "--device", "cpu", "--export_root", run, "--max_steps"]
    assert run_script("train_retriever.py", *flags, 1).returncode == 0
    (run / "log.jsonl").write_text("")
    done = run_script("train_retriever.py", *flags, 2, "--overwrite")
    assert done.returncode == 0 and file_names(run) == FILES
    assert read_json(run / "config.json")["max_steps"] == 2


def test_charts(toy_flags: list, tmp_path: Path):
    """Weights & Biases, offline, and TensorBoard."""
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    done = run_script(
        "train_retriever.py", *toy_flags, *FLAGS, "--max_steps", 2, "--export_root", run,
        "--use_wandb", "--use_tensorboard",
        env={"WANDB_MODE": "offline", "WANDB_API_KEY": "5ec2e7" * 7},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert b"test_NDCG@10" in b"".join(x.read_bytes() for x in run.glob("tensorboard/event*"))
    files = (path for path in run.rglob("*") if path.is_file())
    assert not [path for path in files if b"5ec2e75ec2e7" in path.read_bytes()]


# Training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["sas", "bert", "narm"])
def test_baselines_learn_and_feed_the_ranker(
    code: str, toy_flags: list, toy_data: SequenceDataset, tiny_llama: Path, tmp_path: Path
):
    run = tmp_path / code / toy_data.code
    done = run_script(
        "train_retriever.py", *toy_flags, "--device", "cpu", "--model_code", code, "--max_steps",
        250, "--train_batch_size", 16, "--experiment_root", tmp_path, "--dropout", 0.1,
        "--max_len", 10, "--lr", 3e-3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert file_names(run) == FILES
    assert read_json(run / "test_metrics.json")["Recall@10"] > 0.7  # 0.34 by chance
    if code == "bert":
        done = run_script(
            "train_ranker.py", "--llm_retrieved_path", run, "--llm_base_model", tiny_llama,
            "--experiment_root", tmp_path, "--max_steps", 1, "--device", "cpu",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_validation_by_epoch(toy_flags: list, tmp_path: Path):
    done = run_script(
        "train_retriever.py", *toy_flags, "--device", "cpu", "--train_batch_size", 32,
        "--val_strategy", "epoch", "--num_epochs", 3, "--export_root", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in read_log(tmp_path / "run")] == [2, 4, 6]


def test_optimizer_has_the_settings_of_the_flags(
    toy_flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    optimizers = []

    class Recorder(torch.optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    flags = [*toy_flags, "--device", "cpu", "--max_steps", 1, "--export_root", tmp_path / "run"]
    main(*flags, "--weight_decay", 0.3, "--lr", 3e-4, "--adam_epsilon", 1e-7)
    main(*flags, "--weight_decay", 0, "--lr", 3e-4, "--overwrite")
    decays = [{group["weight_decay"] for group in x.param_groups} for x in optimizers]
    assert decays == [{0.3, 0.0}, {0.0}]
    assert {group["lr"] for x in optimizers for group in x.param_groups} == {3e-4}
    assert optimizers[0].defaults["eps"] == 1e-7


# Reproducibility and resuming -------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes(toy_flags: list, retrieved: Path, tmp_path: Path):
    again, other = tmp_path / "again", tmp_path / "other"
    done = run_script(
        "train_retriever.py", *toy_flags, *RUN_60, "--export_root", again,
        env={"PYTHONHASHSEED": "123"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("test_metrics.json", "val_metrics.json", "candidates.npz", "model.safetensors"):
        assert (again / name).read_bytes() == (retrieved / name).read_bytes(), name
    done = run_script(
        "train_retriever.py", *toy_flags, *RUN_60, "--seed", 1, "--export_root", other
    )
    assert done.returncode == 0, done.stderr
    assert (other / "candidates.npz").read_bytes() != (retrieved / "candidates.npz").read_bytes()


def test_interrupted_run_resumes_to_the_same_bytes(toy_flags: list, tmp_path: Path):
    recipe = [
        "--ema_decay", 0.9, "--enable_lr_schedule", "--lr_decay", "cosine", "--negatives", 8,
        "--loss_precision", "bfloat16",
    ]  # fmt: skip
    flags = [*toy_flags, *FLAGS, *recipe, "--max_steps", 400]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run_script("train_retriever.py", *flags, "--export_root", whole)
    assert done.returncode == 0, done.stderr
    checkpoint = broken / "checkpoint.safetensors"
    flags += ["--save_seconds", 0.5, "--export_root", broken]
    interrupt("train_retriever.py", *flags, when=checkpoint)
    assert not (broken / "test_metrics.json").exists()
    flags += ["--resume"]
    message = "interrupted: to continue, run the same command with --resume and without --overwrite"
    for how, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        stopped = interrupt("train_retriever.py", *flags, when=checkpoint, how=how)
        assert stopped == (status, message)
        assert checkpoint.exists()
    done = run_script("train_retriever.py", *flags)
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    assert file_names(broken) == FILES
    for name in FILES:
        if name != "config.json":
            assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    before = (broken / "config.json").stat().st_mtime_ns
    done = run_script("train_retriever.py", *flags)
    assert done.returncode == 0 and "nothing to resume" in done.stdout
    assert (broken / "config.json").stat().st_mtime_ns == before


def test_resume_without_a_checkpoint_starts_from_scratch(toy_flags: list, tmp_path: Path):
    run = tmp_path / "run"
    done = run_script(
        "train_retriever.py", *toy_flags, *FLAGS, "--max_steps", 2, "--export_root", run, "--resume"
    )
    assert done.returncode == 0, done.stderr
    assert f"nothing to resume in {run}: starting from scratch" in done.stdout


# Failures ---------------------------------------------------------------------------------------


def out_of_memory(*args: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory(toy_flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = [*toy_flags, "--device", "cpu", "--export_root", tmp_path, "--train_batch_size", 2]
    flags += ["--max_steps", 3]
    with monkeypatch.context() as patch:
        patch.setattr(fit_retriever, "catalogue_loss", out_of_memory)
        with pytest.raises(UserError) as caught:
            main(*flags)
    assert str(caught.value) == (
        "the GPU is out of memory after step 0: start from scratch with --overwrite and a lower "
        "--train_batch_size"
    )
    with monkeypatch.context() as patch:
        patch.setattr(fit_retriever, "retrieve", out_of_memory)
        with pytest.raises(UserError) as caught:
            main(*flags)
    assert str(caught.value) == (
        "the GPU is out of memory after step 3: continue with --resume and a lower --val_batch_size"
    )
    main(*flags, "--val_batch_size", 8, "--resume")
    assert file_names(tmp_path) == FILES


def test_diverged_loss(toy_flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    catalogue_loss, calls = fit_retriever.catalogue_loss, 0

    def nan_once(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return catalogue_loss(*args, **options) * (float("nan") if calls == 3 else 1)

    monkeypatch.setattr(fit_retriever, "catalogue_loss", nan_once)
    message = (
        r"^the loss is nan at step 3 with users u\d+, u\d+: "
        "start from scratch with --overwrite and a lower --lr$"
    )
    flags = [*toy_flags, "--device", "cpu", "--export_root", tmp_path, "--train_batch_size", 2]
    with pytest.raises(UserError, match=message):
        main(*flags)
    assert not (tmp_path / "checkpoint.safetensors").exists()
