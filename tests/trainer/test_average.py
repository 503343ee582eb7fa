import pytest
import torch
from torch import nn

from trainer.average import WeightAverage


@pytest.fixture()
def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    return layer


def train(model: nn.Module, average: WeightAverage, steps: int) -> torch.Tensor:
    """Move the weights at random; returns their average by its definition."""
    expected = model.weight.detach().clone()
    for step in range(1, steps + 1):
        model.weight.data += torch.randn(2, 3)
        average.update()
        decay = min(average.decay, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    return expected


def test_average_of_the_weights(model: nn.Module):
    average = WeightAverage(model, decay=0.3)  # the bound on the decay matters up to step 2
    expected = train(model, average, steps=7)
    last, parameter, frozen = model.weight.detach().clone(), model.weight, model.bias.clone()
    with average.applied():
        torch.testing.assert_close(model.weight.data, expected)
    assert torch.equal(model.weight, last) and model.weight is parameter
    assert torch.equal(model.bias, frozen)


def test_the_weights_return_after_an_error(model: nn.Module):
    average = WeightAverage(model, decay=0.5)
    train(model, average, steps=3)
    last = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), average.applied():
        assert not torch.equal(model.weight, last)
        _ = 1 / 0
    assert torch.equal(model.weight, last)


def test_state(model: nn.Module):
    average = WeightAverage(model, decay=0.5)
    train(model, average, steps=4)
    state = average.state_dict()
    assert state["steps"] == 4 and len(state["averages"]) == 1  # nothing of frozen weights
    restored = WeightAverage(model, decay=0.5)
    restored.load_state_dict(state)
    for step in range(3):
        model.weight.data += step
        average.update()
        restored.update()
    assert torch.equal(*(x.state_dict()["averages"][0] for x in (average, restored)))
