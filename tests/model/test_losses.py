"""Losses over the catalogue against torch's, and the effect of sampling."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dataloader.sequences import TrainingWindows
from model import losses
from model.losses import SampledCrossEntropy, catalogue_loss, linear_cross_entropy
from tests.helpers import make_data, small_model


def output_inputs(rows: int, num_items: int, scale: float) -> tuple[Tensor, ...]:
    """Random encodings, embeddings, biases and labels in float64."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, requires_grad=True, dtype=torch.float64)
        for shape in ((rows, 8), (num_items + 1, 8), (num_items + 1,))
    )
    x.data *= scale
    return x, weight, bias, torch.randint(1, num_items + 1, (rows,))


def assert_same_gradients(
    ours: Tensor, expected: Tensor, inputs: list[Tensor], *, rtol: float, atol: float
) -> None:
    for a, b in zip(*(torch.autograd.grad(3 * loss, inputs) for loss in (ours, expected))):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# The whole catalogue ----------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_chunked_cross_entropy_equals_torch(
    rows: int, label_smoothing: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 64 * 300)
    x, weight, bias, labels = output_inputs(rows, 299, 30)  # exp of the scores overflows
    for offset in (bias, None):
        ours = linear_cross_entropy(
            x, weight, offset, labels=labels, label_smoothing=label_smoothing
        )
        expected = nn.functional.cross_entropy(
            nn.functional.linear(x, weight, offset), labels, label_smoothing=label_smoothing
        )
        assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
        inputs = [t for t in (x, weight, offset) if t is not None]
        assert_same_gradients(ours, expected, inputs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("negatives", [None, 64])
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_products_in_bfloat16_change_little(
    rows: int, negatives: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 64 * 150)
    x, weight, bias, labels = output_inputs(rows, 299, 1)
    x, weight, bias = inputs = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    results = []
    for precision in (None, torch.bfloat16):
        torch.manual_seed(0)
        loss = SampledCrossEntropy(np.arange(300), negatives) if negatives else linear_cross_entropy
        options = {"label_smoothing": 0.1, "precision": precision}
        results.append(loss(x, weight, bias, labels=labels, **options))
    exact, narrow = (loss.item() for loss in results)
    assert exact != narrow == pytest.approx(exact, rel=2e-3)
    for exact, narrow in zip(*(torch.autograd.grad(loss, inputs) for loss in results)):
        assert exact.dtype == narrow.dtype == torch.float32
        assert (exact - narrow).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("code", ["lru", "narm"])  # with item biases and without
def test_catalogue_loss_is_the_cross_entropy_of_the_scores(code: str):
    model = small_model(code)
    data = make_data([9, 3, 20, 5])
    (batch,) = TrainingWindows(data, 12, 1.0).__getitems__([0, 1, 2, 3])
    loss = catalogue_loss(model, batch)
    expected = nn.functional.cross_entropy(model(batch["sequences"]), batch["labels"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    def scaled(x: Tensor, weight: Tensor, bias: Tensor | None, *, labels: Tensor) -> Tensor:
        assert (bias is None) == (code == "narm")
        return 2 * linear_cross_entropy(x, weight, bias, labels=labels)

    assert catalogue_loss(model, batch, scaled).item() == pytest.approx(2 * loss.item())


# Sampled items ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_sampled_cross_entropy_approaches_the_full_one(label_smoothing: float):
    x, weight, bias, labels = output_inputs(50, 40, 1)
    counts = np.random.default_rng(0).integers(0, 100, size=41)
    counts[0] = 0
    sampled = SampledCrossEntropy(counts, 400_000)
    for offset in (bias, None):
        ours = sampled(x, weight, offset, labels=labels, label_smoothing=label_smoothing)
        scores = nn.functional.linear(x, weight, offset)[:, 1:]  # 0 is not an item
        expected = nn.functional.cross_entropy(scores, labels - 1, label_smoothing=label_smoothing)
        assert ours.item() == pytest.approx(expected.item(), rel=3e-3)
        inputs = [t for t in (x, weight, offset) if t is not None]
        assert_same_gradients(ours, expected, inputs, rtol=0.05, atol=0.03)


def test_negatives_are_items_drawn_with_their_probabilities():
    counts = np.array([0, 0, 30, 10])
    sampled = SampledCrossEntropy(counts, 300_000)
    weight = torch.zeros(4, 1, requires_grad=True)
    torch.manual_seed(0)
    # With all scores equal, the gradient of a row's loss by an item's embedding is that item's
    # share of the softmax: 1/3 each, whatever the probability of drawing the item.
    x = torch.ones(1, 1)
    loss = sampled(x, weight, None, labels=torch.tensor([1]))
    assert loss.item() == pytest.approx(np.log(3), abs=0.01)
    loss.backward()
    assert weight.grad[:, 0].tolist() == pytest.approx([0, -2 / 3, 1 / 3, 1 / 3], abs=0.01)


def test_a_label_among_the_negatives_counts_once():
    sampled = SampledCrossEntropy(np.array([0, 1, 0]), 4)
    sampled.cumulative = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)  # always draws item 1
    loss = sampled(torch.ones(2, 3), torch.ones(3, 3), None, labels=torch.tensor([1, 2]))
    assert torch.isfinite(loss)
    alone = sampled(torch.ones(1, 3), torch.ones(3, 3), None, labels=torch.tensor([1]))
    assert alone.item() == 0  # there is nothing to compare the label with
