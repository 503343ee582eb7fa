"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of the trainable weights (Polyak and Juditsky, 1992).

    The decay of step t is at most (1 + t) / (10 + t), so that the first steps do not dominate.

    Args:
        model: the model, on its device; frozen weights are not copied.
        decay: weight of the old average in a step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.weights]

    def update(self) -> None:
        """Include the weights after an optimizer step in the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self.averages, self.weights, self.steps)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the model's weights by their averages inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.averages):
            weight.data, average.data = average.data, weight.data

    def state_dict(self) -> dict[str, Any]:
        """Number of updates and averages, for ``load_state_dict``."""
        return {"steps": self.steps, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned for the same model."""
        self.steps = state["steps"]
        for average, saved in zip(self.averages, state["averages"]):
            average.copy_(saved)
