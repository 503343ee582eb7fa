"""The inference loop over the users or examples of a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distributed import interleave, is_sharded, repeats, size
from progress import ProgressBar

MIN_ROWS = 1 << 16  # untouched memory takes none
Step = Callable[[dict[str, Any]], dict[str, Tensor]]


def sweep(
    model: nn.Module, loader: DataLoader, step: Step, *, description: str
) -> dict[str, np.ndarray]:
    """Evaluate a model batch by batch and collect the results on the host.

    Several processes share the batches, and each gets the results of all.

    Args:
        model: the model; it is put in eval mode and left there.
        loader: evaluation batches, see ``dataloader.sampler.evaluation_loader``.
        step: maps a batch on the model's device to named tensors, whose rows are concatenated over
            the batches.
        description: title of the progress bar.

    Returns:
        The arrays by name, rows in the data set's order; no arrays if there are no batches.
    """
    model.eval()
    device = next(model.parameters()).device
    sharded = is_sharded(model)
    rows: dict[str, _Rows] = {}
    # Gathered weights of a sharded model outlive the sweep. They must not be inference tensors, as
    # training uses them again.
    with torch.no_grad() if sharded else torch.inference_mode():
        extra = repeats(len(loader), next(iter(loader), None)) if sharded else ()
        for batch in ProgressBar(loader, desc=description, unit="batch", leave=False):
            for name, values in step(send_to_device(batch, device)).items():
                part = values.cpu().numpy()
                if name not in rows:
                    rows[name] = _Rows(part)
                rows[name].append(part)
        for batch in extra:
            step(send_to_device(batch, device))
    if size() == 1:
        return {name: own.values for name, own in rows.items()}
    parts = interleave([dict(zip(rows, batch)) for batch in zip(*map(_Rows.parts, rows.values()))])
    names = list(parts[0]) if parts else []
    return {name: np.concatenate([part.pop(name) for part in parts]) for name in names}


class _Rows:
    """An array whose rows arrive in parts.

    The parts are copied into one buffer. Kept in a list, these small arrays would lie between large
    tensors of the batches that are freed, and keep the allocator from reusing that memory.
    """

    def __init__(self, example: np.ndarray) -> None:
        self._buffer = np.empty((MIN_ROWS, *example.shape[1:]), example.dtype)
        self._ends = [0]

    def append(self, part: np.ndarray) -> None:
        """Copy the rows of a part."""
        start, end = self._ends[-1], self._ends[-1] + len(part)
        if end > len(self._buffer):
            grown = np.empty((2 * end, *part.shape[1:]), part.dtype)
            grown[:start] = self.values
            self._buffer = grown
        self._buffer[start:end] = part
        self._ends.append(end)

    @property
    def values(self) -> np.ndarray:
        """All rows so far."""
        return self._buffer[: self._ends[-1]]

    def parts(self) -> list[np.ndarray]:
        """The parts, as they were appended."""
        return np.split(self.values, self._ends[1:-1])
