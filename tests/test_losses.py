"""Losses over the catalogue against torch's, and what sampling does to them."""

import numpy as np
import pytest
import torch
from torch import nn

from model import losses
from model.losses import SampledCrossEntropy, linear_cross_entropy


def output_inputs(rows: int, num_items: int, scale: float) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, requires_grad=True, dtype=torch.float64)
        for shape in ((rows, 8), (num_items + 1, 8), (num_items + 1,))
    )
    x.data *= scale
    return x, weight, bias, torch.randint(1, num_items + 1, (rows,))


def assert_same_gradients(found: torch.Tensor, expected: torch.Tensor, inputs: list, **tolerance):
    for a, b in zip(*(torch.autograd.grad(3 * loss, inputs) for loss in (found, expected))):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_chunked_cross_entropy_equals_torch(
    rows: int, label_smoothing: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 64 * 300)
    x, weight, bias, labels = output_inputs(rows, 299, 30)  # scores that overflow exp
    for offset in (bias, None):
        found = linear_cross_entropy(
            x, weight, offset, labels=labels, label_smoothing=label_smoothing
        )
        expected = nn.functional.cross_entropy(
            nn.functional.linear(x, weight, offset), labels, label_smoothing=label_smoothing
        )
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        inputs = [t for t in (x, weight, offset) if t is not None]
        assert_same_gradients(found, expected, inputs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("negatives", [None, 64])
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_products_in_bfloat16_move_little(
    rows: int, negatives: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 64 * 150)
    x, weight, bias, labels = output_inputs(rows, 299, 1)
    x, weight, bias = inputs = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    found = []
    for precision in (None, torch.bfloat16):
        torch.manual_seed(0)
        loss = SampledCrossEntropy(np.arange(300), negatives) if negatives else linear_cross_entropy
        options = {"label_smoothing": 0.1, "precision": precision}
        found.append(loss(x, weight, bias, labels=labels, **options))
    assert found[0].item() != found[1].item() == pytest.approx(found[0].item(), rel=2e-3)
    for exact, narrow in zip(*(torch.autograd.grad(loss, inputs) for loss in found)):
        assert exact.dtype == narrow.dtype == torch.float32
        assert (exact - narrow).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_sampled_cross_entropy_approaches_the_full_one(label_smoothing: float):
    x, weight, bias, labels = output_inputs(50, 40, 1)
    counts = np.random.default_rng(0).integers(0, 100, size=41)
    counts[0] = 0
    sampled = SampledCrossEntropy(counts, 400_000)
    for offset in (bias, None):
        found = sampled(x, weight, offset, labels=labels, label_smoothing=label_smoothing)
        scores = nn.functional.linear(x, weight, offset)[:, 1:]  # 0 is no item
        expected = nn.functional.cross_entropy(scores, labels - 1, label_smoothing=label_smoothing)
        assert found.item() == pytest.approx(expected.item(), rel=3e-3)
        inputs = [t for t in (x, weight, offset) if t is not None]
        assert_same_gradients(found, expected, inputs, rtol=0.05, atol=0.03)


def test_negatives_are_items_drawn_with_their_probabilities():
    counts = np.array([0, 0, 30, 10])
    sampled = SampledCrossEntropy(counts, 300_000)
    weight = torch.zeros(4, 1, requires_grad=True)
    torch.manual_seed(0)
    # With all scores equal, a row's gradient by an item's embedding is that item's weight in the
    # softmax: 1/3 for each, whatever the probability it is drawn with.
    x = torch.ones(1, 1)
    loss = sampled(x, weight, None, labels=torch.tensor([1]))
    assert loss.item() == pytest.approx(np.log(3), abs=0.01)
    loss.backward()
    assert weight.grad[:, 0].tolist() == pytest.approx([0, -2 / 3, 1 / 3, 1 / 3], abs=0.01)


def test_a_label_among_the_negatives_counts_once():
    sampled = SampledCrossEntropy(np.array([0, 1, 0]), 4)
    sampled.cumulative = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)  # draws item 1 alone
    loss = sampled(torch.ones(2, 3), torch.ones(3, 3), None, labels=torch.tensor([1, 2]))
    assert torch.isfinite(loss)
    alone = sampled(torch.ones(1, 3), torch.ones(3, 3), None, labels=torch.tensor([1]))
    assert alone.item() == 0  # nothing is left to compare the label with
