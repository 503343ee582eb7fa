"""Moving average of a model's weights: what is validated and kept in place of the last step's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of the trainable weights (Polyak and Juditsky, 1992).

    The first steps would weigh too much at once, so the decay of step t is at most
    (1 + t) / (10 + t).

    Args:
        model: the model, on its device; frozen weights are not copied.
        decay: share of the old average that a step keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.weights]

    def update(self) -> None:
        """Take the weights after an optimizer step into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.averages, self.weights, self.steps)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averages for its weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.averages):
            weight.data, average.data = average.data, weight.data

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        """What ``load_state_dict`` needs."""
        return {"steps": self.steps, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, int | list[Tensor]]) -> None:
        """Go on from a state of the same model."""
        self.steps = state["steps"]
        for average, saved in zip(self.averages, state["averages"]):
            average.copy_(saved)
