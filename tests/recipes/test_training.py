"""What all scripts share around training: settings, the trainer, the run's log and config."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from config import RankerConfig, RetrieverConfig
from recipes.training import (
    build_optimization,
    close_run,
    loop_settings,
    metrics_table,
    open_run,
)
from tests.helpers import ROOT
from trainer.fingerprint import RESULTS_FORMAT
from trainer.loop import Advice
from trainer.run_folder import RunFolder

ADVICE = Advice("a", "b", "c")


def retriever(**flags: Any) -> RetrieverConfig:
    return RetrieverConfig(dataset_code="games", **flags)


# Settings ---------------------------------------------------------------------------------------


def test_loop_settings():
    def settings(**flags: Any) -> Any:
        return loop_settings(
            retriever(**flags), num_epochs=3, val_iterations=7, patience=5, best_metric="NDCG@10",
            advice=ADVICE,
        )  # fmt: skip

    default = settings()
    assert (default.num_epochs, default.max_steps, default.best_metric) == (3, None, "NDCG@10")
    assert (default.val_steps, default.patience, default.max_grad_norm) == (7, 5, 5.0)
    assert (default.save_seconds, default.advice) == (300.0, ADVICE)
    assert settings(val_strategy="epoch").val_steps is None
    assert settings(early_stopping=False).patience is None
    changed = settings(max_steps=9, max_grad_norm=0.0, save_seconds=1.0)
    assert (changed.max_steps, changed.max_grad_norm, changed.save_seconds) == (9, 0.0, 1.0)


def learning_rates(config: Any, steps: int) -> list[float]:
    """Learning rates of the first steps."""
    model = nn.Linear(2, 2)
    optimizer, scheduler = build_optimization(model, config, lr=2.0, total_steps=10, paged=False)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_learning_rates_of_the_flags():
    assert learning_rates(retriever(), 3) == [2.0, 2.0, 2.0]
    warm = retriever(enable_lr_warmup=True, warmup_steps=2)
    assert learning_rates(warm, 4) == [0.0, 1.0, 2.0, 2.0]
    decaying = retriever(enable_lr_schedule=True)
    assert learning_rates(decaying, 3) == pytest.approx([2.0, 1.8, 1.6])
    cosine = retriever(enable_lr_schedule=True, lr_decay="cosine")
    assert learning_rates(cosine, 6)[5] == pytest.approx(1.0)
    both = RankerConfig(dataset_code="games", warmup_steps=2)  # on by default
    assert learning_rates(both, 4) == pytest.approx([0.0, 1.0, 2.0, 1.75])


def test_published_schedule_without_a_warm_up():
    steps = {"enable_lr_schedule": True, "decay_step": 3, "gamma": 0.5}
    expected = [2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.5]
    assert learning_rates(retriever(**steps), 7) == expected
    assert learning_rates(retriever(**steps | {"gamma": None}), 4) == [2.0] * 4
    for off in ({"enable_lr_schedule": False}, {"enable_lr_warmup": True}):
        plain = steps | {"decay_step": None} | off
        assert learning_rates(retriever(**steps | off), 7) == learning_rates(retriever(**plain), 7)


def test_optimizer_of_the_flags():
    config = retriever(optimizer="Adam", weight_decay=0.3, adam_epsilon=1e-7)
    optimizer, _ = build_optimization(nn.Linear(2, 2), config, lr=2.0, total_steps=10, paged=False)
    assert type(optimizer) is torch.optim.Adam
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {group["eps"] for group in optimizer.param_groups} == {1e-7}


# Log and config ---------------------------------------------------------------------------------


@pytest.fixture()
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path, ("weights",), "mine")
    for name in ("weights", "log.jsonl", "checkpoint.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
    return run


def test_open_run_clears_the_folder_and_writes_the_settings(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.argv", ["/x/train_retriever.py", "--dataset_code", "games"])
    config = retriever(metric_ks=(5, 10))
    log = open_run(run, config, {"device": "cpu", "num_users": 7})
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "notes.txt"]
    settings = json.loads((run.path / "config.json").read_text())
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    expected = config.as_dict() | {
        "device": "cpu", "num_users": 7, "fingerprint": "mine", "results_format": RESULTS_FORMAT,
        "torch": torch.__version__, "commit": head.stdout.strip() or None,
        "command": "python train_retriever.py --dataset_code games",
    }  # fmt: skip
    assert settings == expected | {
        "metric_ks": [5, 10], "search_dropout": list(config.search_dropout),
        "search_weight_decay": list(config.search_weight_decay),
    }  # fmt: skip
    assert log.path == run.path / "log.jsonl" and not log.trackers


def test_open_run_keeps_the_files_of_a_resumed_run(run: RunFolder):
    def files() -> list[str]:
        return sorted(path.name for path in run.path.iterdir())

    (run.path / "config.json").write_text("{}")
    before = files()
    open_run(run, retriever(resume=True), {})
    assert files() == before and (run.path / "config.json").read_text() == "{}"
    open_run(run, retriever(), {}, resumed=True)
    assert files() == before
    run.checkpoint.unlink()  # without it there is nothing to resume
    open_run(run, retriever(resume=True), {})
    assert files() == ["config.json", "notes.txt"]


def test_open_run_repairs_the_settings_of_a_resumed_run(run: RunFolder):
    (run.path / "config.json").write_text("cut off")
    open_run(run, retriever(resume=True), {})
    assert run.is_interrupted() and run.is_started()


def test_open_run_replaces_a_run_that_is_overwritten(run: RunFolder):
    open_run(run, retriever(overwrite=True), {})
    assert not run.is_interrupted() and not run.has_outputs()


def test_close_run(run: RunFolder):
    log = open_run(run, retriever(), {}, resumed=True)
    close_run(run, log, {"test_NDCG@10": 0.5})
    assert not run.checkpoint.exists() and (run.path / "weights").exists()
    close_run(run, log, {})  # without a checkpoint


# Table ------------------------------------------------------------------------------------------


def test_metrics_table():
    columns = {
        "validation": {"Recall@10": 0.25, "NDCG@10": 0.125, "num_users": 1234},
        "test": {"Recall@10": 1.0, "NDCG@10": 0.00005, "num_users": 7, "weight": 0.5},
    }
    lines = metrics_table(columns).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split() for line in lines] == [
        ["validation", "test"],
        ["Recall@10", "0.2500", "1.0000"],
        ["NDCG@10", "0.1250", "0.0001"],
        ["users", "1,234", "7"],
    ]
