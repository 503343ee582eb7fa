import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.memory import rss_mib
from dataloader.sampler import evaluation_loader
from evaluation import sweep as module
from evaluation.sweep import sweep


class Numbers(Dataset):
    """Example i is the number i, among other things that a batch may hold."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: list[int]) -> dict:
        return {"numbers": torch.tensor(indices, dtype=torch.float32), "name": "x"}


@pytest.fixture()
def model() -> nn.Module:
    """Doubles its input, except in training."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(2.0)
    return nn.Sequential(layer, nn.Dropout(0.999))


@pytest.mark.parametrize("min_rows", [1, 100])
def test_rows_are_in_the_loaders_order(
    min_rows: int, model: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "MIN_ROWS", min_rows)

    def step(batch: dict) -> dict[str, Tensor]:
        assert torch.is_inference_mode_enabled() and not model.training
        numbers = batch["numbers"][:, None]
        return {"doubled": model(numbers), "index": batch["numbers"].int()}

    rows = sweep(model.train(), evaluation_loader(Numbers(7), 3, 0), step, description="numbers")
    assert list(rows) == ["doubled", "index"]
    assert rows["doubled"].tolist() == [[0], [2], [4], [6], [8], [10], [12]]
    assert rows["index"].tolist() == list(range(7)) and rows["index"].dtype == np.int32
    assert not model.training


def test_batches_are_on_the_models_device(model: nn.Module):
    devices = []

    def step(batch: dict) -> dict[str, Tensor]:
        devices.append(batch["numbers"].device.type)
        return {}

    sweep(model.to("meta"), evaluation_loader(Numbers(4), 2, 0), step, description="")
    assert devices == ["meta", "meta"]


def test_no_batches(model: nn.Module):
    rows = sweep(model, evaluation_loader(Numbers(0), 3, 0), lambda batch: {}, description="")
    assert rows == {}


def test_memory_does_not_grow_with_what_batches_leave_behind(model: nn.Module):
    def step(batch: dict) -> dict[str, Tensor]:
        scores = torch.zeros(len(batch["numbers"]), 10_000)
        best = scores.topk(20)
        return {"items": best.indices.int() + 1, "scores": best.values, "a": scores[:, 0].int()}

    sweep(model, evaluation_loader(Numbers(640), 64, 0), step, description="")
    before = rss_mib()
    rows = sweep(model, evaluation_loader(Numbers(12_800), 64, 0), step, description="")
    assert rows["items"].shape == (12_800, 20)
    assert rss_mib() - before < 100  # the scores of all batches take 488 MiB
