"""Dropout, attention with dropout, and initial weights."""

import pytest
import torch
from torch import nn

from jagged import padded_rows
from model.layers import Dropout, SelfAttention, truncated_normal_


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_share_and_keeps_the_mean(p: float):
    torch.manual_seed(0)
    layer = Dropout(p)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = layer(x)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=2e-3)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    for axis in (0, 1):  # no row or column is treated unlike the others
        assert (kept.float().mean(axis) - (1 - p)).abs().max() < 0.08
    pairs = (kept[:, 1:] & kept[:, :-1]).float().mean().item()
    assert pairs == pytest.approx((1 - p) ** 2, abs=3e-3)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_of_any_number_of_elements():
    torch.manual_seed(0)
    layer = Dropout(0.5)
    for size in (0, 1, 2, 3, 4, 5, 7, 1023):  # one draw is enough for four elements
        y = layer(torch.ones(size))
        assert y.shape == (size,) and set(y.tolist()) <= {0.0, 2.0}


def test_dropout_of_none():
    state = torch.get_rng_state()
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_keeps_the_dtype():
    torch.manual_seed(0)
    y = Dropout(0.25)(torch.ones(999, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and (y == 0).any() and (y != 0).any()


@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_dropout_is_right_on_average(causal: bool):
    torch.manual_seed(0)
    layer = SelfAttention(8, 2, 0.0, 0.25, causal=causal)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 3)])
    (rows,) = padded_rows(positions, 5, with_mask=not causal)
    qkv = torch.randn(9, 24)
    expected = layer.eval()._attend(qkv, rows)
    layer.train()
    draws = torch.stack([layer._attend(qkv, rows) for _ in range(4000)])
    assert draws.std(0).min() > 0.01
    torch.testing.assert_close(draws.mean(0), expected, rtol=0, atol=0.05)


def test_initial_weights_are_truncated_at_two_standard_deviations():
    torch.manual_seed(0)
    module = nn.ModuleDict({"linear": nn.Linear(300, 300), "layer_norm": nn.LayerNorm(300)})
    module.register_parameter("nu_log", nn.Parameter(torch.full((300,), 7.0)))
    truncated_normal_(module)
    weight = module["linear"].weight
    assert weight.abs().max() <= 0.04 and weight.std().item() == pytest.approx(0.0176, rel=0.02)
    assert module["linear"].bias.std().item() == pytest.approx(0.0176, rel=0.15)
    assert (module["layer_norm"].weight == 1).all() and (module["layer_norm"].bias == 0).all()
    assert (module.nu_log == 7).all()
