"""The inference loop over the users or examples of a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distributed import interleave, is_sharded, repeats
from progress import ProgressBar

Step = Callable[[dict[str, Any]], dict[str, Tensor]]


def sweep(
    model: nn.Module, loader: DataLoader, step: Step, *, description: str
) -> dict[str, np.ndarray]:
    """Evaluate a model batch by batch and collect the results on the host.

    Several processes share the batches, and each gets the results of all.

    Args:
        model: the model; it is put in eval mode and left there.
        loader: evaluation batches, see ``dataloader.sampler.evaluation_loader``.
        step: from a batch on the model's device to named tensors, whose rows are concatenated over
            the batches.
        description: title of the progress bar.

    Returns:
        The arrays by name, rows in the data set's order; no arrays if there are no batches.
    """
    model.eval()
    device = next(model.parameters()).device
    sharded = is_sharded(model)
    results = []
    # What is gathered of a sharded model outlives the sweep, and training needs it.
    with torch.no_grad() if sharded else torch.inference_mode():
        extra = repeats(len(loader), next(iter(loader), None)) if sharded else ()
        for batch in ProgressBar(loader, desc=description, unit="batch", leave=False):
            rows = step(send_to_device(batch, device))
            results.append({name: values.cpu().numpy() for name, values in rows.items()})
        for batch in extra:
            step(send_to_device(batch, device))
    results = interleave(results)
    names = results[0] if results else {}
    return {name: np.concatenate([result[name] for result in results]) for name in names}
