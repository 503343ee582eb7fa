"""The attention of NARM, computed tile by tile, against its definition."""

import pytest
import torch

from model import narm
from model.narm import AdditiveAttention


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    states: torch.Tensor,
    v: torch.Tensor,
    scored: list[int],
    starts: list[int],
) -> torch.Tensor:
    """The definition, one query after the other."""
    sums = []
    for row, (last, first) in enumerate(zip(scored, starts)):
        energies = torch.sigmoid(query[row] + key[first : last + 1]) @ v
        sums.append(energies @ states[first : last + 1])
    return torch.stack(sums)


@pytest.mark.parametrize("tile", [1, 2, 3, 5, 16])
def test_attention_and_gradients_equal_the_definition(tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(narm.TILE_POSITIONS, "cpu", tile)
    torch.manual_seed(0)
    scored = [0, 2, 3, 4, 7, 9, 10, 14]  # in sequences of 1, 4, 3, 4 and 3 positions
    starts = [0, 1, 1, 1, 5, 8, 8, 12]
    shapes = ((8, 4), (15, 4), (15, 4), (4,))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    ours = AdditiveAttention.apply(*inputs, torch.tensor(scored), torch.tensor(starts))
    expected = attend(*inputs, scored, starts)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((x * weight).sum(), inputs) for x in (ours, expected)]
    for gradient, expected_gradient in zip(*gradients):
        torch.testing.assert_close(gradient, expected_gradient)


def test_additive_attention_gradcheck(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(narm.TILE_POSITIONS, "cpu", 3)
    torch.manual_seed(2)
    scored = torch.tensor([0, 2, 3, 4, 7])  # in sequences of 1, 4 and 3 positions
    starts = torch.tensor([0, 1, 1, 1, 5])
    shapes = ((5, 2), (8, 2), (8, 2), (2,))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *x: AdditiveAttention.apply(*x, scored, starts), inputs)
