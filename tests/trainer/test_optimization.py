import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from config import MODEL_CODES
from errors import ArgumentError
from tests.helpers import small_model
from trainer.optimization import (
    MIN_PAGED_ELEMENTS,
    build_optimizer,
    build_schedule,
    make_accelerator,
)

# Device and seed --------------------------------------------------------------------------------


def test_the_seed_seeds_every_generator():
    def draw(seed: int) -> list[float]:
        make_accelerator("cpu", seed)
        return [torch.rand(1).item(), float(np.random.rand()), random.random()]

    first, again, other = draw(1), draw(1), draw(2)
    assert first == again and all(a != b for a, b in zip(first, other))


def test_the_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make_accelerator("cpu", 0).device.type == "cpu"
    assert make_accelerator(None, 0).device.type == "cpu"
    with pytest.raises(ArgumentError, match="device cuda"):
        make_accelerator("cuda", 0)


# Optimizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", MODEL_CODES)
def test_biases_and_layer_norms_do_not_decay(code: str):
    model = small_model(code)
    optimizer = build_optimizer(
        model, "AdamW", lr=1e-3, weight_decay=0.3, epsilon=1e-8, paged=False
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay.keys() == set(names.values()) and decay["embedding.weight"] == 0.3
    exempt = {name for name in decay if "bias" in name or "layer_norm" in name}
    assert exempt and {name for name in decay if not decay[name]} == exempt


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_settings_of_the_optimizer(name: str):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    # Paging is for large tensors; bitsandbytes is not needed for small ones.
    optimizer = build_optimizer(model, name, lr=0.2, weight_decay=0.0, epsilon=1e-7, paged=True)
    assert type(optimizer) is getattr(torch.optim, name)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["eps"], group["weight_decay"]) == (0.2, 1e-7, 0.0)
    assert group["params"] == [model.weight]  # the frozen bias is left out


def test_sgd():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(
        model, "SGD", lr=0.2, weight_decay=0.1, epsilon=1e-7, momentum=0.9, paged=True
    )
    assert type(optimizer) is torch.optim.SGD
    assert all((group["lr"], group["momentum"]) == (0.2, 0.9) for group in optimizer.param_groups)


def test_only_large_adapters_are_paged():
    model = nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 2))
    model[0].requires_grad_(False)
    assert model[0].weight.numel() > MIN_PAGED_ELEMENTS
    optimizer = build_optimizer(model, "AdamW", lr=0.1, weight_decay=0, epsilon=1e-8, paged=True)
    assert type(optimizer) is torch.optim.AdamW


def test_weight_decay_without_layers_that_are_exempt():
    model = nn.Linear(3, 2, bias=False)
    optimizer = build_optimizer(model, "AdamW", lr=1, weight_decay=0.1, epsilon=1e-8, paged=False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


# Schedule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "halfway"), [(None, 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedule(decay: str | None, halfway: float):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, warmup=10, total=110, decay=decay)
    rates = []
    for _ in range(115):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0 and rates[5] == pytest.approx(1.0) and rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2 * halfway)
    quarter = {None: 1.0, "linear": 0.75, "cosine": 0.5 + 0.5 * math.cos(math.pi / 4)}[decay]
    assert rates[35] == pytest.approx(2 * quarter)
    assert rates[110] == rates[114] == pytest.approx(2.0 if decay is None else 0.0)


def test_schedule_without_warmup():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    build_schedule(optimizer, warmup=0, total=10, decay="linear")
    assert optimizer.param_groups[0]["lr"] == 2.0


def test_schedule_of_a_run_shorter_than_its_warmup():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, warmup=20, total=10, decay="cosine")
    rates = []
    for _ in range(22):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[10] == pytest.approx(1.0) and rates[20] == pytest.approx(0.0)
